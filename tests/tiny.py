"""A Hugging Face folder of a tiny random BERT with a byte tokenizer, written without torch, and a config for it."""

import json
import pathlib

import numpy as np
import tokenizers
from safetensors.numpy import save_file

WIDTH, INNER, LAYERS, POSITIONS = 16, 32, 2, 40


def write_model(folder: pathlib.Path, seed: int = 0, layers: int = LAYERS) -> pathlib.Path:
    """Writes config.json, model.safetensors and tokenizer.json; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    vocabulary = tokenizer.get_vocab_size()
    config = {
        "model_type": "bert",
        "architectures": ["BertModel"],
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": INNER,
        "max_position_embeddings": POSITIONS,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "pad_token_id": 0,
        "initializer_range": 0.02,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[PAD]"}))
    save_file(_weights(vocabulary, layers, np.random.default_rng(seed)), folder / "model.safetensors")
    return folder


def _tokenizer() -> tokenizers.Tokenizer:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    model = tokenizers.models.WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated"),
        ]
    )
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def _weights(vocabulary: int, layers: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    weights: dict[str, np.ndarray] = {}

    def matrix(name, *shape):
        weights[f"{name}.weight"] = rng.normal(0, 0.3, shape).astype(np.float32)

    def dense(name, inputs, outputs):
        matrix(name, outputs, inputs)
        weights[f"{name}.bias"] = np.zeros(outputs, np.float32)

    def norm(name):
        weights[f"{name}.weight"] = np.ones(WIDTH, np.float32)
        weights[f"{name}.bias"] = np.zeros(WIDTH, np.float32)

    matrix("embeddings.word_embeddings", vocabulary, WIDTH)
    matrix("embeddings.position_embeddings", POSITIONS, WIDTH)
    matrix("embeddings.token_type_embeddings", 2, WIDTH)
    norm("embeddings.LayerNorm")
    for layer in range(layers):
        at = f"encoder.layer.{layer}"
        for part in ("query", "key", "value"):
            dense(f"{at}.attention.self.{part}", WIDTH, WIDTH)
        dense(f"{at}.attention.output.dense", WIDTH, WIDTH)
        norm(f"{at}.attention.output.LayerNorm")
        dense(f"{at}.intermediate.dense", WIDTH, INNER)
        dense(f"{at}.output.dense", INNER, WIDTH)
        norm(f"{at}.output.LayerNorm")
    dense("pooler.dense", WIDTH, WIDTH)
    return weights


CONFIG = """
from fedjax_peft import experiment

def get_config():
    config = experiment.default_config()
    config.rounds = 6
    config.cohort = 4
    config.max_length = 24
    config.widths = 2
    config.data.name = "chatterbot"
    config.model.source = {source!r}
    config.model.pool = "mean"
    config.adapter.rank = 2
    config.optimizer.learning_rate = 0.01
    config.algorithm.name = "fedsa_lora"
    config.algorithm.keep_optimizer = True
    config.train.steps = 2
    config.train.batch = 4
    config.personalize.steps = 2
    config.evaluate.every = 3
    config.evaluate.batch = 16
    config.evaluate.pack = 16
    config.dropout_rate = 0.2
    config.run.chunk = 4
    config.run.checkpoint_every = 1
    return config
"""


def write_config(folder: pathlib.Path) -> pathlib.Path:
    """Writes the model and a config file that trains it; returns the config's path."""
    path = folder / "tiny.py"
    path.write_text(CONFIG.format(source=str(write_model(folder / "model"))))
    return path
