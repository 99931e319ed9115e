"""Partitions kept on disk, named by everything that they depend on."""

import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from fedjax_peft.data.dealing import Partition, Splits

_VERSION = 2  # of the partitioners' rules; raise it when one changes, so that old files are not found


def cached(
    folder: pathlib.Path | str, partitioner: Callable[..., Partition], splits: Splits, **settings: Any
) -> Partition:
    """`partitioner(splits, **settings)`, read from `folder` if it was computed before.

    The file's name is a hash of the partitioner's name, its settings and the content of all columns given: pass only
    the columns that it reads. Several processes may do this at once.
    """
    path = pathlib.Path(folder) / f"{partitioner.__name__}-{_key(partitioner, splits, settings)}.npz"
    if path.is_file():
        return _read(path)
    partition = partitioner(splits, **settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for split, clients in partition.items():
        arrays[f"{split}/rows"] = np.concatenate([np.zeros(0, np.int64), *clients])
        arrays[f"{split}/sizes"] = np.array([len(rows) for rows in clients], np.int64)
    # Written aside and renamed, so that nobody ever reads half a file.
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        np.savez(file, **arrays)
    os.replace(file.name, path)
    return partition


def _read(path: pathlib.Path) -> Partition:
    with np.load(path) as arrays:
        splits = [name.removesuffix("/sizes") for name in arrays if name.endswith("/sizes")]
        return {s: np.split(arrays[f"{s}/rows"], np.cumsum(arrays[f"{s}/sizes"])[:-1]) for s in splits}


def _key(partitioner: Callable[..., Partition], splits: Splits, settings: dict[str, Any]) -> str:
    sha = hashlib.sha256(json.dumps([_VERSION, partitioner.__name__, settings], sort_keys=True).encode())
    for split, columns in splits.items():
        for name, column in sorted(columns.items()):
            column = np.asarray(column)
            numbers = column.dtype.kind in "biuf"
            content = column.tobytes() if numbers else json.dumps(column.tolist()).encode()
            sha.update(json.dumps([split, name, column.dtype.str, column.shape]).encode() + content)
    return sha.hexdigest()[:32]
