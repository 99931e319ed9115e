"""FedDPA-T: a global trajectory that the local adapters never touch, and local adapters that stay where they are."""

import functools

import federation
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from federation import assert_close, assert_same

from fedjax_peft import adapters, local, tasks, trees
from fedjax_peft.algorithms import fedavg, feddpa

MODEL, TASK, SGD = toy.model(), tasks.classification(), optax.sgd(0.5)
COHORT = [4, 0, 3, 2]  # clients 1 and 5 stay out
GLOBAL, LOCAL = 2, 3  # ranks


def init_adapters(**settings):
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0))
    known = {"rank": GLOBAL, "alpha": 4.0, "targets": "query"}
    return functools.partial(adapters.init, shapes=shapes, **known | settings)


def make(init=None, **settings):
    return feddpa.feddpa(MODEL, TASK, init or init_adapters(), SGD, **{"local_rank": LOCAL} | settings)


@functools.cache
def played():
    """Two rounds of the default method: (method, state)."""
    method = make()
    return method, federation.run(method, COHORT)[0]


@functools.cache
def jitted(method):
    """(client_update, personalize) on the toy's base, of one client."""
    base = federation.base()
    return jax.jit(functools.partial(method.client_update, base)), jax.jit(functools.partial(method.personalize, base))


def update(method, *arguments):
    return jitted(method)[0](*arguments, jax.random.key(0))


def personalize(method, *arguments):
    return jitted(method)[1](*arguments, jax.random.key(0))


def as_trained(server, upload):
    """The global adapter of a client after its own training."""
    received = server.common.adapters
    trained = trees.add(trees.select(received, lambda leaf: leaf != "scale"), upload)
    return trees.join(trained, trees.select(received, lambda leaf: leaf == "scale"))


def client_of(state, index):
    return jax.tree.map(lambda leaf: leaf[index], state.population.states)


def batches_of(index, steps=None):
    batches = federation.data(0, [index]).replace(constants={}, widths=())
    return jax.tree.map(lambda leaf: leaf[0, :steps], batches)


def logits(tree, model_base=None):
    inputs = batches_of(0).inputs
    base = federation.base() if model_base is None else model_base
    return MODEL.apply(base, tree, jax.tree.map(lambda leaf: leaf[0], inputs))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_global_trajectory_is_uniform_fedit(dropout):
    init = init_adapters(dropout=dropout)
    found, played = federation.run(make(init, weighting="uniform"), COHORT)
    expected, fedit = federation.run(fedavg.fedit(MODEL, TASK, init, SGD, weighting="uniform"), COHORT)
    assert_same(found.server.common, expected.server)
    assert_same(played.metrics["clients"]["loss"], fedit.metrics["clients"]["loss"])


def test_clients_are_weighted_by_examples_unless_uniform():
    cohort, uploads = federation.members(COHORT), {"x": jnp.arange(4.0)}
    for weighting, weight in (("examples", federation.EXAMPLES[COHORT].sum()), ("uniform", 4)):
        assert make(weighting=weighting).fold(uploads, cohort).weight == weight


def test_without_weight_clients_have_the_global_model():
    for method, expected in ((make(local_weight=0.0), True), (played()[0], False)):
        server = method.init(jax.random.key(0))
        client = method.init_client(server, 4, jax.random.key(0))
        client, _, _ = update(method, server, client, batches_of(4))
        personal = personalize(method, server, client, batches_of(4))
        same = np.allclose(logits(personal), logits(server.common.adapters), rtol=1e-6, atol=1e-6)
        assert same == expected


def test_local_adapters_are_trained_beside_the_global_one_as_trained():
    method, state = played()
    client, batches = client_of(state, 4), batches_of(4, 1)
    after, upload, _ = update(method, state.server, client, batches)
    frozen, received = as_trained(state.server, upload), state.server.common.adapters
    batch = jax.tree.map(lambda leaf: leaf[0], batches)
    loss = local.objective(MODEL, TASK, federation.base())

    def value(own, frozen):
        return loss(adapters.concat(frozen, own), batch, None)[0]

    def stepped(frozen):
        slope = jax.jit(jax.grad(value))(client.local, frozen)
        rates = {"a": 0.5, "b": 0.5, "scale": 0.0}
        return jax.tree_util.tree_map_with_path(lambda path, x, g: x - rates[path[-1].name] * g, client.local, slope)

    assert_close(after.local, stepped(frozen), 1e-6)
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), stepped(frozen), stepped(received))
    assert max(jax.tree.leaves(moved)) > 1e-4, "training beside the global adapter as received would look the same"


