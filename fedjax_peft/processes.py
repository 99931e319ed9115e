"""Several processes as one run: how they find each other, tell each other things, and notice that one is missing.

Every process runs the same program on its own devices and meets the others in the same order, at the same places.
"""

import contextlib
import functools
import importlib.util
import json
import logging
import os
import pathlib
import pickle
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fedjax_peft.types import Array

logger = logging.getLogger(__name__)

HUNG = 3
"""Exit code of a process that waited for others in vain, or lost them."""
_BEAT = 10.0  # seconds between two signs of life
_SILENT = 6 * _BEAT
# What jax says when a process at the other end is gone.
_LOST = re.compile(r"connection (closed|reset|refused)|broken pipe|socket closed|UNAVAILABLE|heartbeat", re.IGNORECASE)


def connect(coordinator: str | None, processes: int | None, process: int | None, *, timeout: int = 300) -> None:
    """Joins the other processes of a run, if there are any; must come before anything else that jax does.

    Args:
      coordinator: HOST:PORT of process 0; `auto` or None leaves it to jax, which knows the variables of SLURM, Open MPI
        and TPU hosts, and the metadata of these.
      processes: how many there are, and
      process: which one this is; None for either likewise.
      timeout: seconds to wait for the others.

    Raises:
      ValueError: the flags do not fit together, or the processes do not find each other.
    """
    alone = (coordinator, processes, process) == (None, None, None)
    if alone and not _in_cluster():
        return
    if coordinator not in (None, "auto") and not coordinator.rpartition(":")[2].isdigit():
        raise ValueError(f"--coordinator is {coordinator!r}, expected HOST:PORT of process 0, or auto")
    if processes is not None and process is not None and not 0 <= process < processes:
        raise ValueError(f"--process is {process}, expected 0 to {processes - 1}, because --processes is {processes}")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    address, tasks = None if coordinator == "auto" else coordinator, _slurm_tasks()
    if address is not None and tasks > 1:
        processes = tasks if processes is None else processes
        process = int(os.environ["SLURM_PROCID"]) if process is None else process
    # Left to itself jax gives every task of SLURM and Open MPI one device, even to the only one of a host.
    shared = tasks > int(os.environ.get("SLURM_STEP_NUM_NODES", tasks))
    shared |= int(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1)) > 1
    method = None if shared or None in (address, processes, process) else "deactivate"
    try:
        jax.distributed.initialize(
            address, processes, process, cluster_detection_method=method, initialization_timeout=timeout
        )
    except (RuntimeError, ValueError) as error:
        if alone and isinstance(error, ValueError):
            return  # a TPU that says nothing of other hosts
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"the processes do not find each other (--coordinator is {coordinator}): {reason}") from None
    if threading.current_thread() is threading.main_thread():
        # jax has begun to catch it, for a service that is not used here.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if jax.process_index():
        logging.getLogger().setLevel(logging.WARNING)


def first() -> bool:
    """Whether this process is the one that writes logs, tables and plots."""
    return jax.process_index() == 0


def place() -> tuple[int, int]:
    """(which process this is, how many there are)."""
    return jax.process_index(), jax.process_count()


def gather(value: Any) -> list[Any]:
    """What each process hands in, in their order. Waits for all of them; made for small things."""
    if jax.process_count() == 1:
        return [value]
    own = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(own)))
    # Powers of two: each length is a program of its own.
    length = 1 << int(sizes.max() - 1).bit_length()
    rows = multihost_utils.process_allgather(np.pad(own, (0, length - len(own))))
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def tell(values: np.ndarray) -> Array | np.ndarray:
    """`[k]` int32 of this process -> `[P, k]` of all, which is there once the devices come to it; waits for nobody."""
    if jax.process_count() == 1:
        return np.asarray(values)[None]
    split, _, everywhere = _line()
    own = np.asarray(values, np.int32)[None]
    return everywhere(jax.make_array_from_process_local_data(split, own, (jax.process_count(), own.shape[1])))


def exchange(outgoing: Sequence[np.ndarray], incoming: Sequence[int], largest: int, piece: int) -> list[np.ndarray]:
    """Rows of bytes from every process to every other one.

    Args:
      outgoing: for each process the rows `[k, W]` uint8 that it is to get from this one.
      incoming: how many rows each process has for this one.
      largest: rows that any process has for any other at most, as all of them know.
      piece: rows for one process that are under way at once; always the same number is one compiled program.

    Returns:
      Of each process the rows that it had for this one.
    """
    count, width = jax.process_count(), outgoing[0].shape[1]
    split, swap, _ = _line()
    received: list[list[np.ndarray]] = [[] for _ in range(count)]
    for start in range(0, largest, piece):
        packed = np.zeros((1, count, piece, width), np.uint8)
        for place, rows in enumerate(outgoing):
            part = rows[start : start + piece]
            packed[0, place, : len(part)] = part
        given = jax.make_array_from_process_local_data(split, packed, (count, *packed.shape[1:]))
        here = np.asarray(swap(given).addressable_data(0))[0]
        for place, rows in enumerate(here):
            received[place].append(rows[: max(incoming[place] - start, 0)])
    return [np.concatenate(parts) if parts else np.zeros((0, width), np.uint8) for parts in received]


