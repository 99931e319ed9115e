import sys

import pytest

from fedjax_peft import main


@pytest.mark.parametrize("arguments", [[], ["help"], ["--help"], ["run", "--help"]])
def test_help(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fedjax-peft", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main.main()
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert all(f"\n  {command} " in said for command in main.COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["dance"], "there is no command 'dance'"),
        (["report"], "report needs one or more run directories"),
        (["report", "/nowhere"], "workdir /nowhere has no finished run"),
        (["bench", "--clients=none"], "--clients=none is not understood"),
        (["run", "--workdir=here"], "--config is missing"),
    ],
)
def test_mistakes(arguments, sentence, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fedjax-peft", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main.main()
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err
