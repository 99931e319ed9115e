"""Readers of text data sets: parquet, CSV, TSV and JSON-lines files, folders of them, and the Hugging Face hub.

A table is a dict of columns of equal length: numpy arrays, of dtype object where the values are strings or lists.
"""

import fnmatch
import json
import logging
from collections.abc import Callable, Sequence
from typing import BinaryIO

import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
from etils import epath

Table = dict[str, np.ndarray]

UNLABELLED = (-1, "-", "", None)  # what data sets write where annotators did not agree
EVERY = "*"  # as a split: all files of a folder, such as one for each client
AUTO = "auto"  # as a split of tests: the usual one, or held-out rows where there are no splits


def read(
    source: epath.PathLike, *, split: str, config: str | None = None, columns: Sequence[str] | None = None
) -> Table:
    """One split of a data set.

    Args:
      source: a file .parquet, .csv, .tsv or .jsonl; a folder with [CONFIG/]SPLIT.parquet or the like, also in the hub's
        layouts [CONFIG/ or data/]SPLIT-00000-of-00001.parquet and [CONFIG/]SPLIT/0000.parquet; or the name of a data
        set on the hub. Files and folders may be in an object store, as gs://BUCKET/PATH.
      split: 'train', 'test', .., or several, as in 'train+validation', one after the other; a file is one split,
        whatever it is called. '*' is every file of a folder in the order of names, which the new column `file` has,
        without suffixes.
      config: subset of the data set, e.g. a language; a file has none.
      columns: columns to keep; all by default.

    Raises:
      ValueError: nothing is there, a column is missing, or splits to be joined have different ones.
    """
    path = epath.Path(source).expanduser()
    if path.is_dir() and split == EVERY:
        return _each(path / config if config else path, columns)
    if path.is_dir() and "+" in split:
        parts = [part.strip() for part in split.split("+")]
        tables = [read(source, split=part, config=config, columns=columns) for part in parts]
        return _joined(source, parts, tables)
    if path.is_dir():
        files = _files(path, split, config)
        table = pyarrow.concat_tables([_table(file) for file in files], promote_options="default")
    elif path.is_file() and path.suffix in _READERS:
        if config:
            raise ValueError(f"{source} is one file, but data.configs asks for its subset {config!r}: name a folder")
        table = _table(path)
    elif path.suffix in _READERS or path.exists() or str(source).startswith((".", "/", "~")) or "://" in str(source):
        kinds = ", ".join(_READERS)
        raise ValueError(f"{source} is neither a folder nor a file of a known kind ({kinds}); does it exist?")
    else:
        table = _from_hub(str(source), split, config)
    missing = [name for name in columns or () if name not in table.column_names]
    if missing:
        raise ValueError(f"{source} ({split}) has no column {missing[0]!r}, only {', '.join(table.column_names)}")
    return {name: _array(table[name]) for name in columns or table.column_names}


def splits(source: str, train: str, test: str | None, usual: str = "test") -> dict[str, str]:
    """What to read: {`train`, `test`}, or `train` alone where tests are to be held out of its rows.

    Args:
      source: as in `read`. A file has no splits.
      train, test: as in `read`. A `test` of None holds out, and `auto` does so where there are no splits.
      usual: what `auto` is where there are.

    Raises:
      ValueError: a split of tests is named where there are none.
    """
    path = epath.Path(source).expanduser()
    whole = train == EVERY or (path.suffix in _READERS and not path.is_dir())
    if whole and test not in (None, AUTO):
        raise ValueError(
            f"data.test is {test!r}, but {source} has no splits: set data.test to None, which holds out some of its "
            f"rows, or data.source to a folder with a file for each split"
        )
    if whole and test == AUTO:
        logging.info("%s has no splits: tests are held out of its rows", source)
    return {"train": train} if whole or test is None else {"train": train, "test": usual if test == AUTO else test}


def read_configs(
    source: epath.PathLike, configs: Sequence[str], *, split: str, columns: Sequence[str] | None = None
) -> Table:
    """One split of a data set, or of several of its subsets one after the other; the column `language` names them."""
    if not configs:
        return read(source, split=split, columns=columns)
    tables = [read(source, split=split, config=config, columns=columns) for config in configs]
    sizes = [len(next(iter(table.values()))) for table in tables]
    return _joined(source, configs, tables) | {"language": np.repeat(np.array(configs, object), sizes)}


def labelled(table: Table, label: str = "label") -> Table:
    """The rows that have a gold label. ValueError without a column of labels."""
    if label not in table:
        raise ValueError(f"there is no label column {label!r}, only {', '.join(table)}")
    keep = np.array([value not in UNLABELLED and value == value for value in table[label].tolist()], bool)
    return {name: column[keep] for name, column in table.items()}


def with_labels(
    splits: dict[str, Table], label: str = "label", names: Sequence[str] | None = None
) -> tuple[dict[str, Table], tuple[str, ...]]:
    """Class numbers in the column `label` of all splits, int32, and the names of the classes.

    Args:
      splits: tables by split, without unlabelled rows.
      label: column of class numbers or class names.
      names: all class names, in the order of their numbers. By default those that occur, sorted; numbers are their own
        names.

    Raises:
      ValueError: a label that is not among `names`.
    """
    values = [value for table in splits.values() for value in table[label].tolist()]
    if all(isinstance(value, str) for value in values):
        names = sorted(set(values)) if names is None else list(names)
        number = {name: i for i, name in enumerate(names)}
    else:
        names = [str(i) for i in range(max(values) + 1)] if names is None else list(names)
        number = {i: i for i in range(len(names))}
    out = {}
    for split, table in splits.items():
        found = [number.get(value, -1) for value in table[label].tolist()]
        if -1 in found:
            row = found.index(-1)
            raise ValueError(
                f"row {row} of {split} has label {table[label].tolist()[row]!r}, not one of the {len(names)} classes"
            )
        out[split] = table | {label: np.array(found, np.int32)}
    return out, tuple(names)


