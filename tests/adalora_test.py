import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from fedjax_peft import adapters, ranks, tasks, trees
from fedjax_peft.algorithms import adalora

KEY = jax.random.key(0)
MODEL, TASK = toy.model(), tasks.classification()
BASE = MODEL.init(jax.random.key(7))
ADAM = optax.adam(0.05)


def initial(**settings):
    shapes = jax.eval_shape(MODEL.init, KEY)
    given = {"rank": 6, "alpha": 12.0, "targets": "query", "head": "frozen"} | settings
    return functools.partial(adapters.init, shapes=shapes, **given)


def client(steps=8, budget=None, seed=0, size=4):
    """Batches of one client, every step with examples."""
    batches = jax.tree.map(lambda leaf: leaf[0], toy.batches(seed, 1, steps, size))
    constants = {"examples": np.float32(steps * size)}
    constants |= {} if budget is None else {"budget": np.int32(budget)}
    return batches.replace(constants=constants)


def build(optimizer=ADAM, init=None, **settings):
    return adalora.adalora(MODEL, TASK, init or initial(), optimizer, **settings)


def personal(method, batches, jit=True):
    server = method.init(KEY)
    run = jax.jit(method.personalize) if jit else method.personalize
    return run(BASE, server, (), batches, KEY)


def table(tree, init=None):
    return np.asarray(ranks.table(ranks.layout(ranks.concrete(init or initial())), tree))


def node(tree):
    return tree["encoder"]["layer"]["query"]["delta"]


def traced(monkeypatch, method, batches):
    """The state after each step, of a loop that stands in for the scan."""
    states = []

    def loop(step, state, batches, key):
        for index in range(len(batches.weights)):
            batch = jax.tree.map(lambda leaf, at=index: leaf[at], batches.replace(constants={}, widths=()))
            state, metrics = jax.jit(step)(state, batch, jax.random.fold_in(key, index))
            states.append(state)
        return state, metrics

    monkeypatch.setattr(adalora.local, "scan", loop)
    return personal(method, batches, jit=False), states


# What is kept


def test_target_times_sites_are_kept_after_the_last_allocation_by_one_compiled_program():
    method = build()
    server, run = method.init(KEY), jax.jit(method.personalize)
    for budget in (1, 2, 4, 6):
        for steps in (1, 2, 3, 4, 8):
            batches = client(8, budget)
            batches.weights[steps:] = 0
            scales = table(run(BASE, server, (), batches, KEY))
            assert np.count_nonzero(scales) == 2 * budget, (budget, steps)
    assert run._cache_size() == 1


def test_clients_of_all_sites_and_with_a_head_keep_as_many_and_train_the_head():
    init = initial(targets="all-linear", head="lora", rank=3)
    assert np.count_nonzero(table(personal(build(init=init), client(8, 2)), init)) == 2 * 3
    with_head = personal(build(init=initial(head="full")), client(8, 2))
    assert np.asarray(with_head["classifier"]["delta"].kernel).any()


def test_layers_that_targets_leave_out_stay_empty():
    init = initial(targets=r".*layer\.1\.query")
    method = build(init=init)
    trained = node(personal(method, client(8, 2)))
    assert np.count_nonzero(trained.scale[1]) == 2 and not np.asarray(trained.scale[0]).any()
    assert not np.asarray(node(method.init(KEY)).b[0]).any() and np.isfinite(trained.a).all()


def test_initial_ranks_are_cut_at_those_of_the_adapters(monkeypatch):
    # 1.5 x 5 = 7 of 6: all six take part, and only the difference to five is pruned.
    _, states = traced(monkeypatch, build(), client(8, 5))
    kept = [int(state.mask.sum()) for state in states]
    assert kept[0] == 12 and kept[-1] == 10


