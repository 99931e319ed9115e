"""What a run leaves for people and programs to read: JSON lines, parquet tables and JSON files, always whole.

JSON has no numbers that are not finite, so they are written as null.

Of several processes the first one writes; what the others want to write is what it writes.
"""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from fedjax_peft import processes


def write_json(path: epath.PathLike, content: Mapping[str, Any]) -> None:
    """Replaces a file at once, so that a killed process leaves the old or the new one."""
    _replace(path, _json(content, indent=2) + "\n")


def read_json(path: epath.PathLike) -> dict[str, Any] | None:
    """The content of a file, or None if it does not exist. In the statistics of `pools`, null is NaN again."""
    path = epath.Path(path)
    content = json.loads(path.read_text()) if path.exists() else None
    return content | {"pools": _numbers(content["pools"])} if content and "pools" in content else content


def appends(path: epath.PathLike) -> bool:
    """Whether lines can be added to a file; objects of a store (gs://, s3://) are only ever replaced."""
    return "://" not in str(path)


def append_lines(path: epath.PathLike, records: Iterable[Mapping[str, Any]]) -> None:
    """Adds JSON objects, a line each; in an object store the file is replaced by one with these lines at its end."""
    if not processes.first():
        return
    path, text = epath.Path(path), "".join(_json(record) + "\n" for record in records)
    if not appends(path):
        return _replace(path, (path.read_text() if path.exists() else "") + text)
    with path.open("a") as file:
        file.write(text)


def read_lines(path: epath.PathLike) -> list[dict[str, Any]]:
    """All whole lines of a file of JSON objects; a last line that a kill cut short is left out."""
    path = epath.Path(path)
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def rewind(path: epath.PathLike, rounds: int) -> None:
    """Drops the lines of rounds that a resumed run will do again."""
    lines = [json.dumps(line) for line in read_lines(path) if line["round"] < rounds]
    _replace(path, "".join(line + "\n" for line in lines))


def merge_rows(path: epath.PathLike, rows: Iterable[Mapping[str, Any]], rounds: int) -> None:
    """Adds rows to a parquet table, in place of those of their points in round `rounds` and of all later rounds."""
    if not processes.first():
        return
    path, rows = epath.Path(path), list(rows)
    points = {row["point"] for row in rows}

    def stays(row):
        return row["round"] < rounds or row["round"] == rounds and row["point"] not in points

    old = [row for row in read_rows(path) if stays(row)]
    table = pa.Table.from_pylist([{name: _plain(value) for name, value in row.items()} for row in old + rows])
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        pq.write_table(table, file)
    temporary.replace(path)


def read_rows(path: epath.PathLike) -> list[dict[str, Any]]:
    """The rows of a parquet table; none if it does not exist."""
    if not epath.Path(path).exists():
        return []
    with epath.Path(path).open("rb") as file:
        return pq.read_table(file).to_pylist()


def _replace(path, text):
    if not processes.first():
        return
    path = epath.Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _json(content, **form):
    return json.dumps(_finite(content), allow_nan=False, **form)


def _finite(value):
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    value = _plain(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(value):
    if isinstance(value, Mapping):
        return {key: _numbers(part) for key, part in value.items()}
    return math.nan if value is None else value


def _plain(value):
    return value.item() if isinstance(value, np.generic) or np.ndim(value) == 0 and hasattr(value, "item") else value