def texts(table: Table, columns: str | Sequence[str]) -> tuple[list[str], list[str] | None]:
    """(texts, second texts or None) of one column or of a pair of columns.

    Raises:
      ValueError: a missing column, or a row without text.
    """
    columns = [columns] if isinstance(columns, str) else list(columns)
    if len(columns) not in (1, 2):
        raise ValueError(f"a model reads one text or a pair of texts, not the {len(columns)} columns {columns}")
    for name in columns:
        if name not in table:
            raise ValueError(f"there is no text column {name!r}, only {', '.join(table)}")
        rows = [row for row, text in enumerate(table[name]) if not isinstance(text, str)]
        if rows:
            raise ValueError(f"row {rows[0]} of column {name!r} holds {table[name][rows[0]]!r} instead of a text")
    first, second = table[columns[0]], table[columns[1]] if len(columns) == 2 else None
    return list(first), None if second is None else list(second)


def _joined(source: epath.PathLike, names: Sequence[str], tables: Sequence[Table]) -> Table:
    """The rows of all tables, one below the other, with the columns that all of them have."""
    common = [column for column in tables[0] if all(column in table for table in tables)]
    if not common:
        raise ValueError(f"{source}: {', '.join(names)} have no column in common")
    return {column: np.concatenate([table[column] for table in tables]) for column in common}


def _each(folder: epath.Path, columns: Sequence[str] | None) -> Table:
    """All files of a folder, and in the column `file` which one a row is from."""
    files = sorted(file for file in _inside(folder) if file.suffix in _READERS)
    if not files:
        raise ValueError(f"{folder} has no file of a known kind ({', '.join(_READERS)})")
    read_in = {file: read(file, split=EVERY, columns=columns) for file in files if file.stat().length}
    tables = {file: table for file, table in read_in.items() if len(next(iter(table.values()), ()))}
    if not tables:
        raise ValueError(f"{folder}: no file has rows")
    sizes = [len(next(iter(table.values()))) for table in tables.values()]
    names = np.repeat(np.array([file.stem for file in tables], object), sizes)
    return _joined(folder, [file.name for file in tables], list(tables.values())) | {"file": names}


def _files(folder: epath.Path, split: str, config: str | None) -> list[epath.Path]:
    """The files of a split: one, or the numbered parts of the hub's layouts."""
    places = [folder / config] if config else [folder, folder / "data"]
    for place in places:
        for suffix in _READERS:
            if (place / f"{split}{suffix}").is_file():
                return [place / f"{split}{suffix}"]
            for inside, pattern in ((place, f"{split}-[0-9]*{suffix}"), (place / split, f"[0-9]*{suffix}")):
                if parts := [path for path in _inside(inside) if fnmatch.fnmatch(path.name, pattern)]:
                    return parts
    there = [path.name for path in _inside(places[0])]
    found = f"only {', '.join(there[:8])}" if there else "which does not exist or is empty"
    raise ValueError(f"no {split} split (as {split}.parquet, for example) in {places[0]}, {found}")


def _inside(folder: epath.Path) -> list[epath.Path]:
    # A glob would read brackets in the names of folders as patterns.
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _table(path: epath.Path) -> pyarrow.Table:
    with path.open("rb") as file:
        return _READERS[path.suffix](file)


def _from_hub(name: str, split: str, config: str | None) -> pyarrow.Table:
    import datasets

    try:
        return datasets.load_dataset(name, config, split=split).with_format("arrow")[:]
    except Exception as error:  # missing data sets, no network and bad configs all differ in type
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "scripts are no longer supported" in reason:
            reason += (
                "; its parquet files can do: hf download --repo-type=dataset --revision=refs/convert/parquet "
                f"--local-dir=FOLDER {name}, and data.source=FOLDER"
            )
        raise ValueError(
            f"no data set {name!r} ({config=}, {split=}) on this machine, and the hub did not give it: {reason}"
        ) from None


def _jsonl(file: BinaryIO) -> pyarrow.Table:
    return pyarrow.Table.from_pylist([json.loads(line) for line in file if line.strip()])


def _csv(file: BinaryIO) -> pyarrow.Table:
    return pyarrow.csv.read_csv(file, parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True))


def _tsv(file: BinaryIO) -> pyarrow.Table:
    # Tab-separated benchmark files have unbalanced quotes in their texts.
    return pyarrow.csv.read_csv(file, parse_options=pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False))


_READERS: dict[str, Callable[[BinaryIO], pyarrow.Table]] = {
    ".parquet": pyarrow.parquet.read_table,
    ".csv": _csv,
    ".tsv": _tsv,
    ".jsonl": _jsonl,
}


def _array(column: pyarrow.ChunkedArray) -> np.ndarray:
    numeric = pyarrow.types.is_integer(column.type) or pyarrow.types.is_floating(column.type)
    if numeric and column.null_count == 0:
        return column.to_numpy()
    out = np.empty(len(column), object)
    out[:] = column.to_pylist()
    return out
