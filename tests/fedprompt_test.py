"""Virtual tokens: models against texts that really have them, training against FedAvg, and whole round trips."""

import functools

import decoder
import encoder
import federation
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from federation import assert_close, assert_same, snapshot
from flax import traverse_util

from fedjax_peft import adapters, generate, local, tasks, trees
from fedjax_peft.algorithms import fedprompt
from fedjax_peft.models import gpt2, llama

PROMPT, TASK, SGD, KEY = (3, 7, 4), tasks.classification(), optax.sgd(0.5), jax.random.key(5)
MODEL = fedprompt.prompted(toy.model(), 3)
TUNED = {"fedprompt": {"prompt": PROMPT}, "fedptuning": {"virtual_tokens": 3, "hidden": 4}}
SOME, WORDS = [4, 0, 3, 2], ("embeddings", "word")
both = pytest.mark.parametrize("name", TUNED)


def init_adapters(**settings):
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0))
    return functools.partial(adapters.init, shapes=shapes, **{"rank": 2, "targets": "query"} | settings)


@functools.cache
def make(name, **settings):
    return getattr(fedprompt, name)(MODEL, TASK, init_adapters(), SGD, **TUNED[name] | settings)


@functools.cache
def played(name):
    return federation.run(make(name), SOME)[0]


@functools.cache
def personalized(name):
    return jax.jit(make(name).personalize)


@functools.cache
def updated(name):
    return jax.jit(make(name).client_update)


APPLY = jax.jit(MODEL.apply)


def data(client, index=0):
    return jax.tree.map(lambda leaf: leaf[0], federation.data(index, [client]))


def none(client):
    """No steps."""
    return jax.tree.map(lambda leaf: leaf[:0], data(client).replace(constants={}))


@functools.cache
def built(kind):
    """(decoder, its weights, path of its words)."""
    config = decoder.config(kind) | {"n_layer" if kind == "gpt2" else "num_hidden_layers": 1}
    model = (gpt2.gpt2 if kind == "gpt2" else llama.llama)(config, scan=False)
    words = ("transformer", "wte") if kind == "gpt2" else ("model", "embed_tokens")
    base = jax.tree.map(jnp.asarray, encoder.weights(jax.eval_shape(model.init, KEY)))
    words = words if words[0] in base else words[1:]
    return model, base, words


def texts(left=False):
    """Inputs with real tokens on either side, and the same with the prompt as words in front of the first real one."""
    short = decoder.inputs(left=left)
    rows = len(short["tokens"])
    front = jnp.broadcast_to(jnp.array(PROMPT, jnp.int32)[None], (rows, 3))
    return short, {
        "tokens": jnp.concatenate([front, short["tokens"]], 1),
        "mask": jnp.concatenate([jnp.ones((rows, 3), bool), short["mask"]], 1),
    }


def prompt_at(words, change=0.0):
    return adapters.nest({words: fedprompt.Prompt(jnp.array(PROMPT, jnp.int32), jnp.full((3, decoder.WIDTH), change))})


@pytest.mark.parametrize(("kind", "left"), [("llama", False), ("tied", True), ("gpt2", False)])
def test_a_fresh_prompt_is_its_words(kind, left):
    model, base, words = built(kind)
    short, longer = texts(left)
    apply = jax.jit(fedprompt.prompted(model, 3).apply)
    expected = jax.jit(model.apply)(base, {}, longer)
    assert_close(apply(base, prompt_at(words), short), expected[:, 3:], 1e-5)
    chosen = jnp.array([[1, 9], [0, 6], [1, 1]], jnp.int32)
    found = apply(base, prompt_at(words), short | {"chosen": chosen})
    assert_close(found, jnp.take_along_axis(expected[:, 3:], chosen[..., None], 1), 1e-5)
    assert_same(apply(base, {}, short), jax.jit(model.apply)(base, {}, short))


def test_all_branches_of_a_text_see_virtual_tokens():
    model, base, words = built("llama")
    whole, branches = decoder.forked()
    apply = jax.jit(fedprompt.prompted(model, 3).apply)
    found = apply(base, prompt_at(words, 0.3), whole)[0]
    for tokens, places in branches:
        alone = {"tokens": tokens[None], "mask": np.ones((1, len(tokens)), bool)}
        assert_close(found[places], apply(base, prompt_at(words, 0.3), alone)[0], 1e-5)


