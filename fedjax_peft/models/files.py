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
