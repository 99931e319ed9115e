"""Object stores without a network: files are written whole, nothing is added to one, and none has a descriptor."""

import contextlib
from collections.abc import Iterator

import fsspec.implementations.memory
import pytest
from etils.epath import backend

BUCKET = "gs://bucket"


class Objects(fsspec.implementations.memory.MemoryFileSystem):
    """What gcsfs does, in memory: folders exist as long as objects are in them, and adding to an object replaces it."""

    store: dict = {}
    pseudo_dirs: list = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs:/"))

    def _open(self, path, mode="rb", **settings):
        return super()._open(path, mode.replace("a", "w"), **settings)


@contextlib.contextmanager
def in_memory() -> Iterator[str]:
    """Within, gs:// is a bucket in this process, for all that goes through epath."""
    files = Objects(skip_instance_cache=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend.fsspec_backend, "fs", lambda path: files)
        patch.setattr(Objects, "store", {})
        patch.setattr(Objects, "pseudo_dirs", ["", "/bucket"])
        yield BUCKET
