"""Weight files on disk."""

import hashlib
import pathlib
from collections.abc import Iterable


def sha256(paths: Iterable[pathlib.Path]) -> str:
    """Hexadecimal SHA-256 of the contents of the files, one after another in the given order."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def on_disk(source: str | pathlib.Path) -> None:
    """Raises ValueError for an address such as gs://BUCKET/PATH: weights are mapped from a disk."""
    if "://" in str(source):
        raise ValueError(
            f"model {str(source)!r} is in an object store: copy it to a disk of every host, or name one of the hub"
        )