@contextlib.contextmanager
def stop_signals() -> Iterator[list[str]]:
    """A list that receives the name of SIGTERM or SIGINT when one arrives."""
    received: list[str] = []
    wanted = (signal.SIGTERM, signal.SIGINT)
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    old = {number: signal.signal(number, lambda n, _: received.append(signal.Signals(n).name)) for number in wanted}
    try:
        yield received
    finally:
        for number, handler in old.items():
            if handler is not None:  # one that Python did not set
                signal.signal(number, handler)


def named(stop: list[str]) -> str:
    """What a run was stopped by, if this process or another one was asked to."""
    return stop[0] if stop else "a signal to another process"


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Ends this process at once if its body fails: on a tidy way out it would wait for the others.

    Mistakes of a user are met by all processes alike, so they go the tidy way.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) or jax.process_count() == 1:
            raise
        traceback.print_exc()
        _end(1)


@contextlib.contextmanager
def watchdog(folder: epath.PathLike, minutes: float) -> Iterator[Callable[[str], None]]:
    """Ends this process with a sentence if it loses the others, or if it stays in one stage for too long.

    The sentence says at which stage, and for whom it waited.

    Args:
      folder: seen by all processes; each leaves a sign of life in it.
      minutes: that a stage may last. One process alone is not watched.

    Yields:
      (stage) -> None, to be called as each stage begins; all processes go through the same stages.
    """
    if jax.process_count() == 1:
        yield lambda stage: None
        return
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Replaced as a whole, so that the thread never reads half of it.
    now = [(0, "start", time.monotonic())]
    done = threading.Event()

    def begin(stage: str) -> None:
        now[0] = (now[0][0] + 1, stage, time.monotonic())

    def watch() -> None:
        own = folder / f"{jax.process_index()}.json"
        while not done.wait(min(_BEAT, 10 * minutes)):
            number, stage, since = now[0]
            # Every kind of storage has errors of its own, and none of them should end the watch.
            with contextlib.suppress(Exception):
                own.write_text(json.dumps({"number": number, "stage": stage, "time": time.time()}))
            if time.monotonic() - since > 60 * minutes:
                waited = _missing(folder, number)
                print(
                    f"fedjax-peft: process {jax.process_index()} of {jax.process_count()} has been at {stage} for more "
                    f"than {minutes:g} minutes; {waited}",
                    file=sys.stderr,
                )
                return _end(HUNG)

    threading.Thread(target=watch, daemon=True, name="watchdog").start()
    try:
        yield begin
    except jax.errors.JaxRuntimeError as error:
        if not _LOST.search(str(error)):
            raise
        print(
            f"fedjax-peft: process {jax.process_index()} of {jax.process_count()} lost another one at {now[0][1]}; "
            f"started again, all of them go on from the last checkpoint: {str(error).splitlines()[0][:200]}",
            file=sys.stderr,
        )
        _end(HUNG)
    finally:
        done.set()


def _missing(folder, number) -> str:
    """Whom a process waits for that has come to stage `number`."""
    waited = []
    for process in range(jax.process_count()):
        if process == jax.process_index():
            continue
        try:
            sign = json.loads((folder / f"{process}.json").read_text())
        except Exception:
            waited.append(f"process {process} (no sign of life)")
            continue
        age = time.time() - sign["time"]
        if age > _SILENT:
            waited.append(f"process {process} (silent for {age:.0f} s, last at {sign['stage']})")
        elif sign["number"] < number:
            waited.append(f"process {process} (still at {sign['stage']})")
    if not waited:
        return "the others are there as well, so a device or a link between devices does not answer"
    return f"it waits for {', '.join(waited)}"


def _end(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _in_cluster() -> bool:
    """Whether this is one of several processes, as the environment says, or a TPU host, which may be one of several."""
    if _slurm_tasks() > 1 or int(os.environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return True
    on_tpu = importlib.util.find_spec("libtpu") and os.environ.get("JAX_PLATFORMS", "tpu").startswith("tpu")
    return bool(on_tpu) and any(pathlib.Path(path).exists() for path in ("/dev/accel0", "/dev/vfio/0"))


def _slurm_tasks() -> int:
    """Tasks of the job step that this process is one of."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))


@functools.cache
def _line():
    """(a row a process, rows to columns, every row everywhere) over one device of each process."""
    heads = {device.process_index: device for device in reversed(jax.devices())}
    mesh = Mesh(np.array([heads[index] for index in sorted(heads)]), ("processes",))
    split, everywhere = NamedSharding(mesh, P("processes")), NamedSharding(mesh, P())
    swap = jax.jit(lambda rows: rows.swapaxes(0, 1), out_shardings=split)
    return split, swap, jax.jit(lambda rows: rows, out_shardings=everywhere)
