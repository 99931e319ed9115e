"""What makes a run repeatable and keeps a run directory to one experiment: manifest.json."""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from fedjax_peft import metrics
from fedjax_peft.config import complete

PACKAGES = (
    "fedjax_peft",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "tokenizers",
    "ml-collections",
)
LOCATIONS = ("data.source", "data.cache", "model.source")
"""Keys of a config that may differ where a run goes on, as on another machine, if what lies there is the same."""


def read(workdir: epath.PathLike) -> dict[str, Any] | None:
    """The manifest of a run directory, keys that came after it was written at their defaults; None without one."""
    found = metrics.read_json(epath.Path(workdir) / "manifest.json")
    if found is None or "study" in found["experiment"]:
        return found
    settings = complete(found["experiment"] | {"run": found.get("run", {})})
    return found | {"run": settings.pop("run"), "experiment": settings}


def of_clients(workdir: epath.PathLike) -> dict[str, Any]:
    """`read` of a run that has clients. Raises ValueError for a directory without one."""
    found = read(workdir)
    if found is None or "study" in found["experiment"]:
        raise ValueError(f"workdir {workdir} has no run whose clients could be asked")
    return found


def check(
    workdir: epath.PathLike,
    experiment: Mapping[str, Any],
    hashes: Mapping[str, str] | None = None,
    unset: Mapping[str, Any] | None = None,
) -> None:
    """Raises ValueError with the keys that differ if the run directory holds another experiment.

    Args:
      experiment: the config without what only changes speed.
      hashes: SHA-256 of the base and of the data; None before they are read.
      unset: arguments that the config leaves at the defaults of this release, or None not to compare them.
    """
    manifest = read(workdir)
    if manifest is None:
        return
    old, new = _flat(manifest["experiment"]), _flat(experiment)
    for key in LOCATIONS:  # what was read there is in the hashes
        if key in old and key in new:
            del old[key], new[key]
    if hashes is not None:
        known = manifest["sha256"]
        # Older releases hashed less.
        own = {name: sha256 for name, sha256 in hashes.items() if name in known}
        old, new = old | _flat({"sha256": known}), new | _flat({"sha256": own})
    # An argument that only one of two releases has is at the value that it has without it.
    then, now = _flat(manifest.get("unset", {})), _flat(unset or {})
    for key in then.keys() & now.keys():
        old[key], new[key] = then[key], now[key]
    changes = [
        f"{key} was {old.get(key)!r} and is {new.get(key)!r}"
        for key in sorted(old | new)
        if old.get(key) != new.get(key)
    ]
    if changes:
        raise ValueError(f"workdir {workdir} holds another experiment: {'; '.join(changes)}; choose another workdir")


def write(
    workdir: epath.PathLike,
    experiment: Mapping[str, Any],
    run: Mapping[str, Any],
    *,
    hashes: Mapping[str, str],
    mesh: jax.sharding.Mesh,
    sizes: Mapping[str, Any],
    unset: Mapping[str, Any] | None = None,
) -> None:
    """Writes the manifest: config, seed, commit, versions, devices, mesh, sizes and hashes of base weights and data.

    What the config leaves at the defaults of functions, `unset`, is written too: another release may have others.

    A run that goes on keeps what is written of its start, but for where data and weights lie, and adds the command, the
    versions and the devices of each further one under `resumed`.
    """
    workdir = epath.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    start = {"command": sys.argv, **environment(), "mesh": dict(mesh.shape)}
    content = metrics.read_json(workdir / "manifest.json")
    if content is None:
        content = {
            "experiment": experiment,
            "unset": unset or {},
            "run": run,
            "sha256": hashes,
            "sizes": sizes,
            **start,
        }
    else:
        # Whoever asks a client of this run later looks where data and weights are now.
        for section, name in (key.split(".") for key in LOCATIONS):
            if name in experiment.get(section, ()) and name in content["experiment"].get(section, ()):
                content["experiment"][section][name] = experiment[section][name]
        content["run"] = run
        if not (workdir / "summary.json").exists():
            content["resumed"] = [*content.get("resumed", ()), start]
    metrics.write_json(workdir / "manifest.json", content)


def digest(tree: Any) -> str:
    """SHA-256 of the arrays of a tree."""
    whole = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.ascontiguousarray(leaf)
        whole.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        whole.update(array.tobytes())
    return whole.hexdigest()


def environment() -> dict[str, Any]:
    """Commit, versions and devices."""
    return {
        "commit": _commit(),
        "python": sys.version.split()[0],
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "devices": [f"{device.platform}: {device.device_kind}" for device in jax.devices()],
        "host": {"machine": platform.machine(), "cores": len(os.sched_getaffinity(0))},
    }


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty"]
    # Hosts and images may have the files without their history, and no git.
    if told := os.environ.get("FEDJAX_PEFT_COMMIT"):
        return told
    try:
        folder = epath.Path(__file__).parent
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return result.stdout.strip() or None


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat
