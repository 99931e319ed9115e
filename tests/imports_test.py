"""The arrows between modules, read from the source: who may import whom, and what may be used where."""

import ast
import graphlib
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "fedjax_peft"
FILES = sorted(PACKAGE.rglob("*.py"))

PURE = {"types", "trees"}
ENGINE = PURE | {
    "adapters",
    "aggregate",
    "assignment",
    "bilevel",
    "implicit",
    "local",
    "mixture",
    "ranks",
    "spectra",
    "taps",
    "tasks",
}
RUN = {
    "checkpoint",
    "chunking",
    "console",
    "evaluate",
    "judging",
    "metrics",
    "population",
    "processes",
    "records",
    "rounds",
    "runs",
    "segments",
    "summaries",
    "written",
}

# Module or folder -> what of this package it may import. A folder stands for all files in it.
ALLOWED = {
    "types": set(),
    "runs": {"types"},
    "trees": {"types"},
    "tasks": PURE,
    "adapters": PURE,
    "ranks": PURE | {"adapters"},
    "taps": PURE | {"adapters"},
    "spectra": PURE | {"adapters", "ranks"},
    "bilevel": PURE,
    "implicit": PURE | {"bilevel", "local"},
    "mixture": PURE | {"adapters"},
    "assignment": set(),
    "text_metrics": set(),
    "aggregate": PURE,
    "local": PURE,
    "algorithms": ENGINE | {"algorithms"},
    "packages": set(),
    "models": PURE | {"models", "packages"},
    "settings": set(),
    "data": {"types", "data", "packages", "settings"},
    "processes": PURE,
    "rounds": PURE,
    "population": PURE | {"processes"},
    "segments": PURE | {"metrics", "population", "processes"},
    "evaluate": PURE | {"rounds", "population", "processes", "written"},
    "written": PURE,
    "summaries": set(),
    "generate": PURE,
    "records": PURE | {"evaluate", "runs", "summaries"},
    "judging": PURE | {"evaluate", "metrics", "records", "runs"},
    "checkpoint": PURE | {"processes"},
    "metrics": {"processes"},
    "manifest": {"config", "metrics"},
    "chunking": {"metrics", "processes"},
    "console": {"processes"},
    "loop": PURE | RUN,
    "config": {"settings"},
    "one_client": PURE | {"loop", "population", "rounds"},
    "rank_recovery": PURE | {"adapters", "algorithms", "metrics", "rounds", "spectra"},
    "ground": {"types", "config", "data", "evaluate", "generate", "models", "runs", "text_metrics"},
    "methods": PURE
    | {"adapters", "aggregate", "algorithms", "config", "data", "ground", "local", "ranks", "runs", "settings"}
    | {"spectra", "tasks"},
    "stage": {"data", "evaluate", "ground", "manifest", "methods", "processes", "rounds", "runs", "types"},
    "experiment": PURE
    | {"adapters", "config", "data", "ground", "loop", "manifest", "methods", "one_client", "population"}
    | {"rank_recovery", "rounds", "runs", "settings", "stage"},
    "published": PURE | {"adapters", "models"},
    "export": PURE | {"adapters", "experiment", "ground", "manifest", "mixture", "models", "one_client", "published"},
    "asking": PURE | {"data", "experiment", "generate", "ground", "one_client"},
    "reports": {"console", "manifest", "metrics", "reports", "summaries"},
    "benchmarks": PURE
    | {"adapters", "algorithms", "benchmarks", "console", "data", "local", "loop", "manifest", "metrics", "models"}
    | {"rounds", "runs", "tasks"},
    "planning": PURE
    | {"config", "console", "data", "local", "methods", "metrics", "models", "planning", "rounds", "tasks"},
    "doctor": {"processes", "rounds"},
    "main": {
        "asking",
        "benchmarks",
        "doctor",
        "experiment",
        "export",
        "loop",
        "planning",
        "processes",
        "reports",
    },
    "__init__": set(),
}
# Library -> where alone it may be imported.
ONLY_IN = {
    "flax.linen": {"models"},
    "flax.nnx": set(),
    "configs": set(),
    "optax": {"algorithms", "aggregate", "implicit", "local", "tasks", "rank_recovery"},
    "ml_collections": {"config", "experiment", "ground", "main", "methods", "planning", "stage"},
    "orbax": {"checkpoint"},
    "torch": {"benchmarks"},
    "peft": {"benchmarks"},
}
NUMPY_ONLY = {"data"}  # packages that leave devices alone; types of arrays they may name


def part_of(file: pathlib.Path) -> str:
    """`rounds` for rounds.py, `data` for any file in data/."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(file: pathlib.Path) -> set[str]:
    """Dotted names of all that a file imports, `from a import b` as a.b."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name} imports relatively in line {node.lineno}"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def within(name: str, library: str) -> bool:
    return f"{name}.".startswith(f"{library}.")


each = pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))


@each
def test_modules_import_only_what_is_below_them(file):
    part = part_of(file)
    assert part in ALLOWED, f"{part} is new: say in this test's table what it may import"
    parts = {name.split(".")[1] for name in imported(file) if within(name, "fedjax_peft") and "." in name}
    assert parts <= ALLOWED[part], f"{file.name} imports {sorted(parts - ALLOWED[part])}"


@each
def test_libraries_stay_where_they_belong(file):
    for name in imported(file):
        for library, places in ONLY_IN.items():
            assert not within(name, library) or part_of(file) in places, f"{file.name} imports {name}"
        assert not within(name, "jax._src"), f"{file.name} imports {name}, which is private"
        if part_of(file) in NUMPY_ONLY:
            assert not within(name, "jax"), f"{file.name} imports {name}"


@each
def test_pmap_and_private_jax_are_not_used(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("pmap", "_src"), f"{file.name} uses {node.attr} in line {node.lineno}"


def test_clients_are_batched_in_one_place():
    batching = {
        file.stem
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("vmap", "shard_map")
    }
    # layers.py draws dropout by rows of attention, rank_recovery.py has seeds side by side: neither has clients.
    assert batching <= {"rounds", "evaluate", "layers", "rank_recovery"}


def test_the_arrows_make_no_circle():
    below = {part: allowed - {part} for part, allowed in ALLOWED.items()}
    graphlib.TopologicalSorter(below).prepare()  # raises CycleError
