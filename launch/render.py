"""One description of a job as a local start, a SLURM script, a script for TPU VMs, or a JobSet for GKE.

    python launch/render.py TARGET JOB.toml [ACTION] [--dry-run]

`launch/jobs/TARGET.toml` lists all keys and actions of a target. Needs Python 3.11 and nothing else, so that a login
node will do.
"""

import argparse
import json
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

HERE = pathlib.Path(__file__).parent
GRACE = 180
"""Seconds between the wish to stop and the end, for a checkpoint."""
TARGETS = {
    "local": ("local.sh", ("start",)),
    "slurm": ("slurm.sh", ("submit",)),
    "tpu_vm": ("tpu_vm.sh", ("create", "install", "run", "keep", "logs", "delete")),
    "gke": ("gke.yaml", ("apply", "delete")),
}
"""{target: (template, actions)}."""
KEYS: dict[str, dict[str, type]] = {
    "job": {"name": str, "config": str, "flags": list, "workdir": str, "restarts": int, "port": int, "secrets": list},
    "variables": {},  # any name
    "hardware": {"kind": str, "hosts": int, "devices": int},
    "local": {"processes": int},
    "slurm": {
        **{"environment": str, "tasks": int, "cpus": int, "memory": str, "hours": int, "logs": str},
        "options": list,
    },
    "tpu_vm": {"project": str, "zone": str, "accelerator": str, "runtime": str, "spot": bool, "install": str},
    "gke": {"image": str, "queue": str, "selector": dict, "spot": bool},
}
LEAST = {"restarts": 0, "port": 1024, "hosts": 1, "devices": 1, "processes": 1, "tasks": 1, "cpus": 1, "hours": 1}


def read(path: str | pathlib.Path, target: str) -> dict[str, Any]:
    """The description of a job, checked as far as `target` needs it: {key: value} with a table for each section.

    Raises:
      ValueError: a file that is no TOML, a key that is missing, unknown or of another kind, or values that do not fit.
    """
    try:
        job = tomllib.loads(pathlib.Path(path).read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path} is no readable TOML file: {error}") from None
    top = {key: value for key, value in job.items() if not isinstance(value, dict)}
    unknown = [key for key, value in job.items() if isinstance(value, dict) and key not in KEYS]
    if unknown:
        raise ValueError(f"{path} has a section {unknown[0]}, expected {', '.join(list(KEYS)[1:])}")
    for section in ("job", "hardware", target):
        _check(section, top if section == "job" else job.get(section, {}))
    job.setdefault("variables", {})
    _check_sense(job, target)
    _check_variables(job)
    return job


def render(target: str, job: Mapping[str, Any]) -> str:
    """The script or manifest of a target."""
    values = _values(target, job)
    template = (HERE / TARGETS[target][0]).read_text()
    return re.sub(r"@([A-Z]+)@", lambda found: values[found[1]], template)


