import pytest

from fedjax_peft import packages


def test_files_are_found_by_their_ending():
    (path,) = packages.files("pytest", "pytest/__main__.py")
    assert path.is_absolute() and path.read_text()


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="'no-such-package' is not installed: run `pip install no-such-package`"):
        packages.files("no-such-package", ".json")
    with pytest.raises(ValueError, match="'pytest' has no file 'model.safetensors'"):
        packages.files("pytest", "model.safetensors")