def test_without_steps_logits_are_those_of_the_base():
    batches = client(3, 2)
    none = jax.tree.map(lambda leaf: leaf[:0], batches.replace(constants={})).replace(constants=batches.constants)
    tree = personal(build(init=initial(head="full")), none)
    inputs = {name: value[0] for name, value in batches.inputs.items()}
    np.testing.assert_array_equal(MODEL.apply(BASE, tree, inputs), MODEL.apply(BASE, {}, inputs))


def test_without_pruning_it_is_plain_training_of_three_factors():
    batches, method = client(5), build(penalty=0.0)
    start, values = node(method.init(KEY)), jnp.zeros((2, 6))
    params = {"q": start.a, "p": start.b, "e": values}
    state = ADAM.init(params)

    @jax.jit
    def loss(params, inputs, labels):
        # W + 2 P diag(E) Q with explicit matrices.
        kernel = BASE["encoder"]["layer"]["query"]["kernel"] + 2.0 * jnp.einsum(
            "ldr,lr,lrf->ldf", params["q"], params["e"], params["p"], precision="highest"
        )
        layer = BASE["encoder"]["layer"]["query"] | {"kernel": kernel}
        logits = MODEL.apply(BASE | {"encoder": {"layer": {"query": layer}}}, {}, inputs)
        return jnp.mean(TASK.loss(logits, labels))

    for step in range(5):
        inputs = {name: value[step] for name, value in batches.inputs.items()}
        updates, state = ADAM.update(jax.grad(loss)(params, inputs, batches.labels[step]), state)
        params = optax.apply_updates(params, updates)
    trained = node(personal(method, batches.replace(width=np.ones(5, np.int32))))
    for ours, expected in ((trained.a, params["q"]), (trained.b, params["p"]), (trained.scale, 2.0 * params["e"])):
        np.testing.assert_allclose(ours, expected, rtol=2e-3, atol=2e-4)


def test_ranks_beyond_the_initial_ones_have_no_gradient(monkeypatch):
    # Rows of Adam's first moments are averages of gradients: exactly zero only if every gradient was.
    final, states = traced(monkeypatch, build(), client(6, 2))
    moments = states[-1].optimizer[0].mu
    assert not np.asarray(moments["values"])[:, 3:].any() and np.asarray(moments["values"])[:, :3].all()
    adapter = node(moments["adapters"])
    assert not np.asarray(adapter.a)[:, :, 3:].any() and not np.asarray(adapter.b)[:, 3:].any()
    assert np.asarray(adapter.a)[:, :, :3].any()
    # Nor do pruned ones from the loss of the final adapter.
    inputs = {name: value[0] for name, value in client().inputs.items()}
    slope = node(jax.grad(lambda tree: jnp.sum(MODEL.apply(BASE, tree, inputs)[:, 0]))(final))
    pruned = np.asarray(node(final).scale) == 0
    assert not np.asarray(slope.b)[pruned].any() and not np.asarray(slope.a).swapaxes(1, 2)[pruned].any()
    assert np.asarray(slope.b)[~pruned].any(-1).all()


def test_pruned_ranks_may_grow_back_until_the_last_allocation(monkeypatch):
    _, states = traced(monkeypatch, build(optax.adam(0.3), final=0.0), client(20, 2, seed=1))
    masks = [np.asarray(state.mask) for state in states]
    assert any(((later > 0) & (earlier == 0)).any() for earlier, later in zip(masks, masks[1:], strict=False))
    for state in states:
        assert not np.asarray(state.trained["values"])[np.asarray(state.mask) == 0].any()


def test_importance_is_frozen_from_the_last_allocation_on(monkeypatch):
    _, states = traced(monkeypatch, build(), client(10, 2))
    averages = [np.asarray(state.importance.sensitivity["values"]) for state in states]
    changes = [bool((later != earlier).any()) for earlier, later in zip(averages, averages[1:], strict=False)]
    assert changes == [True] * 6 + [False] * 3


def test_padding_steps_change_nothing():
    batches = client(4, 2)
    order = np.array([4, 0, 1, 5, 2, 3, 6])
    longer = jax.tree.map(lambda leaf: np.concatenate([leaf, leaf[:3]])[order], batches.replace(constants={}))
    longer = longer.replace(constants=batches.constants)
    longer.weights[[0, 3, 6]] = 0
    method = build()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
        personal(method, longer),
        personal(method, batches),
    )


