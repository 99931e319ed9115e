"""The states of a population on disk, for checkpoints that cost what changed and not what the population costs.

A segment is what one checkpoint adds: the states that changed since the one before, a file a process, written once and
never changed. So a kill leaves all finished checkpoints as they were. A segment of which less than half is still
current has the rest of it written again with a later one; it goes when no checkpoint that is kept needs it. Any number
of processes can read what any other number wrote.
"""

import contextlib
import io
import os

import numpy as np
from etils import epath

from fedjax_peft import metrics, population, processes
from fedjax_peft.population import Population


def write(people: Population, folder: epath.PathLike, round_index: int) -> None:
    """Adds the segment of a checkpoint after `round_index` rounds; all processes must call it."""
    folder = epath.Path(folder)
    changed = people.changed | _worth_moving(people)
    ids = np.flatnonzero(changed)
    if processes.first():
        folder.mkdir(parents=True, exist_ok=True)
        for old in _files(folder, _name(round_index)):
            old.unlink()  # of a checkpoint that was never finished
    processes.gather(None)
    index, count = processes.place()
    own = ids[ids % count == index]
    _write_file(people, folder / f"{_name(round_index)}-{index:05d}-of-{count:05d}", own)
    people.written[ids] = round_index
    people.changed[:] = False
    people.segments[round_index] = len(ids)
    current = set(np.unique(people.written).tolist())
    for empty in set(people.segments) - current:
        del people.segments[empty]
    metrics.write_json(folder / f"{_name(round_index)}.json", {str(key): size for key, size in people.segments.items()})
    processes.gather(None)


def read(people: Population, folder: epath.PathLike, round_index: int, written: np.ndarray, known: np.ndarray) -> None:
    """Fills a population with the states of a checkpoint.

    Args:
      written: [N] int32, the round in whose segment each client's state is; -1 for none.
      known: [N] bool, who has a state.

    Raises:
      OSError, ValueError: a segment is missing or broken.
    """
    folder = epath.Path(folder)
    people.known[:], people.written[:], people.changed[:] = known, written, False
    people.segments.clear()
    sizes = metrics.read_json(folder / f"{_name(round_index)}.json") or {}
    people.segments.update({int(key): size for key, size in sizes.items()})
    index, count = processes.place()
    for segment in np.unique(written[written >= 0]).tolist():
        files = [path for path in _files(folder, f"{_name(segment)}-") if path.suffix != ".tmp"]
        parts = int(files[0].name.rpartition("-")[2]) if files else 0
        if not parts or len(files) != parts:
            raise ValueError(f"segment {segment} of {folder} has {len(files)} of {parts} files")
        # What the same number of processes wrote is divided alike.
        for path in files if parts != count else files[index : index + 1]:
            _read_file(people, path, lambda ids, at=segment: (written[ids] == at) & (ids % count == index))


def prune(folder: epath.PathLike, kept: list[int]) -> None:
    """Deletes the segments that none of the checkpoints `kept` needs."""
    folder = epath.Path(folder)
    if not processes.first() or not folder.exists():
        return
    lists = {step: metrics.read_json(folder / f"{_name(step)}.json") for step in kept}
    if any(needed is None for needed in lists.values()):
        return
    needed = {_name(int(segment)) for segments in lists.values() for segment in segments}
    steps = {_name(step) for step in kept}
    for path in _files(folder, ""):
        own = path.name.split("-")[0].split(".")[0]
        if own not in (steps if path.name.endswith(".json") else needed):
            path.unlink()


def _worth_moving(people: Population) -> np.ndarray:
    """[N] unchanged states of segments that are mostly out of date, the oldest first, no more than changed ones."""
    moved, left = np.zeros_like(people.changed), int(people.changed.sum())
    for segment, size in sorted(people.segments.items()):
        current = (people.written == segment) & ~people.changed
        count = int(current.sum())
        if count <= min(size // 2, left):
            moved |= current
            left -= count
    return moved


def _write_file(people, path, ids):
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        np.save(file, ids)
        for client in ids:
            file.write(population.pack(population.take(people, np.array([client]))).tobytes())
        file.flush()
        # Files of object stores have no descriptor: theirs are kept once they are closed.
        with contextlib.suppress(io.UnsupportedOperation):
            os.fsync(file.fileno())
    temporary.replace(path)


def _read_file(people, path, wanted):
    like = population.take(people, np.zeros(1, np.int64))
    width = population.pack(like).shape[1]
    with path.open("rb") as file:
        ids = np.load(file)
        start = file.tell()
        for row in np.flatnonzero(wanted(ids)).tolist():
            file.seek(start + row * width)
            state = np.frombuffer(file.read(width), np.uint8)
            population.put(people, ids[row : row + 1], population.unpack(state.reshape(1, width), like))


def _files(folder: epath.Path, start: str) -> list[epath.Path]:
    # A glob would read brackets in the names of folders as patterns.
    return sorted(path for path in folder.iterdir() if path.name.startswith(start)) if folder.is_dir() else []


def _name(round_index: int) -> str:
    return f"{round_index:08d}"
