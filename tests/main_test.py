import runpy
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
        (
            ["generate", "--workdir=here", "--client=0", "--prompt=a", "--top_p=0.9"],
            "--top_p is 0.9, but nothing is drawn with --temperature=0",
        ),
    ],
)
def test_mistakes(arguments, sentence, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fedjax-peft", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main.main()
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


def test_a_mistake_in_a_config_file_is_one_line_that_says_where(tmp_path, monkeypatch, capsys):
    (tmp_path / "wrong.py").write_text("def get_config():\n    return {}['rounds'] + 1 / 0\n")
    (tmp_path / "wronger.py").write_text(
        "from ml_collections import ConfigDict\n\nget_config = lambda: ConfigDict({'a.b': 1})\n"
    )
    for name, sentence in (("wrong", "does not know rounds"), ("wronger", "line 3: ValueError: ConfigDict does not")):
        monkeypatch.setattr(sys, "argv", ["fedjax-peft", "run", f"--config={tmp_path}/{name}.py", "--workdir=here"])
        with pytest.raises(SystemExit) as stopped:
            main.main()
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and sentence in said and said.count("\n") == 1


def test_a_mistake_in_a_file_of_ones_own_says_where(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text("def mine():\n    int('x')\n")
    monkeypatch.setitem(main.COMMANDS, "report", lambda _: runpy.run_path(f"{tmp_path}/mine.py")["mine"]())
    monkeypatch.setattr(sys, "argv", ["fedjax-peft", "report"])
    with pytest.raises(SystemExit) as stopped:
        main.main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.endswith(f"'x' ({tmp_path}/mine.py, line 2)\n")


def test_arguments_of_functions_are_given_by_flag(tmp_path, monkeypatch):
    (tmp_path / "config.py").write_text("from fedjax_peft.config import default_config as get_config\n")

    def config(*told):
        arguments = [f"--config={tmp_path}/config.py", *(f"--config.{one}" for one in told)]
        monkeypatch.setattr(sys, "argv", ["fedjax-peft", "run", *arguments])
        return main._flags(arguments, {}).config

    found = config("algorithm.name=pf2lora", "algorithm.client_rank=3", "data.source=mine", "rounds=2")
    assert found.algorithm.to_dict() == {"name": "pf2lora", "client_rank": 3}
    assert found.data.source == "mine" and found.rounds == 2
    with pytest.raises(ValueError, match="config.rounds"):
        config("rounds=many")


def test_none_is_said_as_none(tmp_path, monkeypatch):
    text = "from fedjax_peft.config import default_config\n\n\ndef get_config():\n    config = default_config()\n"
    text += "    config.data.test = 'test'\n    config.model.pool = 'mean'\n    return config\n"
    (tmp_path / "config.py").write_text(text)
    told = ("data.test=None", "data.group=None", "model.pool=None", "train.steps=None", "data.label=Nonesuch")
    arguments = [f"--config={tmp_path}/config.py", *(f"--config.{one}" for one in told)]
    monkeypatch.setattr(sys, "argv", ["fedjax-peft", "run", *arguments])
    found = main._flags(arguments, {}).config
    assert [found.data.test, found.data.group, found.model.pool, found.train.steps] == [None] * 4
    assert found.data.label == "Nonesuch"
    monkeypatch.setattr(sys, "argv", ["fedjax-peft", "run", *arguments, "--config.dta.test=None"])
    with pytest.raises(ValueError, match="the config does not know 'dta'"):
        main._flags([*arguments, "--config.dta.test=None"], {})
