"""A user's mistakes: each ends with one clear sentence and exit code 2, before anything is compiled."""

import json
import sys

import pytest
import tiny

from fedjax_peft import main


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny.write_config(tmp_path_factory.mktemp("experiment"))


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Runs the command line in this process: (arguments) -> (exit code, what it said on standard error)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fedjax-peft", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main.main()
        return stopped.value.code, capsys.readouterr().err

    return run


CASES = {
    "unknown key": (["--config.adapter.rnk=4"], "rnk"),
    "wrong type": (["--config.adapter.rank=two"], "two"),
    "no flag": (["--rank=4"], "rank"),
    "rank 0": (["--config.adapter.rank=0"], "adapter.rank is 0, expected 1 to 16"),
    "rank above the site": (["--config.adapter.rank=17"], "adapter.rank is 17, expected 1 to 16"),
    "target without a site": (["--config.adapter.targets=query,q_proj"], "'q_proj' matches no site"),
    "broken expression": (["--config.adapter.targets=(query"], "no regular expression"),
    "cohort above the pool": (["--config.cohort=17"], "cohort of 17 clients cannot be drawn from a pool of 16"),
    "mesh that does not divide": (["--config.run.mesh.model=3"], "run.mesh.model is 3, which does not divide"),
    "mesh too large": (["--config.run.mesh.clients=64"], "asks for 64 x 1 devices"),
    "no such model": (["--config.model.source=/nowhere/model"], "no tokenizer found at '/nowhere/model'"),
    "no such algorithm": (["--config.algorithm.name=fedavgg"], "algorithm.name is 'fedavgg', expected one of"),
    "no such weighting": (["--config.algorithm.weighting=sizes"], "algorithm.weighting is 'sizes'"),
    "no such server optimizer": (["--config.server.name=lamb"], "'lamb'"),
    "no such client optimizer": (["--config.optimizer.name=lamb"], "optimizer.name is 'lamb'"),
    "no such schedule": (["--config.schedule.name=step"], "schedule.name is 'step'"),
    "learning rate 0": (["--config.optimizer.learning_rate=0.0"], "optimizer.learning_rate is 0.0"),
    "clip that turns around": (["--config.optimizer.clip=-1.0"], "optimizer.clip is -1.0, expected a positive number"),
    "weights that grow": (["--config.optimizer.weight_decay=-0.1"], "optimizer.weight_decay is -0.1, expected 0 or"),
    "no moment": (["--config.optimizer.b2=1.0"], "optimizer.b2 is 1.0, expected at least 0 and below 1"),
    "server that goes back": (["--config.server.learning_rate=-1.0"], "server.learning_rate is -1.0, expected a posit"),
    "wrong type of an argument": (["--config.data.min_rows=many"], "data.min_rows is 'many', expected a whole number"),
    "misspelt setting of a partition": (
        [
            "--config.data.name=table",
            "--config.data.source=here",
            "--config.data.text=text",
            "--config.data.partition={'name': 'dirichlet', 'clients': 2, 'seed': 0, 'alhpa': 1.0}",
        ],
        "data.partition.alhpa is not a setting of dirichlet; is alpha meant?",
    ),
    "None where there must be something": (["--config.rounds=None"], "rounds is None, expected something like 10"),
    "no such data": (["--config.data.name=mnist"], "data.name is 'mnist', expected one of"),
    "steps and epochs": (["--config.train.epochs=1"], "either steps or epochs"),
    "drop-out rate": (["--config.dropout_rate=1.5"], "1.5"),
    "no batch": (["--config.train.batch=0"], "batch"),
    "no rounds": (["--config.rounds=-1"], "rounds is -1"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_in_the_config(name, config, command, tmp_path):
    overrides, sentence = CASES[name]
    code, said = command("run", f"--config={config}", f"--workdir={tmp_path / 'run'}", *overrides)
    assert code == 2
    assert sentence in said
    assert said.count("\n") == 1 and said.startswith("fedjax-peft: ")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_missing_files_and_flags(config, command, tmp_path):
    code, said = command("run", "--config=/nowhere.py", f"--workdir={tmp_path}")
    assert code == 2 and "/nowhere.py" in said and "Traceback" not in said
    code, said = command("run", f"--config={config}")
    assert code == 2 and "--workdir is missing" in said
    code, said = command("dance")
    assert code == 2 and "usage" in said


FILES = {
    "line 2: NameError: name 'wrong' is not defined": "def get_config():\n    return wrong\n",
    "line 1: ModuleNotFoundError: No module named 'wrong'": "import wrong\n",
    "line 1: SyntaxError": "def get_config(:\n",
    "line 2: ValueError: no such size": "def get_config():\n    raise ValueError('no such size')\n",
    "get_config of --config gives a dict, expected experiment": "def get_config():\n    return {'rounds': 1}\n",
    "get_config of --config gives a list, expected experiment": "def get_config():\n    return [1]\n",
    "--config gives nothing: does get_config return its config?": "def get_config():\n    pass\n",
    "has no attribute 'get_config'": "rounds = 1\n",
}


@pytest.mark.parametrize("sentence", FILES)
def test_a_mistake_in_the_file_of_a_config(sentence, command, tmp_path, monkeypatch):
    """Launchers start a run again that ends with another code."""
    # What an earlier file of this process defined would still be there.
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    (tmp_path / "mine.py").write_text(FILES[sentence])
    code, said = command("run", f"--config={tmp_path / 'mine.py'}", f"--workdir={tmp_path / 'run'}")
    assert code == 2 and sentence in said
    assert said.count("\n") == 1 and said.startswith("fedjax-peft: ")


def test_weights_that_do_not_fit_are_all_named(command, tmp_path):
    config = tiny.write_config(tmp_path)
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 3}))
    code, said = command("run", f"--config={config}", f"--workdir={tmp_path / 'run'}")
    assert code == 2
    assert "encoder/layer/2/attention/self/query/kernel" in said and "encoder/layer/2/output/LayerNorm" in said


def test_a_broken_header(command, tmp_path):
    config = tiny.write_config(tmp_path)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"\xff" * 64)
    code, said = command("run", f"--config={config}", f"--workdir={tmp_path / 'run'}")
    assert code == 2 and "model.safetensors" in said and "Traceback" not in said
