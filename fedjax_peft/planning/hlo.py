"""What a compiled program does on one device, read from its text: products, cycles and bytes between devices.

The compiler's own totals count the body of a loop once, however often it runs; a round is loops in loops (chunks,
steps, layers). Here a body counts as often as its loop turns. Of the branches of a choice (token widths) the most
expensive one counts.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8}
_BYTES |= {"f16": 2, "bf16": 2, "f32": 4, "f64": 8, "c64": 8, "f8e4m3fn": 1, "f8e5m2": 1, "token": 0}


class Collective(NamedTuple):
    """An exchange between devices."""

    kind: str  # one of COLLECTIVES
    groups: tuple[tuple[int, ...], ...]  # positions of devices in the mesh, row by row; () is all of them
    bytes: float  # that a device has afterwards (all-gather) or hands in (others), each time
    times: float  # in one run of the program


class Cost(NamedTuple):
    """Of one run on one device."""

    flops: float  # of matrix products and convolutions
    cycles: float  # as the TPU compiler estimates them; 0 where it says nothing
    collectives: tuple[Collective, ...]
    unknown: int  # loops whose number of turns is not in the text; they count once


class _Instruction(NamedTuple):
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str  # attributes


def cost(text: str) -> Cost:
    """Reads `compiled.as_text()`.

    Raises:
      ValueError: a text without an entry computation.
    """
    computations, entry = _computations(text)
    if entry is None:
        raise ValueError("the text of the program has no ENTRY computation, expected compiled.as_text()")
    shapes = {name: own.shape for body in computations.values() for name, own in body.items()}

    @functools.cache
    def of(name: str) -> Cost:
        parts = [_of_instruction(own, shapes, computations, of) for own in computations.get(name, {}).values()]
        return _sum(parts)

    return of(entry)


def _of_instruction(
    own: _Instruction, shapes: Mapping[str, str], computations: Mapping, of: Callable[[str], Cost]
) -> Cost:
    cycles = re.search(r'"estimated_cycles":"(\d+)"', own.rest)
    here = Cost(_flops(own, shapes), float(cycles[1]) if cycles else 0.0, _collective(own, shapes), 0)
    if own.opcode == "while":
        turns, body = _turns(own, computations), of(_called(own, "body")[0])
        return _times(body, turns or 1)._replace(unknown=body.unknown + (turns is None))
    if own.opcode == "conditional":
        branches = _called(own, "branch_computations") or [
            *_called(own, "true_computation"),
            *_called(own, "false_computation"),
        ]
        return _sum([here, max(map(of, branches), key=lambda cost: (cost.cycles, cost.flops))])
    inside = [of(name) for kind in ("calls", "called_computations") for name in _called(own, kind)]
    if own.opcode == "call":
        inside += [of(name) for name in _called(own, "to_apply")]
    if own.opcode == "fusion":  # whose own cycles are those of all that it does
        inside = [part._replace(cycles=0.0) for part in inside]
    return _sum([here, *inside])


def _sum(parts: Sequence[Cost]) -> Cost:
    return Cost(
        sum(part.flops for part in parts),
        sum(part.cycles for part in parts),
        tuple(itertools.chain.from_iterable(part.collectives for part in parts)),
        sum(part.unknown for part in parts),
    )


def _times(cost: Cost, turns: int) -> Cost:
    collectives = tuple(one._replace(times=turns * one.times) for one in cost.collectives)
    return Cost(turns * cost.flops, turns * cost.cycles, collectives, cost.unknown)


def _computations(text: str) -> tuple[dict[str, dict[str, _Instruction]], str | None]:
    computations: dict[str, dict[str, _Instruction]] = {}
    entry, current = None, None
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif current is not None and (parsed := _instruction(line)):
            current[parsed[0]] = parsed[1]
    return computations, entry


def _instruction(line: str) -> tuple[str, _Instruction] | None:
    head = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if head is None:
        return None
    end = _closing(line, head.end()) + 1 if line[head.end()] == "(" else line.index(" ", head.end())
    call = re.match(r"\s*([\w\-]+)\(", line[end:])
    if call is None:
        return None
    opening = end + call.end() - 1
    closing = _closing(line, opening)
    operands = tuple(re.findall(r"%([\w.\-]+)", line[opening:closing]))
    if call[1] == "constant":
        operands = (line[opening + 1 : closing],)
    return head[1], _Instruction(line[head.end() : end], call[1], operands, line[closing + 1 :])


def _closing(line: str, start: int) -> int:
    depth = 0
    for position in re.finditer(r"[()]", line[start:]):
        depth += 1 if position[0] == "(" else -1
        if depth == 0:
            return start + position.start()
    return len(line)


def _called(own: _Instruction, attribute: str) -> list[str]:
    found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", own.rest)
    return re.findall(r"[\w.\-]+", found[1]) if found else []


def _turns(own: _Instruction, computations: Mapping[str, Mapping[str, _Instruction]]) -> int | None:
    """How often a loop turns; loops of `lax.scan` count from 0."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', own.rest)
    if known:
        return int(known[1])
    condition = computations.get(_called(own, "condition")[0], {})
    bounds = {
        int(condition[name].operands[0])
        for one in condition.values()
        if one.opcode == "compare" and "direction=LT" in one.rest
        for name in one.operands
        if name in condition and condition[name].opcode == "constant"
    }
    return bounds.pop() if len(bounds) == 1 else None