@pytest.mark.parametrize("kind", ["tied", "gpt2"])
def test_virtual_tokens_have_vectors_of_their_own(kind):
    """Against a table whose rows of the prompt's words are the vectors: no other token may be one of them."""
    model, base, words = built(kind)
    short, longer = texts()
    # Words of the text keep their rows, so the vectors go where the text has no tokens.
    held = set(np.asarray(short["tokens"])[np.asarray(short["mask"])].tolist())
    free = [row for row in range(1, decoder.VOCABULARY) if row not in held][:3]  # 0 is padding
    longer["tokens"] = longer["tokens"].at[:, :3].set(jnp.array(free)[None])
    node = fedprompt.encoder(KEY, 3, decoder.WIDTH, 5)
    flat = traverse_util.flatten_dict(base)
    table = (*words, "embedding")
    other = flat | {table: flat[table].at[jnp.array(free)].set(node.vectors())}
    other = traverse_util.unflatten_dict(other)
    found = jax.jit(fedprompt.prompted(model, 3).apply)(base, adapters.nest({words: node}), short)
    expected = jax.jit(model.apply)(other, {}, longer)[:, 3:]
    kept = [row for row in range(decoder.VOCABULARY) if row not in free]  # a tied head has the rows as well
    np.testing.assert_allclose(found[..., kept], expected[..., kept], rtol=1e-4, atol=1e-5)


def test_generation_continues_what_the_model_says():
    model, base, words = built("tied")
    model, short = fedprompt.prompted(model, 3), decoder.inputs()
    noise = jax.random.normal(KEY, (2, 3, decoder.WIDTH)) * 2
    clients = adapters.nest({words: fedprompt.Prompt(jnp.tile(jnp.array(PROMPT, jnp.int32), (2, 1)), noise)})
    own = jax.jit(jax.vmap(generate.make_generate(model, new_tokens=4, end=(), pad=0), (None, 0, None)))
    found, _ = own(base, clients, short)
    apply = jax.jit(model.apply)
    for client in range(2):
        one = jax.tree.map(lambda leaf: leaf[client], clients)  # noqa: B023
        for row, length in enumerate((10, 7, 2)):
            text = np.asarray(short["tokens"])[row, :length].tolist()
            for step in range(4):
                padded = jnp.asarray([text + [0] * (14 - len(text))], jnp.int32)
                logits = apply(base, one, {"tokens": padded, "mask": jnp.arange(14)[None] < len(text)})
                text.append(int(jnp.argmax(logits[0, len(text) - 1])))
                assert text[-1] == found[client, row, step]
    assert (found[0] != found[1]).any()


def test_generation_without_virtual_tokens_is_the_models():
    model, base, _ = built("tied")
    short = decoder.inputs()
    found, expected = (
        jax.jit(generate.make_generate(one, new_tokens=3, end=(), pad=0))(base, {}, short)
        for one in (fedprompt.prompted(model, 3), model)
    )
    assert_same(found, expected)


def test_more_virtual_tokens_than_slots_are_refused():
    model, base, words = built("tied")
    model = fedprompt.prompted(model, 2)
    with pytest.raises(ValueError, match="adapters have 3 virtual tokens, but the model is prompted for 2"):
        model.decode(base, prompt_at(words), model.init_cache(3, 12), decoder.inputs())


def test_a_tied_head_is_not_computed_twice():
    model, base, words = built("tied")
    longer = texts()[1] | {"chosen": jnp.full((3, 1), 12, jnp.int32)}
    short = texts()[0] | {"chosen": jnp.full((3, 1), 9, jnp.int32)}

    def flops(model, adapters, inputs):
        return jax.jit(model.apply).lower(base, adapters, inputs).compile().cost_analysis()["flops"]

    head = 2 * 3 * decoder.WIDTH * decoder.VOCABULARY
    more = flops(fedprompt.prompted(model, 3), prompt_at(words), short) - flops(model, {}, longer)
    assert more < head / 2


@both
def test_clients_train_and_the_server_averages_all_of_the_node(name):
    """One round of plain SGD by a loop."""
    method, base = make(name), federation.base()
    state = federation.begin(method)
    start = state.server.adapters
    fixed, moving = trees.select(start, lambda leaf: leaf == "ids"), trees.select(start, lambda leaf: leaf != "ids")
    gradient = jax.jit(
        jax.grad(lambda own, batch: local.objective(MODEL, TASK, base)(trees.join(own, fixed), batch, KEY)[0])
    )
    ends = []
    for client in SOME:
        own, batches = moving, data(client).replace(constants={})
        for step in np.flatnonzero(batches.weights.any(-1)):
            batch = jax.tree.map(lambda leaf: leaf[step], batches)  # noqa: B023
            own = trees.subtract(own, trees.scale(gradient(own, batch), 0.5))
        ends.append(own)
    mean = jax.tree.map(lambda *leaves: np.mean(np.stack(leaves), 0), *ends)
    after, _ = federation.play(method, snapshot(state), 0, SOME)
    assert_close(after.server.adapters, trees.join(mean, fixed), 1e-5)
    moved = jax.tree.map(lambda x, y: bool(np.any(x != y)), trees.select(after.server.adapters, lambda _: True), start)
    assert all(jax.tree.leaves(trees.select(moved, lambda leaf: leaf not in ("ids", "bias"))))


