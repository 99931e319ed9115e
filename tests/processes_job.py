"""What each of several processes does for algorithms_test.py: two rounds of every method, and a population on disk.

Run as `python processes_job.py COORDINATOR PROCESSES PROCESS FOLDER METHODS`, rows of the contract's table with commas
between them; the first process leaves results.pickle in the folder.
"""

import pathlib
import pickle
import sys

import jax
import numpy as np

from fedjax_peft import checkpoint, loop, population, processes, rounds

STATEFUL = "pf2lora"


def play(method, mesh):
    """Two rounds as in `federation.run`, with the slots and clients of this process alone."""
    import algorithms_test
    import federation

    ids = np.array(algorithms_test.COHORT, np.int32)
    own = ids[rounds.here(len(ids))]
    base = rounds.shard_base(federation.base(), mesh)
    server = rounds.make_init(method, mesh)(jax.random.key(0))
    people = population.create(rounds.client_states(method, server), federation.CLIENTS)
    step = rounds.make_round(method, mesh, 1)
    for index in range(2):
        given = (*population.gather(people, ids), federation.data(index, own), federation.members(own))
        arguments = [rounds.place(part, mesh) for part in given]
        server, states, cohort, _ = step(base, server, *arguments, index, jax.random.key(0))
        if method.host_step is not None:
            server = rounds.replicate(method.host_step(server), mesh)
        states = jax.device_get(rounds.local(states, mesh))
        population.scatter(people, ids, states, np.asarray(cohort.reported))
    return server, people


def outcome(server, people):
    return jax.device_get(server), population.everyone(people), people.known


def main(coordinator: str, count: str, index: str, folder: str, names: str) -> None:
    processes.connect(coordinator, int(count), int(index))
    # These compute something as they are imported, which must come after.
    import algorithms_test
    import federation

    mesh, folder, results = rounds.make_mesh(), pathlib.Path(folder), {}
    for name in names.split(","):
        server, people = play(algorithms_test.algorithm(name), mesh)
        results[name] = outcome(server, people)
        if name == STATEFUL:
            loop.save(checkpoint.manager(folder / "several"), folder / "several", 2, server, people)
    method = algorithms_test.algorithm(STATEFUL)
    results["read"] = outcome(*loop.final(method, mesh, federation.CLIENTS, folder / "one"))
    if processes.first():
        (folder / "results.pickle").write_bytes(pickle.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
