"""Files of installed Python packages, found without importing the package."""

import importlib.metadata
import pathlib


def files(package: str, suffix: str) -> list[pathlib.Path]:
    """Absolute paths of the files of `package` whose path ends in `suffix`, sorted.

    Raises:
      ValueError: the package is not installed, or has no such file.
    """
    try:
        found = importlib.metadata.files(package) or ()
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(f"package {package!r} is not installed: run `pip install {package}`") from None
    paths = sorted(pathlib.Path(file.locate()) for file in found if file.as_posix().endswith(suffix))
    if not paths:
        raise ValueError(f"the installed package {package!r} has no file {suffix!r}; reinstall it")
    return paths
