"""What all networks share: a `config.json` that is checked, layers as one module, and the functions of a model."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from fedjax_peft.types import Array, PyTree


def check_config(config: Mapping[str, Any], expected: Mapping[str, tuple], counts: tuple[str, ...]) -> None:
    """Raises ValueError for the first field that is present and not as expected, or is no positive integer."""
    for field, known in expected.items():
        value = config.get(field)
        if value is not None and value not in known:
            raise ValueError(f"config field {field} is {value!r}, expected {' or '.join(map(repr, known))}")
    for field in counts:
        if not isinstance(config.get(field), int) or config[field] < 1:
            raise ValueError(f"config field {field} is {config.get(field)!r}, expected a positive integer")


def stack(layer: type[nn.Module], settings: Any, in_axes: Any) -> Callable[..., nn.Module]:
    """L layers as one module, (x, ..) -> (x, what each layer gives), whose parameters carry a leading axis.

    Args:
      layer: a module of `settings`, (x, ..) -> (x, ..).
      settings: with `layers`, `scan` and `remat`.
      in_axes: of the arguments after x: 0 for those that each layer has of its own, `nn.broadcast` for others.
    """
    # Inside a loop nothing is merged across the barrier anyway, unrolled layers need it.
    layer = nn.remat(layer, prevent_cse=not settings.scan) if settings.remat else layer
    return nn.scan(
        layer,
        variable_axes={"params": 0, "adapters": 0, "taps": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=settings.layers,
        unroll=1 if settings.scan else settings.layers,
    )


def functions(network: nn.Module, positions: int) -> tuple[Callable, Callable, Callable]:
    """`init`, `apply` and `taps` of a `types.Model` whose texts have no more tokens than there are positions."""

    def init(key: Array) -> PyTree:
        inputs = {"tokens": jnp.zeros((1, 2), jnp.int32), "mask": jnp.ones((1, 2), bool)}
        return network.init(key, inputs, mutable=["params"])["params"]

    def check(inputs):
        # Branches of a text count from where it forks; whoever joined them knows how long each is.
        if "branch" not in inputs:
            check_length(inputs["tokens"].shape[1], positions)

    def apply(base, adapters, inputs, key=None):
        check(inputs)
        rngs = {} if key is None else {"dropout": key}
        return network.apply({"params": base, "adapters": adapters}, inputs, rngs=rngs)

    def taps(base, adapters, inputs, key=None):
        check(inputs)
        rngs = {} if key is None else {"dropout": key}
        variables = {"params": base, "adapters": adapters}
        outputs, side = network.apply(variables, inputs, rngs=rngs, mutable=["taps"])
        return outputs, side["taps"]

    return init, apply, taps


def check_length(tokens: int, positions: int) -> None:
    """Raises ValueError for a text that is too long."""
    if tokens > positions:
        raise ValueError(f"texts have {tokens} tokens, but the model has positions for {positions}")
