"""The result of a run directory as a table and pictures."""

from typing import Any

from etils import epath

from fedjax_peft import console, metrics


def show(workdir: epath.PathLike) -> None:
    """Prints the table per group and writes the plots of a finished run."""
    workdir = epath.Path(workdir)
    summary = metrics.read_json(workdir / "summary.json")
    if summary is None:
        raise ValueError(f"workdir {workdir} has no summary.json: the run has not finished")
    rows = metrics.read_rows(workdir / "clients.parquet")
    console.table(f"{workdir}: accuracy per group", *_table(rows, summary["rounds"]))


def _table(rows: list[dict[str, Any]], total: int) -> tuple[list[str], list[list[Any]]]:
    raise NotImplementedError