def test_the_frozen_part_has_no_dropout():
    method = make(init_adapters(dropout=0.5), local_weight=0.0)
    server, batches = method.init(jax.random.key(0)), batches_of(4, 1)
    filled = jax.tree.map(lambda leaf: leaf + 0.1, server.common.adapters)  # at B = 0 dropout would not show
    server = server.replace(common=server.common.replace(adapters=filled))
    client = method.init_client(server, 4, jax.random.key(0))
    _, upload, metrics = update(method, server, client, batches)
    batch = jax.tree.map(lambda leaf: leaf[0], batches)
    loss = jax.jit(local.objective(MODEL, TASK, federation.base()))
    frozen = as_trained(server, upload)
    np.testing.assert_allclose(metrics["local_loss"], loss(frozen, batch, None)[0], rtol=1e-5)
    assert abs(loss(frozen, batch, jax.random.key(0))[0] - metrics["local_loss"]) > 1e-3
    assert all(node.dropout == 0 for node in adapters.nodes(feddpa.part(client)).values())


def test_uploads_hold_the_global_part_and_do_not_depend_on_the_local_one():
    method, state = played()
    client = client_of(state, 4)
    _, upload, _ = update(method, state.server, client, batches_of(4))
    other = client.replace(local=jax.tree.map(lambda leaf: leaf + 1, client.local))
    assert_same(update(method, state.server, other, batches_of(4))[1], upload)
    shapes = jax.tree.map(jnp.shape, trees.select(init_adapters()(jax.random.key(0)), lambda leaf: leaf != "scale"))
    assert jax.tree.map(jnp.shape, upload) == shapes
    size = sum(leaf.size for leaf in jax.tree.leaves(upload))
    assert method.traffic(state.server) == (size, size)


def test_clients_that_were_never_sampled_have_the_initial_part():
    method, state = played()
    assert list(np.flatnonzero(~state.population.known)) == [1, 5]
    first, second = (method.init_client(state.server, index, jax.random.key(index)) for index in (1, 5))
    assert_same(feddpa.part(first), feddpa.part(second))
    started = federation.begin(method).server
    assert_same(state.server.local, started.local)
    node, trained = (feddpa.part(c)["encoder"]["layer"]["query"]["delta"] for c in (first, client_of(state, 4)))
    assert np.abs(node.a).max() > 0 and not node.b.any() and np.abs(trained.b).max() > 1e-3
    assert list(adapters.nodes(first.local)) == [("encoder", "layer", "query")], "the head is global"
    nothing = jax.tree.map(lambda leaf: leaf[:0], batches_of(1))
    personal = personalize(method, state.server, first, nothing)
    np.testing.assert_array_equal(logits(personal), logits(state.server.common.adapters))


def test_personalization_trains_the_local_adapter_only():
    method, state = played()
    client = client_of(state, 4)
    personal = personalize(method, state.server, client, batches_of(4))
    received = state.server.common.adapters
    assert_same(personal["classifier"], received["classifier"])
    node, common = (tree["encoder"]["layer"]["query"]["delta"] for tree in (personal, received))
    assert node.a.shape[-1] == GLOBAL + LOCAL
    np.testing.assert_array_equal(node.b[..., :GLOBAL, :], common.b)
    assert np.abs(node.b[..., GLOBAL:, :] - client.local["encoder"]["layer"]["query"]["delta"].b).max() > 1e-4


def test_a_further_stage_starts_from_what_the_client_had():
    method, state = played()
    client = client_of(state, 4)
    nothing = jax.tree.map(lambda leaf: leaf[:0], batches_of(4))
    personal = personalize(method, state.server, client, nothing)
    merged = adapters.merge(federation.base(), feddpa.shared(state.server))
    adapters.check_sites(feddpa.part(client), merged)
    np.testing.assert_allclose(logits(feddpa.part(client), merged), logits(personal), rtol=1e-5, atol=1e-5)


def test_moments_are_kept_if_asked():
    method = feddpa.feddpa(MODEL, TASK, init_adapters(), optax.adam(0.02), keep_optimizer=True)
    server = method.init(jax.random.key(0))
    client = method.init_client(server, 4, jax.random.key(0))
    for rounds in (1, 2):
        client, _, _ = update(method, server, client, batches_of(4))
        assert client.optimizer[0].count == client.common.optimizer[0].count == 3 * rounds


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"local_rank": 0}, "algorithm.local_rank is 0, expected 1 or more"),
        ({"local_weight": -0.5}, "algorithm.local_weight is -0.5, expected 0 or more"),
        ({"init": init_adapters(kind="full")}, "adapter.kind must be 'lora'"),
        ({"weighting": "size"}, "algorithm.weighting is 'size'"),
    ],
)
def test_mistakes(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(**change)
