"""`fedjax-peft bench --population`: rounds whose clients have large states, in populations of several sizes.

The whole of a run but its model: cohorts, states from disk to the device and back, checkpoints. Time and memory of a
round should depend on the cohort alone.
"""

import functools
import pathlib
import statistics
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from fedjax_peft import console, loop, manifest, metrics, rounds, runs
from fedjax_peft.data import federated
from fedjax_peft.types import Algorithm, Batches, Model, Task

COLUMNS = (
    "clients",
    "states, GB",
    "ms a round",
    "ms a checkpoint",
    "MB of memory, start",
    "middle",
    "end",
    "MB on disk",
)


def main(arguments: list[str]) -> None:
    """Measures each size of `--population`; a table and a JSON file."""
    values = _flags(arguments)
    sizes = [int(size) for size in values.population]
    setting = {name: values[name].value for name in ("cohort", "rounds", "kilobytes", "every")}
    if setting["cohort"] > min(sizes):
        raise ValueError(
            f"--cohort is {setting['cohort']}, expected no more than the {min(sizes)} clients of the least"
        )
    if values.folder is not None and not pathlib.Path(values.folder).is_dir():
        raise ValueError(f"--folder is {values.folder}, expected a folder that exists")
    rows = [measure(size, values.folder, **setting) for size in sizes]
    metrics.write_json(
        values.output, {"environment": manifest.environment(), "command": sys.argv, "setting": setting, "rows": rows}
    )
    shown = [[row[name] for name in COLUMNS] for row in rows]
    console.table("Rounds of a population on disk", COLUMNS, shown)


def measure(clients: int, folder: str | None, *, cohort: int, rounds: int, kilobytes: int, every: int) -> dict:
    """Runs the rounds in a folder of their own, which is deleted.

    Args:
      clients: N.
      folder: on the disk to be used; None is the system's for temporary files.
      cohort: clients of a round.
      rounds: to run; the first half is for warming up.
      kilobytes: of one client's state.
      every: rounds between two checkpoints.

    Returns:
      One value for each of COLUMNS.
    """
    stages: list[tuple[str, float, float]] = []
    with tempfile.TemporaryDirectory(dir=folder) as place:
        workdir = pathlib.Path(place)
        loop.run(
            _problem(kilobytes * 256),
            _clients(clients, cohort),
            {},
            workdir,
            seed=0,
            total=rounds,
            chunk=1,
            evaluations=runs.Evaluations(every=None),
            checkpoint_every=every,
            keep_checkpoints=2,
            population_folder=str(workdir / "scratch"),
            begin=lambda stage: stages.append((stage, time.monotonic(), _resident())),
        )
        disk = sum(path.stat().st_blocks * 512 for path in workdir.rglob("*") if path.is_file())
    spans = [(stage, after[1] - at) for (stage, at, _), after in zip(stages, stages[1:], strict=False)]
    late = spans[len(spans) // 2 :]
    memory = [resident for stage, _, resident in stages if stage.startswith("round")]
    found = (
        clients,
        clients * kilobytes / 1e6,
        1e3 * statistics.median(seconds for stage, seconds in late if stage.startswith("round")),
        1e3 * statistics.median(seconds for stage, seconds in late if "checkpoint after" in stage),
        *(memory[at] for at in (1, len(memory) // 2, -1)),
        disk / 1e6,
    )
    return dict(zip(COLUMNS, found, strict=True))


@functools.cache
def _problem(words: int) -> runs.Problem:
    """A method that reads and writes every word of its client's state and trains nothing."""

    def client_update(base, server, client, batches, key):
        return {"words": client["words"] + 1}, {"sum": jnp.mean(client["words"])}, {"loss": jnp.mean(client["words"])}

    method = Algorithm(
        init=lambda key: {"sum": jnp.zeros((), jnp.float32)},
        init_client=lambda server, client_id, key: {"words": jnp.zeros(words, jnp.float32)},
        client_update=client_update,
        fold=lambda uploads, cohort: jax.tree.map(lambda leaf: jnp.sum(leaf, 0), uploads),
        server_update=lambda server, sums: (sums, {}),
        personalize=lambda base, server, client, batches, key: {},
        traffic=lambda server: (0, 0),
    )
    nothing = {"none": jnp.zeros((), jnp.float32)}
    model = Model(lambda key: nothing, lambda base, adapters, inputs, key=None: None, lambda *given: None)
    task = Task(lambda outputs, labels: labels, lambda outputs, labels: {})
    return runs.Problem(rounds.make_mesh(), method, model, task, nothing)


def _clients(count: int, cohort: int) -> runs.Clients:
    def batches(ids):
        shape = (len(ids), 1, 1)
        inputs = {"tokens": np.zeros((*shape, 1), np.int32), "mask": np.ones((*shape, 1), bool)}
        width = np.zeros(shape[:2], np.int32)
        return Batches(inputs, np.zeros(shape, np.int32), np.ones(shape, np.float32), width, (1,))

    return runs.Clients(
        names=("client",) * count,
        groups=("all",) * count,
        examples=np.ones(count, np.int64),
        majority=np.ones(count),
        pools={},
        sample=lambda index: federated.sample(0, index, count, cohort),
        dropped=lambda index, ids: np.zeros(len(ids), bool),
        training=lambda index, ids: batches(ids),
        nothing=batches,
        tests=lambda ids: (),
        tokens=lambda given, chunk: (len(given.width), len(given.width)),
    )


def _resident() -> float:
    """MB of memory that this process holds now."""
    fields = pathlib.Path("/proc/self/status").read_text().split("\n")
    return next(int(line.split()[1]) / 1024 for line in fields if line.startswith("VmRSS"))


def _flags(arguments: list[str]) -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_list("population", None, "clients: one number or several", flag_values=values)
    for name, default, text in (
        ("cohort", 32, "clients of a round"),
        ("rounds", 40, "to run"),
        ("kilobytes", 1000, "of one client's state"),
        ("every", 5, "rounds between two checkpoints"),
    ):
        flags.DEFINE_integer(name, default, text, lower_bound=1, flag_values=values)
    flags.DEFINE_string("folder", None, "on the disk to be used", flag_values=values)
    flags.DEFINE_string("output", "population.json", "file for all numbers", flag_values=values)
    try:
        rest = values(["fedjax-peft", *arguments])[1:]
    except flags.Error as error:
        raise ValueError(" ".join(str(error).split())) from None
    if rest or not values.population or not all(size.isdigit() for size in values.population):
        raise ValueError(
            f"{' '.join(arguments)} is not understood; flags are {', '.join(f'--{name}' for name in values)}"
        )
    return values
