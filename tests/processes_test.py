"""Several processes are one run, which ends when one of them is missing; their numbers are in algorithms_test.py."""

import json
import pathlib
import subprocess
import threading
import time

import jax
import numpy as np
import pytest
import tiny
from started import ENVIRONMENT, address, finish, start

from fedjax_peft import metrics, processes


def test_flags_that_do_not_fit_are_said_at_once():
    with pytest.raises(ValueError, match="--coordinator is 'host', expected HOST:PORT"):
        processes.connect("host", 2, 0)
    with pytest.raises(ValueError, match="--process is 2, expected 0 to 1"):
        processes.connect("localhost:1", 2, 2)


def test_one_process_hears_itself():
    assert processes.gather({"a": 1}) == [{"a": 1}]
    assert processes.tell(np.array([3, 4])).tolist() == [[3, 4]]


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (None, "it waits for process 0 (no sign of life)"),
        ({"number": 1, "stage": "round 3", "time": 9e9}, "it waits for process 0 (still at round 3)"),
        ({"number": 2, "stage": "round 4", "time": 0.0}, "s, last at round 4)"),
        ({"number": 2, "stage": "round 4", "time": 9e9}, "a device or a link between devices does not answer"),
    ],
)
def test_the_watchdog_names_whom_it_waits_for(other, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    ended = threading.Event()
    code = []
    monkeypatch.setattr(processes, "_end", lambda number: (code.append(number), ended.set()))
    if other is not None:
        (tmp_path / "0.json").write_text(json.dumps(other))
    with processes.watchdog(tmp_path, 1e-4) as begin:
        begin("round 3")
        begin("round 4")
        assert ended.wait(30)
    assert code == [processes.HUNG]
    said = capsys.readouterr().err
    assert "process 1 of 2 has been at round 4 for more than 0.0001 minutes" in said and sentence in said


@pytest.mark.parametrize(("message", "code"), [("Connection closed by peer [127.0.0.1]", 3), ("out of memory", 1)])
def test_a_process_that_is_lost_ends_the_others_with_a_sentence(message, code, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    def end(number):
        raise SystemExit(number)

    monkeypatch.setattr(processes, "_end", end)
    with pytest.raises(SystemExit) as ended, processes.together(), processes.watchdog(tmp_path, 1) as begin:
        begin("round 7")
        raise jax.errors.JaxRuntimeError(f"UNKNOWN: Gloo all-reduce failed: {message}")
    said = capsys.readouterr().err
    assert ended.value.code == code and ("lost another one at round 7" in said) == (code == processes.HUNG)
    assert ("Traceback" in said) == (code == 1)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> pathlib.Path:
    return tiny.write_config(tmp_path_factory.mktemp("experiment"))


OVERRIDES = {"rounds": 3, "widths": 1, "evaluate.every": 3, "optimizer.name": "sgd", "run.chunk": 1}


def run(config, workdir, *arguments: str, **environment: str) -> subprocess.Popen:
    """One process of a run, stateful clients and all, through the command line."""
    overrides = [f"--config.{key}={value}" for key, value in OVERRIDES.items()]
    command = ["-m", "fedjax_peft.main", "run", f"--config={config}", f"--workdir={workdir}"]
    return start(*command, *overrides, *arguments, **environment)


def run_pair(config, workdir) -> list[subprocess.Popen]:
    place = address()
    flags = [f"--coordinator={place}", "--processes=2", "--config.run.watchdog_minutes=1"]
    return [run(config, workdir, *flags, f"--process={index}") for index in range(2)]


def test_a_pair_of_which_one_is_killed_goes_on_and_ends_as_one_process(config, tmp_path):
    four = ENVIRONMENT["XLA_FLAGS"].replace("count=2", "count=4")
    finish([run(config, tmp_path / "one", XLA_FLAGS=four)])
    started = run_pair(config, tmp_path / "two")
    while not (tmp_path / "two" / "checkpoints" / "1").exists():
        assert all(process.poll() is None for process in started), [process.communicate()[0] for process in started]
        time.sleep(0.01)
    started[1].kill()
    said = [process.communicate()[0] for process in started]
    assert started[0].returncode not in (0, 2), said[0]
    assert not (tmp_path / "two" / "summary.json").exists()
    finish(run_pair(config, tmp_path / "two"))
    one, two = (metrics.read_lines(tmp_path / name / "rounds.jsonl") for name in ("one", "two"))
    speed = {"seconds", "tokens_per_second", "peak_bytes"}
    assert_near(*([{key: line[key] for key in line if key not in speed} for line in lines] for lines in (one, two)))
    assert_near(*(metrics.read_rows(tmp_path / name / "clients.parquet") for name in ("one", "two")))
    assert_near(*(metrics.read_json(tmp_path / name / "summary.json") for name in ("one", "two")))


def assert_near(one, other) -> None:
    """The same, numbers to 1e-6."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert x == y if isinstance(x, str) else x == pytest.approx(y, rel=1e-6, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize(
    ("environment", "flags", "expected"),
    [
        # One task on each of two hosts: it has all devices of its host.
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}, ("a:1", None, None), ("a:1", 2, 1, "deactivate")),
        ({"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NUM_NODES": "2"}, ("a:1", None, None), ("a:1", 16, 1, None)),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}, (None,) * 3, (None, None, None, None)),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, (None,) * 3, (None, None, None, None)),
        ({}, ("auto", None, None), (None, None, None, None)),
        ({}, ("a:1", 3, 2), ("a:1", 3, 2, "deactivate")),
        ({}, (None,) * 3, None),
    ],
)
def test_what_flags_leave_out_is_left_to_the_environment(environment, flags, expected, monkeypatch):
    asked = []
    for name, value in ({"SLURM_PROCID": "1"} | environment).items():
        monkeypatch.setenv(name, value)
    for function in ("config.update", "distributed.initialize"):
        monkeypatch.setattr(f"jax.{function}", lambda *given, **named: asked.append((*given, *named.values())))
    monkeypatch.setattr(processes.signal, "signal", lambda *given: None)
    processes.connect(*flags, timeout=7)
    assert asked[1:] == ([] if expected is None else [(*expected, 7)])
