"""Everything a run needs to go on, written atomically by Orbax.

A checkpoint is one step of an Orbax manager; a step that was not finished is never listed, and a step that cannot be
read is passed over with a warning.
"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import orbax.checkpoint as ocp
from etils import epath

from fedjax_peft import processes
from fedjax_peft.types import PyTree

logger = logging.getLogger(__name__)


class Restored(NamedTuple):
    round: int  # rounds that were finished
    state: PyTree


def manager(workdir: str, keep: int = 2) -> Any:
    """The Orbax manager of a run directory; keeps the newest `keep` checkpoints."""
    folder = epath.Path(workdir) / "checkpoints"
    # Orbax wants a local folder from the root on; `resolve` takes gs:// for the name of one.
    folder = folder if "://" in str(folder) else folder.resolve()
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=True, enable_async_checkpointing=False, cleanup_tmp_directories=True
    )
    return ocp.CheckpointManager(folder, options=options)


def save(checkpoints: Any, round_index: int, state: PyTree) -> None:
    """Writes the state after `round_index` rounds. `state` is a pytree of arrays on the host or the device."""
    if round_index in checkpoints.all_steps():
        checkpoints.delete(round_index)  # one that could not be read
    checkpoints.save(round_index, args=ocp.args.StandardSave(state), force=True)


def restore(
    checkpoints: Any, target: PyTree, further: Callable[[Restored], None] = lambda restored: None
) -> Restored | None:
    """The newest checkpoint that can be read, by all processes, or None if there are none.

    Args:
      target: a pytree like the one saved, of arrays or of shapes with shardings; it may lie on other devices.
      further: reads what the checkpoint has elsewhere, and raises if it cannot.

    Raises:
      ValueError: there are checkpoints, but none of them can be read.
    """
    steps = processes.gather(sorted(checkpoints.all_steps(), reverse=True))[0]
    for step in steps:
        restored, reason = None, None
        try:
            restored = Restored(step, checkpoints.restore(step, args=ocp.args.StandardRestore(target)))
            further(restored)
        except Exception as error:  # Orbax raises whatever its storage driver raised on broken bytes.
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        reasons = [one for one in processes.gather(reason) if one is not None]
        if not reasons:
            return restored
        logger.warning("checkpoint of round %d cannot be read (%s); going back to the one before", step, reasons[0])
    if steps:
        # Nothing is deleted: what this version cannot read another one may.
        place = checkpoints.directory
        raise ValueError(f"none of the {len(steps)} checkpoints in {place} can be read; move them away to start again")
    return None
