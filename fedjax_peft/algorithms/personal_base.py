"""Bases that differ from client to client: any algorithm on top of adapters that belong to the client.

Personalized methods such as FedDPA or DEPT end with a common base and a part of each client. A further stage then
personalizes the two together; no algorithm has to know.
"""

from fedjax_peft import adapters as adapters_lib
from fedjax_peft.types import Algorithm, Model


def beside(model: Model) -> Model:
    """The model for a base that is a pair: (base, adapters that belong to it)."""

    def apply(base, adapters, inputs, key=None):
        base, part = base
        return model.apply(base, adapters_lib.beside(part, adapters), inputs, key)

    def taps(base, adapters, inputs, key=None):
        base, part = base
        return model.taps(base, adapters_lib.beside(part, adapters), inputs, key)

    return model._replace(apply=apply, taps=taps)


def personal_base(algorithm: Algorithm) -> Algorithm:
    """The algorithm, made for `beside(model)`, on clients whose part of the base is `constants["part"]`.

    What it personalizes is joined with the part, so that it can be evaluated on the common base.
    """

    def client_update(base, server, client, batches, key):
        return algorithm.client_update((base, batches.constants["part"]), server, client, batches, key)

    def personalize(base, server, client, batches, key):
        part = batches.constants["part"]
        return adapters_lib.concat(part, algorithm.personalize((base, part), server, client, batches, key))

    def observe(base, inputs, weights, constants):
        return algorithm.observe((base, constants["part"]), inputs, weights, constants)

    return algorithm._replace(
        client_update=client_update, personalize=personalize, observe=algorithm.observe and observe
    )
