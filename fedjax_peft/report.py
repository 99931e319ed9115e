"""The result of a run directory as a table and pictures."""

from typing import Any

import numpy as np
from etils import epath

from fedjax_peft import console, metrics


def show(workdir: epath.PathLike) -> None:
    """Prints the table of a finished run, a row a group, and writes its plots."""
    workdir = epath.Path(workdir)
    manifest, summary = (metrics.read_json(workdir / name) for name in ("manifest.json", "summary.json"))
    if manifest is None or summary is None:
        raise ValueError(f"workdir {workdir} has no finished run: summary.json is missing")
    rows = metrics.read_rows(workdir / "clients.parquet")
    name = manifest["experiment"]["algorithm"]["name"]
    console.table(f"Accuracy after {summary['rounds']} rounds of {name}", *_table(rows, summary["rounds"], name))
    print(f"all results are in {workdir}")


def _table(rows: list[dict[str, Any]], total: int, name: str) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows: examples and accuracy per group, pooled over its clients; then means over the clients of a pool."""
    points = {"base": (0, "global"), name: (total, "global"), "personalized": (total, "personal")}
    last = [row for row in rows if row["round"] == total and row["point"] == "personal"]
    members: dict[tuple[str, str], list[int]] = {}
    for row in last:
        members.setdefault((row["pool"], row["group"]), []).append(row["client"])
    values = {(row["round"], row["point"], row["client"]): row for row in rows}

    def cells(clients, weighted):
        of = {client: values[total, "personal", client] for client in clients}
        clients = [client for client in clients if of[client]["examples"]]
        weights = [of[client]["examples"] if weighted else 1 for client in clients]

        def mean(get):
            return float(np.average([get(client) for client in clients], weights=weights))

        return [
            sum(row["train_examples"] for row in of.values()),
            sum(row["examples"] for row in of.values()),
            mean(lambda client: of[client]["majority"]),
            *(mean(lambda client, key=key: values[*key, client]["accuracy"]) for key in points.values()),
        ]

    table = [[group, pool, *cells(clients, True)] for (pool, group), clients in members.items()]
    for pool in dict.fromkeys(pool for pool, _ in members):
        everyone = [row["client"] for row in last if row["pool"] == pool]
        table.append([f"mean over {len(everyone)} clients", pool, *cells(everyone, False)])
    return ["group", "pool", "train", "test", "majority", *points], table
