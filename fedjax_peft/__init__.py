"""Personalized federated fine-tuning of language models, simulated at accelerator speed.

The parts that programs of your own are made of are modules of this package, imported when they are first used.
"""

import importlib
from types import ModuleType

__version__ = "0.1.0"

_PARTS = (
    *("adapters", "aggregate", "algorithms", "data", "evaluate", "experiment", "local", "models", "population"),
    *("ranks", "rounds", "tasks", "trees", "types"),
)


def __getattr__(name: str) -> ModuleType:
    # The command line answers a mistake in its flags before it imports jax.
    if name in _PARTS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted((*globals(), *_PARTS))
