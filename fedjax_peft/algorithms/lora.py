"""LoRA without a federation: every client fine-tunes its own on the same base. Hu et al., arXiv 2106.09685.

The baseline of rank selection: under a budget of r ranks a site, all sites have the first r of the R ranks, so the
start is that of a LoRA of rank r, and alpha / r stays what it is at R.
"""

from collections.abc import Callable

import optax

from fedjax_peft import adapters as adapters_lib
from fedjax_peft import local, ranks, trees
from fedjax_peft.types import Algorithm, Array, Batches, Model, PyTree, Task


def lora(
    model: Model,
    task: Task,
    init_adapters: Callable[[Array], PyTree],
    optimizer: optax.GradientTransformation,
    *,
    multiplier: float = 1.0,
    personal_rate: float = 1.0,
) -> Algorithm:
    """LoRA at a uniform rank.

    Args:
      model, task: what is trained, and on what loss.
      init_adapters: (key) -> adapters.
      optimizer: of the client.
      multiplier: of alpha / R, to compare with methods that learn a scale.
      personal_rate: factor on the learning rate.
    """
    if not multiplier > 0:
        raise ValueError(f"algorithm.multiplier is {multiplier}, expected more than 0")
    layout = ranks.layout(ranks.concrete(init_adapters))

    def train(base, adapters, batches, key):
        mask = ranks.first((layout.sites, layout.rank), batches.constants.get("budget", layout.rank))
        adapters = ranks.scaled(layout, adapters, multiplier * mask)
        return fine_tune(model, task, base, adapters, optimizer, batches, key, rate=personal_rate)

    return alone(init_adapters, train)


def alone(init_adapters: Callable[[Array], PyTree], train: Callable[..., tuple[PyTree, dict]]) -> Algorithm:
    """A method in which nothing is shared but the adapters that all start from.

    Args:
      init_adapters: (key) -> adapters.
      train: (base, adapters, batches, key) -> (adapters, metrics) of one client, at its budget if it has one.
    """

    def client_update(base, server, client, batches, key):
        return client, (), train(base, server, batches, key)[1]

    return Algorithm(
        init=init_adapters,
        init_client=lambda server, client_id, key: (),
        client_update=client_update,
        fold=lambda uploads, cohort: (),
        server_update=lambda server, sums: (server, {}),
        personalize=lambda base, server, client, batches, key: train(base, server, batches, key)[0],
        traffic=lambda server: (0, 0),
        budgets=True,
    )


def fine_tune(
    model: Model,
    task: Task,
    base: PyTree,
    adapters: PyTree,
    optimizer: optax.GradientTransformation,
    batches: Batches,
    key: Array,
    *,
    rate: Array | float = 1.0,
) -> tuple[PyTree, dict[str, Array]]:
    """Trains all of the adapters but their scales on the batches of one client: (adapters, mean metrics)."""
    loss = local.objective(model, task, base)
    fixed = adapters_lib.fixed(adapters)
    start = adapters_lib.trained(adapters)

    def objective(trained, batch, key):
        return loss(trees.join(trained, fixed), batch, key)

    trained, _, metrics = local.train(objective, optimizer, start, optimizer.init(start), batches, key, rate=rate)
    return trees.join(trained, fixed), metrics