def test_clients_side_by_side_are_those_one_after_the_other():
    method, counts = build(), (8, 5, 1)
    server, own = method.init(KEY), [client(8, budget, seed) for seed, budget in enumerate((1, 2, 4))]
    for batches, count in zip(own, counts, strict=True):
        batches.weights[count:] = 0
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *own).replace(widths=())
    run = lambda batches: method.personalize(BASE, server, (), batches, KEY)  # noqa: E731
    together = jax.jit(jax.vmap(run))(stacked)
    for index, batches in enumerate(own):
        alone = jax.jit(run)(batches.replace(widths=()))
        jax.tree.map(lambda a, b, at=index: np.testing.assert_allclose(a[at], b, rtol=1e-4, atol=1e-5), together, alone)


def test_the_published_scale_depends_on_the_initial_ranks():
    run = lambda scale: personal(build(optax.sgd(1e-3), scale=scale, penalty=0.0), client(1, 4))  # noqa: E731
    # One step of E from zero has the slope's factor in it, the scale has it once more.
    fixed, published = (table(run(scale)) for scale in ("fixed", "published"))
    kept = (fixed != 0) & (published != 0)
    assert kept.any()
    np.testing.assert_allclose((published / np.where(kept, fixed, 1))[kept], (8 / 6 / 2) ** 2, rtol=1e-4)


# The rule


def test_orthogonality_by_hand():
    init = initial(rank=2, alpha=2.0)
    layout, tree = ranks.layout(ranks.concrete(init)), adalora.normal_factors(KEY, init(KEY))
    a, b = np.asarray(node(tree).a), np.asarray(node(tree).b)
    for active in (np.ones((2, 2), np.float32), np.array([[1, 0], [1, 0]], np.float32)):
        count = int(active[0].sum())
        grams = [m[:, :count].T @ m[:, :count] for m in (*a, *(layer.T for layer in b))]
        expected = np.mean([np.linalg.norm(gram - np.eye(count)) for gram in grams])
        found = adalora.orthogonality(layout, trees.select(tree, lambda leaf: leaf != "scale"), jnp.asarray(active))
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_triplets_by_hand():
    init = initial(rank=2)
    layout = ranks.layout(ranks.concrete(init))
    tree = trees.select(init(KEY), lambda leaf: leaf != "scale")
    weights = {"adapters": jax.tree.map(jnp.ones_like, tree), "values": jnp.full((2, 2), 3.0)}
    gradients = {"adapters": jax.tree.map(lambda leaf: jnp.full_like(leaf, -2.0), tree), "values": jnp.ones((2, 2))}
    zeros = adalora.Importance(trees.zeros_like(weights), trees.zeros_like(weights))
    once = adalora.smoothed(zeros, weights, gradients, 0.85, 0.75)
    # |w g| = 3 for E: .45, and .25 |3 - .45|; 2 for each entry of P and Q.
    expected = 0.15 * 3 * 0.25 * 0.85 * 3 + 2 * (0.15 * 2 * 0.25 * 0.85 * 2)
    np.testing.assert_allclose(adalora.triplets(layout, once), np.full((2, 2), expected), rtol=1e-5)


def by_definition(step, total, first, target):
    begin, final = int(0.1 * total), int(0.3 * total)
    if step <= begin:
        return first
    return target + int((first - target) * max(total - final - step, 0) ** 3 / (total - final - begin) ** 3)


