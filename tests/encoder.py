"""Tiny configurations of the BERT family, inputs for them, and checkpoints as their owners would publish them."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import traverse_util

from fedjax_peft.types import PyTree

LAYERS, WIDTH, INNER, VOCABULARY, POSITIONS = 3, 24, 40, 50, 16


def config(kind: str = "bert") -> dict:
    """`bert`, `roberta` or `xlm-roberta`. Weights are large, so that a wrong one shows."""
    roberta = kind != "bert"
    return {
        "model_type": kind,
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": INNER,
        "max_position_embeddings": POSITIONS + 2 * roberta,
        "type_vocab_size": 1 if roberta else 2,
        "pad_token_id": 1 if roberta else 0,
        "layer_norm_eps": 1e-5 if roberta else 1e-12,
        "hidden_act": "gelu",
        "initializer_range": 0.3,
    }


def inputs(pad: int = 0, lengths=(10, 7, 2), seed: int = 0, types: bool = False) -> dict:
    """`tokens`, `mask` [3, 10] and, on request, `types`."""
    rng = np.random.default_rng(seed)
    mask = np.arange(max(10, *lengths))[None] < np.asarray(lengths)[:, None]
    tokens = np.where(mask, rng.integers(3, VOCABULARY, mask.shape), pad).astype(np.int32)
    found = {"tokens": jnp.asarray(tokens), "mask": jnp.asarray(mask)}
    if types:
        found["types"] = jnp.asarray((np.arange(mask.shape[1])[None] > 4) & mask, jnp.int32)
    return found


def weights(shapes: PyTree, seed: int = 0) -> PyTree:
    """Random parameters of these shapes, without the compile time of `init`."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(centre + 0.3 * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def published(base: dict, prefix: str = "") -> dict[str, np.ndarray]:
    """Our parameters under their Hugging Face names and layouts: the inverse of the table, written independently."""
    tensors = {}
    for path, leaf in traverse_util.flatten_dict(base, sep=".").items():
        leaf = np.asarray(leaf)
        name = re.sub(r"\.(kernel|embedding|scale)$", ".weight", path)
        name = name if name.startswith(("classifier", "qa_outputs")) else prefix + name
        layers = enumerate(leaf) if ".layer." in name else [(None, leaf)]
        for layer, value in layers:
            value = value.T if path.endswith("kernel") else value
            tensors[name.replace(".layer.", f".layer.{layer}.")] = np.ascontiguousarray(value)
    return tensors


def save(folder: pathlib.Path, settings: dict, tensors: dict[str, np.ndarray], shards: int = 1) -> pathlib.Path:
    """A folder as `save_pretrained` leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    if shards == 1:
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
        return folder
    files = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        part = {name: tensors[name] for name in tensors if files[name] == file}
        safetensors.numpy.save_file(part, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder
