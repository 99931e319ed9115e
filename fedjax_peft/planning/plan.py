"""`fedjax-peft plan`: what a run would need on hardware that is not rented yet.

The round of a config is compiled for that hardware, which for TPUs takes no TPU, and the program is read: memory,
products, bytes between chips, and the time that the compiler expects. What remains unknown is said.
"""

import logging
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from fedjax_peft import console, metrics, rounds
from fedjax_peft.planning import hlo, jobs, topologies
from fedjax_peft.planning.jobs import Job
from fedjax_peft.planning.topologies import Topology

logger = logging.getLogger(__name__)

MOST_MODEL = 16
"""Chips that `--search` splits a base over at most."""
_UNITS = {"": 1.0, "K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}
UNKNOWN = (
    "All texts are taken to be as long as max_length, and the vocabulary to be whole: real data need less.",
    "Not in the time: data on the host and their way to the device, network stalls, evaluation, checkpoints.",
    "The compiler's cycles assume that memory is always in time; measured rounds take longer, how much is not known.",
    "Only rounds are planned: not personalization, nor evaluation, nor an earlier stage that makes the base.",
)


class Candidate(NamedTuple):
    """One way of laying a round out."""

    chunk: int
    model: int  # chips that the base is split over
    remat: bool


class Plan(NamedTuple):
    """What the compiler says of one candidate; bytes and FLOPs are those of one chip."""

    candidate: Candidate
    slots: int  # C, with padding
    needed: float  # bytes of memory
    fits: bool
    parts: dict[str, float]  # bytes
    cost: hlo.Cost
    least: float  # FLOPs of the least work
    seconds: float | None  # of a round, at best
    network: float | None  # of these, between chips


class Study(NamedTuple):
    """What was found for one topology."""

    plan: Plan  # the one to take
    largest: Plan | None  # with the largest chunk that fits
    tried: list[Plan]
    job: Job


def main(
    config: ConfigDict,
    names: Sequence[str],
    *,
    search: bool = False,
    scaling: bool = False,
    output: str | None = None,
    **sizes: int | None,
) -> dict[str, Any]:
    """Plans a config for several topologies; prints a table and what it does not tell, and returns all numbers.

    Args:
      names: see `topologies.find`.
      search: tries chunks, meshes and remat, and recommends one.
      scaling: also compiles for a single chip with its share of the clients, and compares FLOPs.
      output: JSON file of all numbers.
      **sizes: `classes`, `steps` and `answer` of `jobs.make_job`.

    Raises:
      ValueError: a mistake in the config or a topology, in one sentence.
    """
    found = [topologies.find(name) for name in names]
    studies, content = [], {}
    for topology in found:
        study = _study(config, topology, search, sizes)
        studies.append(study)
        content[topology.name] = {"plan": _json(study.plan), "tried": [_json(other) for other in study.tried]}
        if search:
            rows = [_short(other, "best" if other is study.plan and other.fits else "") for other in study.tried]
            console.table(topology.name, ("chunk", "split", "remat", "GB", "s", "clients/s", ""), rows)
        if scaling and study.plan.fits:
            content[topology.name]["scaling"] = weak_scaling(config, topology, study.plan, sizes)
    columns = [_column(study, topology) for study, topology in zip(studies, found, strict=True)]
    rows = [(name, *(column[name] for column in columns)) for name in columns[0]]
    console.table(f"One round of {config.cohort} clients", ("a chip", *(topology.name for topology in found)), rows)
    for topology, study in zip(found, studies, strict=True):
        said = [*exchanges(study.plan), *checks(study.plan, study.job)]
        ratio = content[topology.name].get("scaling")
        said += [f"weak scaling: a chip does {ratio:.4f} times the FLOPs of a chip alone"] if ratio else []
        print(f"\n{topology.name}", *said, sep="\n  ")
    print("\nWhat this does not know:", *UNKNOWN, sep="\n  ")
    if output:
        metrics.write_json(epath.Path(output), content)
    return content


def make_mesh(topology: Topology, model: int) -> Mesh:
    """All chips, `model` of them for each copy of the base."""
    chips = len(topology.devices)
    if chips % model:
        raise ValueError(f"run.mesh.model is {model}, which does not divide the {chips} chips of {topology.name}")
    shape = (chips // model, model)
    return jax.make_mesh(shape, ("clients", "model"), (AxisType.Auto,) * 2, devices=topology.devices)


def compile_round(job: Job, topology: Topology, candidate: Candidate) -> Plan:
    """Compiles the round for a topology and reads the program. One that does not fit has `fits` False."""
    mesh = make_mesh(topology, candidate.model)
    slots = rounds.slots_for(job.clients, mesh, candidate.chunk)
    arguments = jobs.arguments(job, mesh, slots)
    chips, start = len(topology.devices), time.monotonic()
    least = job.clients * job.flops / chips
    parts = _parts(job, arguments, candidate.chunk)
    step = rounds.make_round(job.algorithm, mesh, candidate.chunk)
    try:
        compiled = step.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        needed = too_much(str(error))
        if needed is None:
            raise
        logger.info("%s %s: does not fit, %s", topology.name, candidate, " ".join(str(error).split())[:160])
        return Plan(candidate, slots, needed, False, parts, hlo.Cost(0.0, 0.0, (), 0), least, None, None)
    memory = compiled.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    needed += memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    training = parts["adapters in training"] + parts["gradients and moments"]
    parts |= {"activations, temporaries": max(memory.temp_size_in_bytes - training, 0)}
    parts |= {"program": memory.generated_code_size_in_bytes}
    cost = hlo.cost(compiled.as_text())
    seconds, network = _seconds(cost, topology)
    logger.info("%s %s: compiled in %.0f s", topology.name, candidate, time.monotonic() - start)
    return Plan(candidate, slots, needed, needed <= topology.chip.memory, parts, cost, least, seconds, network)


def largest_chunk(job: Job, topology: Topology, candidate: Candidate) -> tuple[Plan | None, list[Plan]]:
    """The plan with the largest chunk that fits, and all that were tried; the largest one first."""
    lanes = len(topology.devices) // candidate.model
    tried = []
    for chunk in reversed(jobs.halvings(-(-job.clients // lanes))):
        tried.append(compile_round(job, topology, candidate._replace(chunk=chunk)))
        if tried[-1].fits:
            return tried[-1], tried
    return None, tried


def weak_scaling(config: ConfigDict, topology: Topology, plan: Plan, sizes: Mapping[str, Any]) -> float:
    """FLOPs of a chip among n with C clients, over those of one copy of the base with its C / lanes clients."""
    chunk, model, remat = plan.candidate
    alone = topology._replace(devices=topology.devices[:model])
    lanes = len(topology.devices) // model
    job = jobs.make_job(config, remat=remat, **sizes)
    share = job._replace(clients=plan.slots // lanes)
    return plan.cost.flops / compile_round(share, alone, Candidate(chunk, model, remat)).cost.flops


def too_much(message: str) -> float | None:
    """Bytes that a program needs, from the compiler's refusal; NaN if it does not say, None for other errors."""
    if "RESOURCE_EXHAUSTED" not in message and "out of memory" not in message.lower():
        return None
    said = re.search(r"Used ([\d.]+)([KMGT]?)\w* of|\(([\d.]+)([KMGT]?)\w*\) exceeds", message)
    if said is None:
        return float("nan")
    return float(said[1] or said[3]) * _UNITS[said[2] or said[4] or ""]


def speed(plan: Plan) -> float:
    """Slots a second, to compare plans with; -1 where the time is not known."""
    return plan.slots / plan.seconds if plan.seconds else -1.0


def axis_of(groups: Sequence[Sequence[int]], model: int) -> str:
    """The mesh axis along which devices of a group differ: `clients`, `model`, or both."""
    if not groups:
        return "clients and model"
    positions = np.asarray(groups[0])
    along = {"clients": len(set(positions // model)) > 1, "model": len(set(positions % model)) > 1}
    return " and ".join(name for name, differs in along.items() if differs) or "none"


def exchanges(plan: Plan) -> list[str]:
    """A sentence for each kind of exchange and axis."""
    bytes_, times = Counter(), Counter()
    for one in plan.cost.collectives:
        key = one.kind, axis_of(one.groups, plan.candidate.model)
        bytes_[key] += one.bytes * one.times
        times[key] += one.times
    lines = [
        f"{kind} over {axis}: {size / 1e6:,.2f} MB in {times[kind, axis]:,.0f} exchanges a round"
        for (kind, axis), size in bytes_.most_common()
    ]
    return lines or ["no bytes between chips"]


def checks(plan: Plan, job: Job) -> list[str]:
    """Whether the program does what a round promises, a sentence each."""
    if not plan.fits:
        return ["does not fit: split the base over more chips (run.mesh.model), or shorten batch or max_length"]
    said, model = [], plan.candidate.model
    gathered = [one for one in plan.cost.collectives if one.kind == "all-gather" and one.times > 1]
    if model == 1:
        said.append(
            "look: something is gathered inside a loop"
            if gathered
            else "ok: nothing is gathered inside a local step, the base least of all"
        )
    over = [one for one in plan.cost.collectives if "clients" in axis_of(one.groups, model)]
    often = [one for one in over if one.times > 1]
    total = sum(one.bytes * one.times for one in over)
    # Chips that share a base share the server's update too, and put it together again.
    allowed = once_a_round(job, plan.slots) * (1 if model == 1 else 2)
    if often or total > 1.05 * allowed:
        said.append(
            f"look: {total / 1e6:,.2f} MB go over clients, in loops or more than the {allowed / 1e6:,.2f} MB "
            "of one sum of uploads and metrics"
        )
    else:
        said.append(f"ok: over clients goes one sum of uploads a round ({total / 1e6:,.2f} MB with metrics)")
    if plan.cost.unknown:
        said.append(f"look: {plan.cost.unknown} loops do not say how often they turn and are counted once")
    return said


def once_a_round(job: Job, slots: int) -> float:
    """Bytes that must cross `clients`: the sums of uploads, and a few numbers of each client."""
    return jobs.held(jobs.sums(job, slots)) + 64 * slots + 4096


def _study(config: ConfigDict, topology: Topology, search: bool, sizes: Mapping[str, Any]) -> Study:
    made = {remat: jobs.make_job(config, remat=remat, **sizes) for remat in (False, True)}
    remat, own = config.run.remat, config.run.chunk
    if not search:
        start = Candidate(own, config.run.mesh.model, remat)
        largest, tried = largest_chunk(made[remat], topology, start)
        known = {plan.candidate.chunk: plan for plan in tried}
        plan = largest or tried[-1]
        if own:
            plan = known.get(own) or compile_round(made[remat], topology, start)
        return Study(plan, largest, tried, made[remat])
    tried = [
        plan
        for model in _splits(made[remat], topology)
        for remat in made
        for plan in _ascending(made[remat], topology, model, remat)
    ]
    best = max(tried, key=lambda plan: (plan.fits, speed(plan)))
    same = [plan for plan in tried if plan.fits and plan.candidate[1:] == best.candidate[1:]]
    return Study(
        best, max(same, key=lambda plan: plan.candidate.chunk, default=None), tried, made[best.candidate.remat]
    )


def _splits(job: Job, topology: Topology) -> list[int]:
    """The smallest split of the base that leaves room beside it, and the next one."""
    chips, whole = len(topology.devices), jobs.held(job.base)
    possible = [size for size in jobs.halvings(min(MOST_MODEL, chips)) if chips % size == 0]
    room = [size for size in possible if whole / size < 0.9 * topology.chip.memory]
    return room[:2] or possible[-1:]


def _ascending(job: Job, topology: Topology, model: int, remat: bool) -> list[Plan]:
    plans = []
    for chunk in jobs.halvings(-(-job.clients * model // len(topology.devices))):
        plans.append(compile_round(job, topology, Candidate(chunk, model, remat)))
        if not plans[-1].fits:
            break
    return plans


def _parts(job: Job, arguments: tuple, chunk: int) -> dict[str, float]:
    base, server, states, _, batches, *_ = arguments
    own = jobs.held(job.adapters)
    return {
        "base": jobs.held(base),
        "server": jobs.held(server),
        "states of clients": jobs.held(states),
        "batches": jobs.held(batches),
        "adapters in training": chunk * own,
        "gradients and moments": chunk * (own + jobs.held(job.moments)),
    }


def _seconds(cost: hlo.Cost, topology: Topology) -> tuple[float | None, float | None]:
    """(a round at best, of it between chips): rings without stalls, nothing of them hidden behind products."""
    chip, network = topology.chip, 0.0
    for one in cost.collectives:
        count = len(one.groups[0]) if one.groups else len(topology.devices)
        passes = (2 if one.kind == "all-reduce" else 1) * (count - 1) / count
        network += passes * one.bytes * one.times / (chip.network or float("inf"))
    if chip.clock and cost.cycles:
        return cost.cycles / chip.clock + network, network
    return (cost.flops / chip.peak + network, network) if chip.peak else (None, None)


def _column(study: Study, topology: Topology) -> dict[str, Any]:
    plan, chip, job = study.plan, topology.chip, study.job
    chips = len(topology.devices)
    column: dict[str, Any] = {"chips": str(chips), "mesh": f"{chips // plan.candidate.model} x {plan.candidate.model}"}
    column |= {"chunk": str(plan.candidate.chunk), "remat": "yes" if plan.candidate.remat else "no"}
    column |= {"largest chunk that fits": str(study.largest.candidate.chunk) if study.largest else "none"}
    names = [*plan.parts, "activations, temporaries", "program"]
    column |= {f"{name}, MB": _rounded(plan.parts.get(name), 1e-6) for name in dict.fromkeys(names)}
    column |= {"together, GB": _rounded(plan.needed, 1e-9), "memory, GB": _rounded(chip.memory, 1e-9)}
    flops, seconds = plan.cost.flops or None, plan.seconds
    column |= {"TFLOPs": _rounded(flops, 1e-12), "FLOPs / least": _rounded(flops, 1 / plan.least)}
    column |= {"s a round, at best": _rounded(seconds), "of it network, s": _rounded(plan.network)}
    rate = 1 / seconds if seconds else None
    peak = rate and chip.peak and plan.least * rate / chip.peak
    column |= {"share of peak": _rounded(peak), "clients/s, all chips": _rounded(rate, job.clients)}
    return column | {"tokens/s, all chips": _rounded(rate, job.clients * job.tokens)}


def _rounded(value: float | None, scale: float = 1.0) -> str:
    if value is None or value != value:
        return "-"
    return f"{scale * value:,.0f}" if scale * value >= 1000 else f"{scale * value:.3g}"


def _short(plan: Plan, mark: str) -> tuple[str, ...]:
    chunk, model, remat = plan.candidate
    numbers = [_rounded(plan.needed, 1e-9), _rounded(plan.seconds), _rounded(speed(plan) if plan.seconds else None)]
    return str(chunk), str(model), "yes" if remat else "no", *numbers, mark if plan.fits else "does not fit"


def _json(plan: Plan) -> dict[str, Any]:
    exchanges = [
        {"kind": one.kind, "axis": axis_of(one.groups, plan.candidate.model), "bytes": one.bytes, "times": one.times}
        for one in plan.cost.collectives
    ]
    content = plan._asdict() | {"candidate": plan.candidate._asdict(), "collectives": exchanges}
    cost = content.pop("cost")
    return content | {"flops": float(cost.flops), "cycles": cost.cycles}