@pytest.mark.parametrize("total", [4, 5, 8, 10, 20, 37, 200])
def test_the_budget_falls_as_a_cube(total):
    for first, target in ((222, 148), (1776, 1184), (9, 8)):
        plan = adalora.make_plan(np.ones((total, 1)), jnp.int32(first), jnp.int32(target), 0.1, 0.3)
        steps = jnp.arange(int(plan.begin) + 1, total)
        found = jax.vmap(lambda step, plan=plan: adalora.remaining(plan, step))(steps)
        assert list(found) == [by_definition(int(step), total, first, target) for step in steps]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"initial": 0.5}, "algorithm.initial is 0.5, expected 1 or more times the budget"),
        ({"warmup": 0.7}, "algorithm.warmup is 0.7 and final 0.3, expected shares that leave steps between them"),
        ({"penalty": -0.1}, "algorithm.penalty is -0.1, expected 0 or more"),
        ({"scale": "peft"}, "algorithm.scale is 'peft', expected 'fixed' or 'published'"),
        ({"beta2": 1.0}, "algorithm.beta2 is 1.0, expected a number between 0 and 1"),
    ],
)
def test_mistakes_are_named_in_one_sentence(settings, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build(**settings)


# Against peft


@pytest.mark.parity
@pytest.mark.parametrize("total", [5, 10])
def test_every_step_equals_that_of_peft(monkeypatch, total):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    batches = client(total, 4, size=8)
    batches = batches.replace(width=np.ones(total, np.int32))
    method = build(optax.adam(0.02), scale="published")
    _, states = traced(monkeypatch, method, batches)

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.query = torch.nn.ModuleList([torch.nn.Linear(12, 12) for _ in range(2)])
            self.classifier = torch.nn.Linear(12, 3)

        def forward(self, x, mask, labels):
            for layer in self.query:
                x = torch.tanh(layer(x))
            logits = self.classifier((x * mask).sum(1) / mask.sum(1))
            return types.SimpleNamespace(loss=torch.nn.functional.cross_entropy(logits, labels))

    network, tensor = Network(), lambda x: torch.tensor(np.array(x))
    begin, final = int(0.1 * total), int(0.3 * total)
    settings = peft.AdaLoraConfig(
        init_r=6,
        target_r=4,
        tinit=begin,
        tfinal=final,
        total_step=total,
        deltaT=1,
        orth_reg_weight=0.1,
        lora_alpha=8,
        lora_dropout=0.0,
        target_modules=["query.0", "query.1"],
    )
    theirs = peft.get_peft_model(network, settings)
    stack, start = BASE["encoder"]["layer"]["query"], node(method.init(KEY))
    with torch.no_grad():
        for layer, module in enumerate(network.query):
            module.base_layer.weight.copy_(tensor(stack["kernel"][layer].T))
            module.base_layer.bias.copy_(tensor(stack["bias"][layer]))
            module.lora_A["default"].copy_(tensor(start.a[layer].T))
            module.lora_B["default"].copy_(tensor(start.b[layer].T))
        network.classifier.weight.copy_(tensor(BASE["classifier"]["kernel"].T))
        network.classifier.bias.copy_(tensor(BASE["classifier"]["bias"]))

    optimizer = torch.optim.Adam([p for p in theirs.parameters() if p.requires_grad], lr=0.02)
    for step, state in enumerate(states):
        rows = BASE["embeddings"]["word"]["embedding"][batches.inputs["tokens"][step]]
        mask = tensor(batches.inputs["mask"][step][..., None]).float()
        # Not theirs(..), which goes past the penalty unless the config names a task type.
        theirs.base_model(tensor(rows), mask, tensor(batches.labels[step]).long()).loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        ours = node(state.trained["adapters"])
        for layer, module in enumerate(network.query):
            values = module.lora_E["default"].detach().numpy()[:, 0]
            np.testing.assert_array_equal(np.asarray(state.mask)[layer] > 0, values != 0, err_msg=f"step {step}")
            np.testing.assert_allclose(state.trained["values"][layer], values, rtol=2e-3, atol=2e-5)
            for found, weight in ((ours.a[layer].T, module.lora_A), (ours.b[layer].T, module.lora_B)):
                np.testing.assert_allclose(found, weight["default"].detach().numpy(), rtol=2e-3, atol=2e-5)
    assert np.count_nonzero(states[-1].mask) == 8