@both
def test_what_is_sent_and_loaded_says_the_same(name):
    method, base, inputs = make(name), federation.base(), jax.tree.map(lambda leaf: leaf[0], data(1).inputs)
    server = played(name).server
    batches, client = data(4), method.init_client(server, 4, KEY)
    own = personalized(name)(base, server, client, batches, KEY)
    _, upload, _ = updated(name)(base, server, client, batches, KEY)
    # All that the client trained travels: the server's leaves and the upload are the client's node again.
    sent = trees.join(
        trees.add(trees.select(server.adapters, lambda leaf: leaf != "ids"), upload),
        trees.select(server.adapters, lambda leaf: leaf == "ids"),
    )
    assert jax.tree.structure(sent) == jax.tree.structure(own)
    assert_close(sent, own, 1e-6)
    assert_close(APPLY(base, sent, inputs), APPLY(base, own, inputs), 1e-5)
    # And what another client loads is, bit for bit, what the server has: any number of times.
    loaded = server.adapters
    for client_id in (1, 5):
        other = method.init_client(server, client_id, KEY)
        loaded = personalized(name)(base, server.replace(adapters=loaded), other, none(client_id), KEY)
    assert_same(APPLY(base, loaded, inputs), APPLY(base, server.adapters, inputs))
    assert_same(loaded, server.adapters)


@both
def test_clients_keep_nothing_and_do_not_touch_each_other(name):
    method, base = make(name), federation.base()
    server = played(name).server
    assert jax.tree.leaves(method.init_client(server, 4, KEY)) == []
    before = snapshot(server)
    alone = updated(name)(base, server, method.init_client(server, 2, KEY), data(2), KEY)[1]
    updated(name)(base, server, method.init_client(server, 4, KEY), data(4), KEY)
    assert_same(updated(name)(base, server, method.init_client(server, 2, KEY), data(2), KEY)[1], alone)
    assert_same(server, before)


@both
def test_fine_tuning_is_personalization(name):
    method, base = make(name), federation.base()
    server = played(name).server
    before, client = snapshot(server), method.init_client(server, 4, KEY)
    assert_same(personalized(name)(base, server, client, none(4), KEY), server.adapters)
    tuned = personalized(name)(base, server, client, data(4), KEY)
    moved = jax.tree.map(lambda x, y: np.any(x != y), tuned, server.adapters)
    assert any(jax.tree.leaves(adapters.nodes(moved)[WORDS]))
    assert_same(server, before)


def test_counts_are_those_of_llama():
    """Llama-3.2-1B: D = 2048, no task head; peft's encoder has three linears with biases and a table."""
    words = {"model": {"embed_tokens": {"embedding": jax.ShapeDtypeStruct((128_256, 2048), "float32")}}}
    model = toy.model()._replace(init=lambda key: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), words))
    bare = functools.partial(adapters.init, shapes=jax.eval_shape(MODEL.init, KEY), targets="query", head="frozen")
    prompt = fedprompt.fedprompt(model, TASK, bare, SGD, prompt=range(12))
    assert prompt.traffic(jax.eval_shape(prompt.init, KEY)) == (12 * 2048,) * 2
    tuning = fedprompt.fedptuning(model, TASK, bare, SGD)
    linears = (2048 * 1024 + 1024) + (1024 * 1024 + 1024) + (1024 * 2048 + 2048)
    assert tuning.traffic(jax.eval_shape(tuning.init, KEY)) == (20 * 2048 + linears,) * 2
    assert 20 * 2048 + linears == 5_287_936


def test_only_a_head_is_trained_beside_virtual_tokens():
    assert set(adapters.nodes(played("fedprompt").server.adapters)) == {WORDS, ("classifier",)}
    adapters.check_sites(played("fedprompt").server.adapters, federation.base())


def test_models_that_are_not_prompted_say_so():
    model, base, words = built("tied")
    with pytest.raises(ValueError, match="put in front of texts by `fedprompt.prompted`"):
        model.apply(base, prompt_at(words), decoder.inputs())
    with pytest.raises(ValueError, match="cannot be merged into the weights of a base"):
        adapters.merge(base, prompt_at(words))


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("fedprompt", {"prompt": ()}, "algorithm.prompt is empty"),
        ("fedprompt", {"prompt": (3, 32)}, "algorithm.prompt has the id 32, expected 0 to 31"),
        ("fedptuning", {"virtual_tokens": 0}, "algorithm.virtual_tokens is 0, expected 1 or more"),
        ("fedptuning", {"hidden": 0}, "algorithm.hidden is 0, expected 1 or more"),
        ("fedptuning", {"weighting": "size"}, "algorithm.weighting is 'size'"),
    ],
)
def test_mistakes(name, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(name, **changes)


def test_a_model_without_words_has_no_virtual_tokens():
    model = toy.model()._replace(init=lambda key: {"table": {"embedding": jnp.zeros((4, 2))}})
    with pytest.raises(ValueError, match="need one embedding of words, but the model's embeddings are table"):
        fedprompt.fedprompt(model, TASK, init_adapters(), SGD, prompt=PROMPT)
