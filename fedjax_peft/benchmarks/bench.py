"""`fedjax-peft bench`: a round of this library against the same clients one after another in PyTorch and PEFT.

Both sides get the same weights, adapters, batches and optimizer, take turns on the same machine, and must come to the
same losses: a faster wrong answer is an error. The other side is a child process (`pytorch.py`) that sleeps while
this one works. Speeds and shares of the peak are of real tokens, so padding and recomputation count against a side.
"""

import contextlib
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from fedjax_peft import console, manifest, metrics
from fedjax_peft.benchmarks import jobs
from fedjax_peft.benchmarks.jobs import Job, Setting
from fedjax_peft.data import batches

TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}
"""Relative differences of losses over two rounds that rounding explains."""
NOISY = 0.05
"""Share of the machine in other hands above which the table says so: threads that wait for each other suffer most."""
COLUMNS = ("clients", "batch", "chunk", "tokens/s", "of peak", "FLOPs / least", "MB a round")
TORCH_COLUMNS = ("torch tokens/s", "of peak", "ratio")


class Side(NamedTuple):
    """One of the two that are compared."""

    restart: Callable[[], Any]
    """Back to the initial adapters."""
    round: Callable[[], tuple[float, np.ndarray]]
    """The next round -> (seconds, mean loss of each client [C])."""


def main(arguments: list[str]) -> None:
    """`bench`: measures all combinations of `--clients`, `--batch` and `--chunk`; a table and a JSON file."""
    values = _flags(arguments)
    # Two frameworks share the memory of one accelerator. Has no effect once a device was used.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    shared = {name: values[name].value for name in Setting._fields if name not in _LISTS}
    rows = []
    for combination in itertools.product(*(values[name].value for name in _LISTS)):
        own = dict(zip(_LISTS, map(int, combination), strict=True))
        own["chunk"] = min(own["chunk"] or own["clients"], own["clients"])
        setting = Setting(**shared, **own)
        rows.append(measure(setting, repeats=values.repeats, memory_rounds=values.memory_rounds, torch=values.torch))
        content = {"environment": manifest.environment(), "command": sys.argv, "rows": rows}
        metrics.write_json(pathlib.Path(values.output), content)
    title = f"{values.model}, {values.lengths} lengths up to {values.tokens} tokens, {values.dtype}"
    busy = max(row["others"] for row in rows)
    if busy > NOISY:
        title += f"; NOT QUIET: other processes used {busy:.0%} of the machine"
    console.table(title, COLUMNS + TORCH_COLUMNS * values.torch, [_shown(row) for row in rows])


def measure(setting: Setting, *, repeats: int, memory_rounds: int, torch: bool) -> dict[str, Any]:
    """Measures one setting.

    Args:
      repeats: timed rounds of each side, in turns, each from the initial adapters.
      memory_rounds: rounds over which memory must stay flat; 0 leaves that out.
      torch: also measures the other side.

    Returns:
      The setting, seconds of every repetition, and what follows from them.

    Raises:
      ValueError: the sides come to different losses, or the other side cannot run.
    """
    job = jobs.make_job(setting)
    sides = {"ours": make_ours(job)}
    seconds: dict[str, list[float]] = {"ours": []}
    with make_theirs(setting, job) if torch else contextlib.nullcontext() as theirs:
        losses = two_rounds(sides["ours"])
        if theirs is not None:
            sides["torch"], seconds["torch"] = theirs, []
            check_same(losses, two_rounds(theirs), TOLERANCE[setting.dtype])
        others = []
        for _, (name, side) in itertools.product(range(repeats), sides.items()):
            side.restart()
            others.append(busy_share())
            seconds[name].append(side.round()[0])
    tokens, computed = batches.waste(job.batches, setting.chunk)
    least = jobs.minimum_flops(job.base, job.server().adapters, job.batches)
    peak = matrix_peak(setting.dtype)
    row: dict[str, Any] = {"setting": setting._asdict(), "tokens": tokens, "tokens_computed": computed}
    row |= {"peak_flops": peak, "minimum_flops": least, "losses": losses.tolist(), "others": statistics.mean(others)}
    row["flops_over_minimum"] = jobs.flops_over_minimum(setting)
    for name, values in seconds.items():
        middle = statistics.median(values)
        row[name] = {"seconds": values, "spread": (max(values) - min(values)) / middle}
        row[name] |= {"tokens_per_second": tokens / middle, "share_of_peak": least / middle / peak}
    if torch:
        row["ratio"] = row["ours"]["tokens_per_second"] / row["torch"]["tokens_per_second"]
    if memory_rounds:
        row["bytes_per_round"] = memory_growth(sides["ours"], memory_rounds) / memory_rounds
    return row


