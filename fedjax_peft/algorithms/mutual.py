"""FedMutual and FedAPEN: a private and a shared LoRA that teach each other on a client and answer together.

References:
  Zhang et al., Deep Mutual Learning, arXiv 1706.00384; Shen et al., Federated Mutual Learning, arXiv 2006.16765.
  Qin et al., FedAPEN: Personalized Cross-silo Federated Learning with Adaptability to Statistical Heterogeneity, KDD
  2023, doi 10.1145/3580305.3599344.
  Zhang et al., FedAMoLE, arXiv 2411.19128, whose forms of both these are.

    private   minimizes  CE(z_p) + KL(p_s || p_p) [+ CE(w z_p + (1 - w) z_s)]      of z_s nothing is trained
    shared    minimizes  CE(z_s) + KL(p_p || p_s) [+ the same]                     of z_p nothing is trained
    server    mean of the shared
    use       w z_p + (1 - w) z_s, after training both a little further

In FedMutual w is 1/2 and there is no term in brackets. In FedAPEN each client fits its w, which starts there: to what
it receives before it trains, and to what it has trained before it is evaluated. Private adapters are drawn for each
client. (In the published code they start equal to the shared one; only dropout tells the two apart in the first round.)

What a client is evaluated with is a pair of adapters, which models and evaluation meet in `ensembled(model)`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import struct

from fedjax_peft import adapters as adapters_lib
from fedjax_peft import local, trees
from fedjax_peft.algorithms import fedavg
from fedjax_peft.types import Algorithm, Array, Batches, Model, PyTree, Task

# Folded into a key for what the private model draws; larger than any step or site, so that the shared one goes on
# drawing exactly what it does in FedIT.
PRIVATE = 2**31 - 1
REDUCTIONS, SOURCES = ("tokens", "elements"), ("aux", "train")


@struct.dataclass
class Client:
    private: PyTree  # leaves of its own adapters that are trained
    weight: Array  # [] float32, w


@struct.dataclass
class Pair:
    """What a client has at a site; w is the same at all of them."""

    private: PyTree
    shared: PyTree
    weight: Array  # []

    def __call__(self, x: Array, key: Array | None = None) -> Array:
        raise ValueError("pairs of adapters are taken apart by `mutual.ensembled`, which this model is not")

    def merged(self, params: dict) -> dict:
        raise ValueError("two models answer together: they cannot be merged into the weights of one")


def ensembled(model: Model) -> Model:
    """The model for pairs of adapters, whose outputs it mixes; adapters of other kinds are called as they are."""

    def apply(base, adapters, inputs, key=None):
        if not _is_pair(adapters):
            return model.apply(base, adapters, inputs, key)
        private, shared, weight = _apart(adapters)
        return _mixed(weight, *(model.apply(base, own, inputs, key) for own in (private, shared)))

    def init_cache(batch, slots):
        return model.init_cache(batch, slots), model.init_cache(batch, slots)

    def decode(base, adapters, caches, inputs):
        if not _is_pair(adapters):
            logits, cache = model.decode(base, adapters, caches[0], inputs)
            return logits, (cache, caches[1])
        private, shared, weight = _apart(adapters)
        first, second = (
            model.decode(base, own, cache, inputs) for own, cache in zip((private, shared), caches, strict=True)
        )
        return _mixed(weight, first[0], second[0]), (first[1], second[1])

    wrapped = model._replace(apply=apply)
    return wrapped if model.decode is None else wrapped._replace(init_cache=init_cache, decode=decode)


def fedmutual(
    model: Model,
    task: Task,
    init_adapters: Callable[[Array], PyTree],
    optimizer: optax.GradientTransformation,
    **settings,
) -> Algorithm:
    """FedMutual; settings as in `fedapen`, without those of w."""
    return _mutual(model, task, init_adapters, optimizer, fit=None, **settings)


def fedapen(
    model: Model,
    task: Task,
    init_adapters: Callable[[Array], PyTree],
    optimizer: optax.GradientTransformation,
    *,
    fit_on: str = "aux",
    fit_epochs: int = 10,
    fit_rate: float = 1e-3,
    **settings,
) -> Algorithm:
    """FedAPEN.

    Args:
      model, task: what is trained, and on what loss. The model need not be `ensembled`, that of the evaluation must.
      init_adapters: (key) -> adapters.
      optimizer: of each of the two by itself; it starts afresh each round.
      fit_on: examples that w is fitted to: `aux`, held out for the client and given as `constants["aux"]`, a dict of
        `inputs` {name: [A, B, T]}, `labels` [A, B, ..] and `weights` [A, B]; or the round's own batches, `train`.
      fit_epochs: walks through these, a step of Adam a batch. Each step calls both models once.
      fit_rate: Adam's learning rate, its epsilon is 1e-6. After every step w is clipped to [0, 1].
      settings: `kl_reduce`: the divergence is summed over the vocabulary and averaged over the `tokens` of answers, or
        averaged over all `elements` of the logits of all real tokens, as in the published code, which makes it smaller
        by about the size of the vocabulary and needs the logits of whole texts. `kl_weight`: factor on it.
        `server_optimizer`, `weighting` (by default `uniform`), `schedule` and `personal_rate` as in `fedavg.fedavg`.

    Raises:
      ValueError: a setting that there is not; when traced, no held-out examples, or a task that neither classifies
        texts nor continues them.
    """
    if fit_on not in SOURCES:
        raise ValueError(f"algorithm.fit_on is {fit_on!r}, expected one of {', '.join(SOURCES)}")
    if fit_epochs < 0:
        raise ValueError(f"algorithm.fit_epochs is {fit_epochs}, expected 0 or more")
    if not fit_rate > 0:
        raise ValueError(f"algorithm.fit_rate is {fit_rate}, expected a positive number")

    def fit(base, pair, weight, batches):
        texts = local.held_out(batches, "fit_on") if fit_on == "aux" else batches.replace(constants={})
        return fit_weight(model, task, base, pair, weight, texts, epochs=fit_epochs, rate=fit_rate)

    method = _mutual(model, task, init_adapters, optimizer, fit=fit, **settings)
    return method._replace(aux="fit_on" if fit_on == "aux" else None)


def _mutual(
    model: Model,
    task: Task,
    init_adapters: Callable[[Array], PyTree],
    optimizer: optax.GradientTransformation,
    *,
    fit: Callable[..., Array] | None,
    kl_reduce: str = "tokens",
    kl_weight: float = 1.0,
    server_optimizer: optax.GradientTransformation | None = None,
    weighting: str = "uniform",
    schedule: optax.Schedule | None = None,
    personal_rate: float = 1.0,
) -> Algorithm:
    """What both have in common; `fit`: (base, pair of adapters, w, batches) -> w, None where it is not fitted."""
    if kl_reduce not in REDUCTIONS:
        raise ValueError(f"algorithm.kl_reduce is {kl_reduce!r}, expected one of {', '.join(REDUCTIONS)}")
    if not kl_weight >= 0:
        raise ValueError(f"algorithm.kl_weight is {kl_weight}, expected 0 or more")
    federated = fedavg.fedit(
        model, task, init_adapters, optimizer, server_optimizer=server_optimizer, weighting=weighting
    )
    each = _each(optimizer)

    def init_client(server, client_id, key):
        del server, client_id
        return Client(adapters_lib.trained(init_adapters(key)), jnp.float32(0.5))

    def whole(server, both):
        fixed = adapters_lib.fixed(server.adapters)
        return tuple(trees.join(own, fixed) for own in both)

    def train(base, server, client, batches, key, rate):
        ensemble = None if fit is None else client.weight
        loss = objective(model, task, base, ensemble=ensemble, kl_reduce=kl_reduce, kl_weight=kl_weight)

        def of_trained(both, batch, key):
            return loss(whole(server, both), batch, key)

        start = client.private, adapters_lib.trained(server.adapters)
        both, _, metrics = local.train(of_trained, each, start, each.init(start), batches, key, rate=rate)
        return both, metrics

    def fitted(base, server, client, both, batches):
        if fit is None:
            return client
        return client.replace(weight=fit(base, whole(server, both), client.weight, batches))

    def client_update(base, server, client, batches, key):
        received = adapters_lib.trained(server.adapters)
        client = fitted(base, server, client, (client.private, received), batches)
        rate = 1.0 if schedule is None else schedule(server.round)
        (private, shared), metrics = train(base, server, client, batches, key, rate)
        upload = trees.subtract(shared, received)
        metrics |= {"update_norm": jnp.sqrt(trees.squared_norm(upload))}
        metrics |= {} if fit is None else {"weight": client.weight}
        return client.replace(private=private), upload, metrics

    def personalize(base, server, client, batches, key):
        both, _ = train(base, server, client, batches, key, personal_rate)
        weight = fitted(base, server, client, both, batches).weight
        private, shared = (adapters_lib.nodes(tree) for tree in whole(server, both))
        return adapters_lib.nest({path: Pair(private[path], shared[path], weight) for path in private})

    return federated._replace(init_client=init_client, client_update=client_update, personalize=personalize)


def objective(
    model: Model,
    task: Task,
    base: PyTree,
    *,
    ensemble: Array | None = None,
    kl_reduce: str = "tokens",
    kl_weight: float = 1.0,
) -> local.Loss:
    """The sum of both models' losses as a function of (private, shared) adapters; each gradient is that of its own.

    The ensemble's loss, w [] in `ensemble`, is in the sum once: to either model the other's logits are a constant, so
    that the derivative by both is each one's own. The metric `loss` is that of the shared model.
    """

    def loss(both, batch, key):
        keys = jax.random.fold_in(key, PRIVATE), key
        said = [_said(model, base, own, batch, one, kl_reduce) for own, one in zip(both, keys, strict=True)]
        (private, all_private), (shared, all_shared) = said
        counted = _counted(all_shared, batch, kl_reduce)
        apart = divergence(all_shared, all_private, counted, kl_reduce)
        apart = apart + divergence(all_private, all_shared, counted, kl_reduce)
        metrics = {
            "loss": local.mean_loss(task, shared, batch),
            "private_loss": local.mean_loss(task, private, batch),
            "kl": apart / 2,
        }
        total = metrics["loss"] + metrics["private_loss"] + kl_weight * apart
        if ensemble is not None:
            metrics["ensemble_loss"] = local.mean_loss(task, _mixed(ensemble, private, shared), batch)
            total = total + metrics["ensemble_loss"]
        return total, metrics

    return loss


def divergence(teacher: Array, student: Array, counted: Array, reduce: str) -> Array:
    """KL(teacher || student) of logits [.., V], of which only the student is trained.

    Args:
      counted: [..] weights of the distributions in the mean.
      reduce: `tokens` sums over V, `elements` averages over it.
    """
    teacher, student = jax.nn.log_softmax(jax.lax.stop_gradient(teacher)), jax.nn.log_softmax(student)
    each = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
    mean = jnp.sum(jnp.where(counted > 0, each * counted, 0.0)) / jnp.maximum(jnp.sum(counted), 1.0)
    return mean / student.shape[-1] if reduce == "elements" else mean


def fit_weight(
    model: Model,
    task: Task,
    base: PyTree,
    pair: tuple[PyTree, PyTree],
    weight: Array,
    texts: Batches,
    *,
    epochs: int,
    rate: float,
) -> Array:
    """w [] after steps of Adam on the ensemble's loss, without dropout; no examples leave it as it is.

    Args:
      pair: (private, shared) adapters.
      texts: `[A, B, ..]`, a step each.
    """
    # Models that agree but for rounding leave w where it is: with optax' own epsilon Adam would follow the rounding.
    adam = optax.adam(rate, eps=1e-6)

    def loss(weight, batch):
        return local.mean_loss(task, _mixed(weight, *(model.apply(base, own, batch.inputs) for own in pair)), batch)

    def step(carry, batch, _):
        weight, state = carry
        updates, state = adam.update(jax.grad(loss)(weight, batch), state, weight)
        return (jnp.clip(optax.apply_updates(weight, updates), 0.0, 1.0), state), {}

    def epoch(carry, _):
        return local.scan(step, carry, texts, jax.random.key(0))[0], None  # of which nothing is drawn

    (weight, _), _ = jax.lax.scan(epoch, (weight, adam.init(weight)), length=epochs)
    return weight


def _said(model, base, adapters, batch, key, kl_reduce) -> tuple[Array, Array]:
    """Outputs that the loss reads, and those that are compared."""
    inputs = batch.inputs
    if kl_reduce == "tokens" or "chosen" not in inputs:
        outputs = model.apply(base, adapters, inputs, key)
        return outputs, outputs
    every = model.apply(base, adapters, {name: inputs[name] for name in inputs if name != "chosen"}, key)
    return jnp.take_along_axis(every, inputs["chosen"][..., None], 1), every


def _counted(outputs: Array, batch: Batches, kl_reduce: str) -> Array:
    """Weights of the distributions that two models are compared by: [B], or [B, P] of each token."""
    examples = jnp.maximum(batch.weights, 0.0)
    if outputs.ndim == 2:
        return examples
    if not isinstance(batch.labels, dict) or "targets" not in batch.labels:
        raise ValueError("mutual learning compares classes or next tokens, expected a task that has either")
    if kl_reduce == "elements":
        return examples[:, None] * batch.inputs["mask"]
    return examples[:, None] * (batch.labels["targets"][:, : outputs.shape[1]] >= 0)


def _mixed(weight: Array, private: PyTree, shared: PyTree) -> PyTree:
    return jax.tree.map(lambda p, s: weight * p + (1 - weight) * s, private, shared)


def _each(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer of two trees, each by itself: what it does to one does not depend on the other."""

    def init(both):
        return tuple(optimizer.init(own) for own in both)

    def update(gradients, states, both):
        found = [optimizer.update(*own) for own in zip(gradients, states, both, strict=True)]
        return tuple(zip(*found, strict=True))

    return optax.GradientTransformation(init, update)


def _is_pair(adapters: PyTree) -> bool:
    return any(isinstance(node, Pair) for node in adapters_lib.nodes(adapters).values())


def _apart(adapters: PyTree) -> tuple[PyTree, PyTree, Array]:
    """(private, shared, w)."""
    nodes = adapters_lib.nodes(adapters)
    private = adapters_lib.nest({path: node.private for path, node in nodes.items()})
    shared = adapters_lib.nest({path: node.shared for path, node in nodes.items()})
    return private, shared, next(iter(nodes.values())).weight
