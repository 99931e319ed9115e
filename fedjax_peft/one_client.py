"""What one client of a finished run, or its server, ended with."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from fedjax_peft import loop, population, rounds
from fedjax_peft.types import PyTree


def adapt(
    run: Any,
    workdir: epath.PathLike,
    client: int,
    point: str | None = None,
    check: Callable[[PyTree], None] = lambda shapes: None,
) -> PyTree:
    """Adapters of one client, as the evaluation after the last round had them.

    Args:
      run: an `experiment.Rebuilt`.
      workdir: its directory.
      client: its number.
      point: name of an evaluation point; None is the headline one.
      check: told the shapes of the adapters before they are computed.

    Raises:
      ValueError: no such client or point, or no finished rounds.
    """
    stage, count = run.stage, len(run.ground.federation.names)
    if not 0 <= client < count:
        raise ValueError(f"--client is {client}, expected 0 to {count - 1}")
    if not stage.points or point not in (None, *stage.points):
        known = ", ".join(stage.points) or "none, as the run personalizes nobody"
        raise ValueError(f"--point is {point!r}, expected one of: {known}")
    algorithm, support, trained = stage.points[point] if point else next(iter(stage.points.values()))
    absent, root = len(stage.clients.names), jax.random.key(run.config.seed)
    if trained and run.config.rounds:
        server, people = loop.final(stage.algorithm, stage.mesh, absent, workdir)
    else:
        server = rounds.make_init(algorithm, stage.mesh)(root)
        people = population.create(rounds.client_states(algorithm, server), absent)
    group = rounds.slots_for(1, stage.mesh, 1)
    ids = np.array([client] + [absent] * (group - 1), np.int32)
    personalize = rounds.make_personalize(algorithm, stage.mesh, 1)
    states = rounds.place(population.gather(people, ids), stage.mesh)
    batches = rounds.place(support(ids), stage.mesh)
    arguments = run.base, server, *states, batches, rounds.place(ids, stage.mesh), run.config.rounds, root
    check(jax.eval_shape(lambda *arguments: _first(personalize(*arguments)), *arguments))
    return _first(personalize(*arguments))


def shared(run: Any, workdir: epath.PathLike) -> tuple[PyTree, PyTree]:
    """The server after the last round and its adapters, None if it has none; arguments as in `adapt`."""
    stage = run.stage
    server, _ = loop.final(stage.algorithm, stage.mesh, len(stage.clients.names), workdir)
    return server, stage.algorithm.shared and stage.algorithm.shared(server)


def number(names: tuple[str, ...], client: int | str) -> int:
    """The number of a client that may be given by its name, or as `name:NAME` where names are numbers too."""
    said = str(client)
    name = said.removeprefix("name:")
    if said.isdecimal():
        if isinstance(client, str) and said in names and names.index(said) != int(said):
            raise ValueError(f"--client={said} is the number of one client and the name of another: say name:{said}")
        return int(said)
    if name not in names:
        raise ValueError(f"--client is {client!r}, expected 0 to {len(names) - 1} or a name as in clients.parquet")
    return names.index(name)


def _first(own: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[0], own)
