"""Accelerators that a run can be planned for: TPU slices that need not exist, and the devices of this machine.

Peaks, memory and links of TPUs are those of Google's product pages (cloud.google.com/tpu/docs, one page a
generation), memory less what the compiler keeps for itself. Clocks follow from the peak and the products that the
matrix units of a chip do in a cycle.
"""

import importlib.util
import math
import os
import re
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

_GIB = 1 << 30


class Chip(NamedTuple):
    """What one chip can do at best; None where it is not known."""

    memory: float  # bytes that a program may use
    peak: float | None = None  # FLOPs per second, bfloat16
    network: float | None = None  # bytes per second to and from neighbours, all links together, each way
    clock: float | None = None  # cycles per second, as the compiler's estimates count them


TPUS = {
    "v4": Chip(30.75 * _GIB, 275e12, 300e9, 1.05e9),
    "v5e": Chip(15.75 * _GIB, 197e12, 200e9, 1.5e9),
    "v5p": Chip(95.74 * _GIB, 459e12, 600e9, 1.75e9),
    "v6e": Chip(31.25 * _GIB, 918e12, 400e9, 1.75e9),
}
_AXES = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2}
_GPUS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "V100": 125e12, "T4": 65e12}
"""Dense bfloat16 (float16 where there is none) from NVIDIA's data sheets, by a part of the device's name."""
LOCAL = ("gpu", "cpu", "tpu")


class Topology(NamedTuple):
    """Devices to compile for."""

    name: str
    chip: Chip
    devices: Sequence[Any]


def find(name: str) -> Topology:
    """The topology of a name.

    Args:
      name: `GENERATION:AxB` or `:AxBxC`, e.g. `v5e:16x16`, `v5p:4x4x4`: chips along each axis of a TPU slice, which is
        described by the package libtpu without any TPU; or `gpu`, `cpu`, `tpu`: the devices of this machine.

    Raises:
      ValueError: an unknown name or a shape that does not exist, libtpu that is missing, or no such device here.
    """
    if name in LOCAL:
        return _local(name)
    parts = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if parts is None or parts[1] not in TPUS:
        known = ", ".join([f"{kind}:{'x'.join('4' * axes)}" for kind, axes in _AXES.items()])
        raise ValueError(f"topology is {name!r}, expected chips along each axis as in {known}, or {', '.join(LOCAL)}")
    kind, sizes = parts[1], [int(size) for size in parts[2].split("x")]
    if len(sizes) != _AXES[kind]:
        raise ValueError(f"topology {name} has {len(sizes)} axes, but a {kind} slice has {_AXES[kind]}")
    return Topology(name, TPUS[kind], _described(name, kind, sizes))


def _described(name: str, kind: str, sizes: list[int]) -> Sequence[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(f"topology {name} needs the package libtpu: run pip install 'fedjax_peft[tpu]'")
    # libtpu otherwise asks the cloud where it runs, and complains on machines that are not there.
    absent = {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_SKIP_MDS_QUERY": "1"}
    # No chip is touched, so nothing needs to be locked.
    for variable, value in (absent | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}).items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    # One process a chip where hosts of 2 x 2 chips do not fit; a v4 chip is one device if its cores work as one.
    settings: dict[str, Any] = {"chip_config_name": "megacore"} if kind == "v4" else {}
    if any(size % 2 for size in sizes[:2]):
        settings["chips_per_host_bounds"] = (1, 1, 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            devices = topologies.get_topology_desc(name, "tpu", **settings).devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"topology {name} cannot be described: {' '.join(str(error).split())}") from None
    if len(devices) != math.prod(sizes):
        raise ValueError(f"topology {name} came out as {len(devices)} devices, expected {math.prod(sizes)}")
    return devices


def _local(name: str) -> Topology:
    try:
        devices = jax.local_devices(backend=name)
    except RuntimeError:
        raise ValueError(f"topology is {name!r}, but this machine has no such device") from None
    stats = devices[0].memory_stats() or {}
    memory = stats.get("bytes_limit") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / len(devices)
    kind = devices[0].device_kind
    peak = next((peak for part, peak in _GPUS.items() if part in kind), None)
    return Topology(f"{name}:{len(devices)} ({kind})", Chip(memory, peak), devices)