def make_ours(job: Job) -> Side:
    """This library, compiled."""
    root, server = jax.random.key(0), job.server()
    compiled = job.step.lower(job.base, server, *job.arguments, 0, root).compile()

    def restart():
        nonlocal server
        server = job.server()

    def one_round():
        nonlocal server
        jax.block_until_ready((job.base, server, job.arguments))
        start = time.perf_counter()
        server, _, _, outcome = jax.block_until_ready(compiled(job.base, server, *job.arguments, 0, root))
        return time.perf_counter() - start, np.asarray(outcome["clients"]["loss"])

    return Side(restart, one_round)


@contextlib.contextmanager
def make_theirs(setting: Setting, job: Job) -> Iterator[Side]:
    """The same job in PyTorch, in a child process that ends with the context."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        _write_job(folder, setting, job)
        with (folder / "errors").open("w") as errors:
            command = [sys.executable, "-m", "fedjax_peft.benchmarks.pytorch", name]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
            child = subprocess.Popen(command, text=True, bufsize=1, **pipes)

        def ask(word):
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(f"{word}\n")
            answer = child.stdout.readline()
            if not answer:
                last = ((folder / "errors").read_text().split("\n")[:-1] or ["it says nothing"])[-1]
                raise ValueError(f"the comparison with torch ended: {last} (--notorch leaves it out)")
            return json.loads(answer)

        def one_round():
            answer = ask("round")
            return answer["seconds"], np.asarray(answer["losses"])

        try:
            yield Side(lambda: ask("restart"), one_round)
        finally:
            child.kill()
            with contextlib.suppress(BrokenPipeError):
                child.communicate()


def two_rounds(side: Side) -> np.ndarray:
    """Losses [2, C] of the first two rounds; the second one starts from the average that the first one left."""
    side.restart()
    return np.stack([side.round()[1] for _ in range(2)])


def check_same(ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> None:
    """Raises ValueError if losses differ by more than a relative `tolerance`, or are not finite."""
    apart = np.max(np.abs(ours - theirs) / np.abs(theirs))
    if not apart <= tolerance:
        raise ValueError(
            f"the two sides come to different losses, {apart:.1e} apart where {tolerance:.0e} is rounding, "
            f"so their speeds cannot be compared"
        )


def matrix_peak(dtype: str, seconds: float = 0.5) -> float:
    """FLOPs per second of the fastest of three matrix products, each tried for so many seconds."""
    large = (2048, 2048, 2048) if jax.default_backend() == "cpu" else (8192, 8192, 8192)
    best = 0.0
    for rows, inner, columns in ((2048, 384, 1536), (4096, 1024, 1024), large):
        operands = jnp.ones((rows, inner), dtype), jnp.ones((inner, columns), dtype)
        product = jax.jit(jnp.matmul).lower(*operands).compile()
        jax.block_until_ready(product(*operands))
        end = time.perf_counter() + seconds
        while (start := time.perf_counter()) < end:
            jax.block_until_ready([product(*operands) for _ in range(8)])
            best = max(best, 8 * 2 * rows * inner * columns / (time.perf_counter() - start))
    return best


def busy_share(seconds: float = 0.3) -> float:
    """Share of the machine's cores that others keep busy while this process sleeps; NaN if unknown."""
    path = pathlib.Path("/proc/stat")
    if not path.exists():
        return float("nan")

    def read():
        user, nice, system, idle, waiting, *rest = map(int, path.read_text().split("\n")[0].split()[1:9])
        return idle + waiting, user + nice + system + idle + waiting + sum(rest)

    (idle, total), _ = read(), time.sleep(seconds)
    idle_after, total_after = read()
    return 1 - (idle_after - idle) / max(total_after - total, 1)