def main(arguments: Sequence[str]) -> int:
    """Renders and starts, or with --dry-run prints; returns the exit code."""
    parser = argparse.ArgumentParser(prog="render.py", description=__doc__.partition("\n")[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("job", help="see launch/jobs/")
    parser.add_argument(
        "action", nargs="?", help="; ".join(f"{name}: {', '.join(TARGETS[name][1])}" for name in TARGETS)
    )
    parser.add_argument("--dry-run", action="store_true", help="print and start nothing")
    given = parser.parse_args(arguments)
    actions = TARGETS[given.target][1]
    try:
        text = render(given.target, read(given.job, given.target))
        if not given.dry_run and given.action not in actions:
            raise ValueError(f"the action is {given.action!r}, expected {' or '.join(actions)}, or --dry-run")
    except ValueError as error:
        print(f"render.py: {error}", file=sys.stderr)
        return 2
    if given.dry_run:
        print(text, end="")
        return 0
    return _start(given.target, given.action, text)


def _start(target: str, action: str, text: str) -> int:
    if target in ("slurm", "gke"):
        command = ["sbatch"] if target == "slurm" else ["kubectl", action, "-f", "-"]
        return subprocess.run(command, input=text, text=True, check=False).returncode
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as script:
        script.write(text)
        script.flush()
        child = subprocess.Popen(["bash", script.name, action])
        try:
            return child.wait()
        except KeyboardInterrupt:  # which the script has heard too
            return child.wait()


def _values(target: str, job: Mapping[str, Any]) -> dict[str, str]:
    """What stands in the place of each @NAME@ of a template."""
    hardware, own = job["hardware"], job[target]
    words = ["fedjax-peft", "run", f"--config={job['config']}", f"--workdir={job['workdir']}", *job["flags"]]
    values = {"NAME": job["name"], "RUN": shlex.join(words), "GRACE": str(GRACE)}
    values |= {"RESTARTS": str(job["restarts"]), "PORT": str(job["port"]), "HOSTS": str(hardware["hosts"])}
    exports = [f"export {name}={shlex.quote(value)}" for name, value in job["variables"].items()]
    secrets = {name: f'"${{{name}:?a secret of this job, is not set}}"' for name in job["secrets"]}
    values |= {"VARIABLES": "\n".join(exports), "NEEDED": "\n".join(f": {value}" for value in secrets.values())}
    if target == "local":
        share = hardware["devices"] // own["processes"]
        return values | {"PROCESSES": str(own["processes"]), "DEVICES": _share(hardware["kind"], share)}
    if target == "slurm":
        gpus = [f"--gres=gpu:{hardware['devices']}"] if hardware["kind"] == "gpu" else []
        values |= {key.upper(): str(own[key]) for key in ("tasks", "cpus", "memory", "hours", "logs", "environment")}
        return values | {"OPTIONS": "\n".join(f"#SBATCH {option}" for option in [*gpus, *own["options"]])}
    if target == "tpu_vm":
        values |= {
            key.upper(): shlex.quote(own[key]) for key in ("project", "zone", "accelerator", "runtime", "install")
        }
        values["SECRETS"] = "\n".join(f"printf 'export {name}=%q\\n' {value}" for name, value in secrets.items())
        values |= {"SPOT": "--spot" if own["spot"] else "", "FOLDER": job["name"]}
        # Quoted once for the shell on a host that runs it, and once for the one here that sends it there.
        command = shlex.quote(f"{values['RUN']}; echo $? >run.code")
        return values | {"RUN": shlex.quote(command), "WORKDIR": shlex.quote(job["workdir"])}
    return values | _pods(job, values["RUN"])


def _pods(job: Mapping[str, Any], command: str) -> dict[str, str]:
    kind, hosts, own = job["hardware"]["kind"], job["hardware"]["hosts"], job["gke"]
    if kind != "tpu":  # there GKE says it in variables
        command += f" --coordinator={job['name']}-host-0-0.{job['name']}:{job['port']}"
        command += f" --processes={hosts} --process=$JOB_COMPLETION_INDEX"
    resource = {"tpu": "google.com/tpu", "gpu": "nvidia.com/gpu"}.get(kind)
    selector = own["selector"] | ({"cloud.google.com/gke-spot": "true"} if own["spot"] else {})
    keys = [resource, "cloud.google.com/gke-spot" if own["spot"] else None]
    tolerations = [{"key": key, "operator": "Exists", "effect": "NoSchedule"} for key in keys if key]
    variables = [{"name": name, "value": value} for name, value in job["variables"].items()]
    for name in job["secrets"]:
        variables.append({"name": name, "valueFrom": {"secretKeyRef": {"name": job["name"], "key": name}}})
    content = {
        "VARIABLES": variables,
        "SELECTOR": selector,
        "TOLERATIONS": tolerations,
        "IMAGE": own["image"],
        "COMMAND": ["bash", "-c", f"exec {command}"],
        "LIMITS": {resource: str(job["hardware"]["devices"])} if resource else {},
    }
    # JSON is YAML.
    return {name: json.dumps(value) for name, value in content.items()} | {"QUEUE": own["queue"]}


def _share(kind: str, count: int) -> str:
    """A line of shell that gives process number $process its share of this machine's devices."""
    if kind == "gpu":
        last = f"$((process * {count} + {count - 1}))"
        return f'CUDA_VISIBLE_DEVICES=$(seq -s, "$((process * {count}))" "{last}") && export CUDA_VISIBLE_DEVICES'
    if kind == "cpu":
        return f'export JAX_PLATFORMS=cpu XLA_FLAGS="${{XLA_FLAGS:-}} --xla_force_host_platform_device_count={count}"'
    return ":"


def _check(section: str, given: Mapping[str, Any]) -> None:
    prefix = "" if section == "job" else f"{section}."
    for key, kind in KEYS[section].items():
        if key not in given:
            raise ValueError(f"{prefix}{key} is missing")
        if type(given[key]) is not kind:
            raise ValueError(f"{prefix}{key} is {given[key]!r}, expected {kind.__name__}")
        if key in LEAST and given[key] < LEAST[key]:
            raise ValueError(f"{prefix}{key} is {given[key]}, expected {LEAST[key]} or more")
        if kind is str and "\n" in given[key]:
            raise ValueError(f"{prefix}{key} is {given[key]!r}, expected one line")
    unknown = [key for key in given if key not in KEYS[section]]
    if unknown:
        raise ValueError(f"{prefix}{unknown[0]} is no key, expected {', '.join(KEYS[section])}")


def _check_variables(job: Mapping[str, Any]) -> None:
    names = [*job["variables"], *job["secrets"]]
    for name in names:
        if not (isinstance(name, str) and re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII)) or names.count(name) > 1:
            raise ValueError(f"{name!r} is no name of a variable, or one of two")
    for name, value in job["variables"].items():
        if not isinstance(value, str) or "\n" in value:
            raise ValueError(f"variables.{name} is {value!r}, expected a string of one line")


def _check_sense(job: Mapping[str, Any], target: str) -> None:
    hardware, own = job["hardware"], job[target]
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", job["name"]):
        raise ValueError(
            f"name is {job['name']!r}, expected at most 40 small letters, digits and dashes, a letter first"
        )
    if hardware["kind"] not in ("gpu", "tpu", "cpu"):
        raise ValueError(f"hardware.kind is {hardware['kind']!r}, expected 'gpu', 'tpu' or 'cpu'")
    if target == "local" and hardware["devices"] % own["processes"]:
        raise ValueError(f"local.processes is {own['processes']}, which does not divide {hardware['devices']} devices")
    if target == "local" and hardware["kind"] == "tpu" and own["processes"] > 1:
        raise ValueError("local.processes must be 1 on a TPU host, whose chips belong to one process")
    if target == "slurm" and hardware["kind"] == "gpu" and own["tasks"] not in (1, hardware["devices"]):
        raise ValueError(f"slurm.tasks is {own['tasks']}, expected one a GPU ({hardware['devices']}) or 1")
    if target == "tpu_vm" and hardware["kind"] != "tpu":
        raise ValueError(f"hardware.kind is {hardware['kind']!r}, expected 'tpu' on TPU VMs")
    if target in ("tpu_vm", "gke") and not job["workdir"].startswith("gs://"):
        raise ValueError(
            f"workdir is {job['workdir']!r}, expected gs://BUCKET/PATH: disks of {target} hosts end with them"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
