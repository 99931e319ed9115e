"""How many clients a device should work on at once, found by trying."""

import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from etils import epath

from fedjax_peft import metrics, processes

logger = logging.getLogger(__name__)


def candidates(clients_per_device: int) -> list[int]:
    """Powers of two up to the first that holds all clients of a device."""
    sizes = [1]
    while sizes[-1] < clients_per_device:
        sizes.append(2 * sizes[-1])
    return sizes


def choose(
    workdir: epath.PathLike, sizes: Sequence[int], prepare: Callable[[int], tuple[Any, Callable[[], tuple]]]
) -> int:
    """The chunk with the fastest round among those that fit, measured once per run directory and kind of devices.

    A chunk changes results by rounding, so the choice is written to chunk.json and a resumed run keeps to it, unless it
    goes on with other devices or another number of them. All processes come to the same one, that of the slowest.

    Args:
      workdir: run directory.
      sizes: chunks to try, ascending; stops at the first that does not fit or is clearly slower than the best.
      prepare: chunk -> (jitted round, function that makes its arguments, new ones for each call: they are donated).
    """
    path = epath.Path(workdir) / "chunk.json"
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    known = metrics.read_json(path) or {}
    if "chunk" in known:  # as older releases wrote it, without the devices
        known = {devices: known}
    if devices in known:
        return known[devices]["chunk"]
    seconds: dict[int, float] = {}
    for size in sizes:
        step, arguments = prepare(size)
        compiled = step.lower(*arguments()).compile()
        needed, free = _bytes(compiled.memory_analysis()), _free_bytes()
        if any(processes.gather(needed > free)):
            logger.info("chunk %d needs %.1f GB of %.1f GB: too much", size, needed / 1e9, free / 1e9)
            break
        seconds[size] = max(processes.gather(min(_seconds(compiled, arguments()) for _ in range(2))))
        logger.info("chunk %d: %.2f s a round, %.1f GB", size, seconds[size], needed / 1e9)
        if seconds[size] > 1.2 * min(seconds.values()):
            break
    if not seconds:
        raise ValueError(f"not even {sizes[0]} clients at a time fit into memory; use a smaller batch or width")
    best = min(seconds, key=seconds.get)
    own = {"chunk": best, "seconds": {str(size): value for size, value in seconds.items()}}
    metrics.write_json(path, known | {devices: own})
    return best


def _seconds(compiled: Any, arguments: tuple) -> float:
    jax.block_until_ready(arguments)
    start = time.perf_counter()
    jax.block_until_ready(compiled(*arguments))
    return time.perf_counter() - start


def _bytes(analysis: Any) -> int:
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes


def _free_bytes() -> int:
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