def memory_growth(side: Side, count: int) -> int:
    """Bytes held after `count` more rounds that were not held before."""
    for _ in range(3):
        side.round()
    before = _held_bytes()
    for _ in range(count):
        side.round()
    return _held_bytes() - before


def _held_bytes() -> int:
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_in_use" in stats:
        return stats["bytes_in_use"]
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _write_job(folder: pathlib.Path, setting: Setting, job: Job) -> None:
    np.savez(folder / "weights.npz", **jobs.named_weights(job.base, job.server().adapters))
    np.savez(folder / "batches.npz", **job.batches.inputs, labels=job.batches.labels)
    fields = {"rank": setting.rank, "alpha": jobs.ALPHA, "targets": jobs.TARGETS.split(",")}
    fields |= {"classes": jobs.CLASSES, "rate": jobs.LEARNING_RATE, "dtype": setting.dtype}
    fields |= {"device": "cuda" if jax.default_backend() == "gpu" else "cpu", "config": job.config}
    (folder / "job.json").write_text(json.dumps(fields))


def _shown(row: Mapping[str, Any]) -> list[Any]:
    setting, ours, torch = row["setting"], row["ours"], row.get("torch")
    cells = [setting[name] for name in ("clients", "batch", "chunk")]
    cells += [round(ours["tokens_per_second"]), ours["share_of_peak"], row["flops_over_minimum"]]
    cells += [row["bytes_per_round"] / 1e6 if "bytes_per_round" in row else "-"]
    return cells + ([round(torch["tokens_per_second"]), torch["share_of_peak"], row["ratio"]] if torch else [])


_LISTS = ("clients", "batch", "chunk")


def _flags(arguments: list[str]) -> flags.FlagValues:
    values = flags.FlagValues()
    whole = {"steps": (4, "local steps"), "tokens": (64, "of the longest text"), "rank": (8, "of the LoRAs")}
    whole |= {
        "repeats": (5, "timed rounds of each side"),
        "memory_rounds": (50, "that memory is watched for"),
    }
    for name, (default, text) in whole.items():
        least = 0 if name == "memory_rounds" else 1
        flags.DEFINE_integer(name, default, text, lower_bound=least, flag_values=values)
    for name, default in (("clients", "8"), ("batch", "8"), ("chunk", "2")):
        flags.DEFINE_list(name, default, "one number or several; chunk 0 is all clients at once", flag_values=values)
    flags.DEFINE_string("model", "minilm", "as in model.source of a config", flag_values=values)
    flags.DEFINE_enum("lengths", "full", jobs.LENGTHS, "of the texts", flag_values=values)
    flags.DEFINE_enum("dtype", "float32", list(TOLERANCE), "of base and arithmetic", flag_values=values)
    flags.DEFINE_bool("scan", False, "layers as a loop", flag_values=values)
    flags.DEFINE_bool("torch", True, "compare with PyTorch and PEFT", flag_values=values)
    flags.DEFINE_string("output", "bench.json", "file for all numbers", flag_values=values)
    try:
        rest = values(["fedjax-peft", *arguments])[1:]
    except flags.Error as error:
        raise ValueError(" ".join(str(error).split())) from None
    lists = [number for name in _LISTS for number in values[name].value]
    if rest or not all(number.isdigit() for number in lists) or "0" in values.clients + values.batch:
        raise ValueError(
            f"{' '.join(arguments)} is not understood; flags are {', '.join(f'--{name}' for name in values)}"
        )
    return values