def _dims(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """(element type, dimensions) of each array of a shape."""
    found = re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", shape)
    return [(kind, tuple(map(int, filter(None, sizes.split(","))))) for kind, sizes in found]


def _size(shape: str) -> float:
    return sum(_BYTES.get(kind, 4) * math.prod(sizes) for kind, sizes in _dims(shape))


def _flops(own: _Instruction, shapes: Mapping[str, str]) -> float:
    if own.opcode == "convolution":
        return _convolution(own, shapes)
    gemm = own.opcode == "custom-call" and re.search(r"gemm|matmul", own.rest)
    contracted = re.search(r'lhs_contracting_dim(?:s|ensions)"?[=:][{\[]([\d,"]*)', own.rest)
    if not (own.opcode == "dot" or gemm) or contracted is None:
        return 0.0
    left = _dims(shapes[own.operands[0]])[0][1]
    inner = math.prod(left[int(axis)] for axis in re.findall(r"\d+", contracted[1]))
    return 2.0 * math.prod(_dims(own.shape)[0][1]) * inner


def _convolution(own: _Instruction, shapes: Mapping[str, str]) -> float:
    """The TPU's matrix products: batch axes are windows that are dilated so far that one tap of each meets data."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", own.rest)
    left, right = (_dims(shapes[name])[0][1] for name in own.operands[:2])
    out = _dims(own.shape)[0][1]
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", re.search(r"window=\{([^}]*)\}|$", own.rest)[1] or ""))
    axes = sorted(set(labels[1]) - {"b", "f"})

    def each(name, default):
        return window[name].split("x") if name in window else [default] * len(axes)

    total = 2.0 * out[labels[3].index("b")] * out[labels[3].index("f")] * right[labels[2].index("i")]
    parts = zip(each("stride", "1"), each("pad", "0_0"), each("lhs_dilate", "1"), each("rhs_dilate", "1"), strict=True)
    for axis, (stride, pad, spread, gap) in zip(axes, parts, strict=True):
        reach = (left[labels[1].index(axis)] - 1) * int(spread) + 1
        starts = np.arange(out[labels[3].index(axis)]) * int(stride) - int(re.match(r"-?\d+", pad)[0])
        taps = starts[:, None] + np.arange(right[labels[2].index(axis)]) * int(gap)
        total *= np.sum((taps >= 0) & (taps < reach) & (taps % int(spread) == 0))
    shared = re.search(r"batch_group_count=(\d+)", own.rest)
    return total / (int(shared[1]) if shared else 1)


def _collective(own: _Instruction, shapes: Mapping[str, str]) -> tuple[Collective, ...]:
    kind = own.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return ()
    groups = _groups(own.rest)
    size = sum(_size(shapes[name]) for name in own.operands)
    if kind == "all-gather" and groups:
        size *= len(groups[0])
    return (Collective(kind, groups, size, 1.0),)


def _groups(rest: str) -> tuple[tuple[int, ...], ...]:
    """Devices that exchange with each other; three ways of writing it."""
    if pairs := re.search(r"source_target_pairs=\{((?:\{[\d,]*\},?)*)\}", rest):
        return _joined([tuple(map(int, pair.split(","))) for pair in re.findall(r"\{([\d,]+)\}", pairs[1])])
    if plain := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", rest):
        return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", plain[1]))
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        shape, source = ([int(size) for size in iota[part].split(",")] for part in (1, 2))
        ids = np.arange(math.prod(source)).reshape(source)
        ids = ids.transpose([int(axis) for axis in iota[3].split(",")]) if iota[3] else ids
        return tuple(map(tuple, ids.reshape(shape[0], -1).tolist()))
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        inside = re.findall(r"'(\w+)'", named[2])
        order = [name for name in sizes if name not in inside] + inside
        ids = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
        ids = ids.transpose([list(sizes).index(name) for name in order])
        return tuple(map(tuple, ids.reshape(-1, math.prod(sizes[name] for name in inside)).tolist()))
    return ()


def _joined(pairs: Sequence[tuple[int, int]]) -> tuple[tuple[int, ...], ...]:
    """The rings that pairs of neighbours form."""
    rings: dict[int, set[int]] = {}
    for one, other in pairs:
        ring = rings.get(one, {one}) | rings.get(other, {other})
        rings |= dict.fromkeys(ring, ring)
    return tuple(sorted({tuple(sorted(ring)) for ring in rings.values()}))
