"""Generation: plain loops over whole texts as the reference, padding, clients side by side, transformers as a judge."""

import functools

import decoder
import encoder
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from fedjax_peft import adapters, generate
from fedjax_peft.data import tokenizers
from fedjax_peft.models import gguf, hf, llama
from fedjax_peft.types import Model

KEY = jax.random.key(0)
NEW, PAD = 8, 49
LENGTHS = (10, 7, 2)
WIDTH = 16


def toy() -> tuple[Model, dict]:
    """A causal model that compiles at once: logits from the sum of all tokens, each turned by its position."""
    rng = np.random.default_rng(1)
    base = {
        "embedding": rng.normal(0, 1, (decoder.VOCABULARY, WIDTH)).astype(np.float32),
        "turn": rng.uniform(0.5, 3, WIDTH).astype(np.float32),
        "head": rng.normal(0, 1, (WIDTH, decoder.VOCABULARY)).astype(np.float32),
    }

    def init_cache(batch, slots):
        # Rows are not the first axis of everything.
        empty = {"states": jnp.zeros((1, batch, slots, WIDTH), jnp.float32), "mask": jnp.zeros((batch, slots), bool)}
        return empty | {"filled": jnp.int32(0)}

    def decode(base, adapters, cache, inputs):
        mask, filled = inputs["mask"], cache["filled"]
        positions = jnp.sum(cache["mask"], 1, keepdims=True) + jnp.cumsum(mask, 1) - 1
        turned = base["embedding"][inputs["tokens"]] * jnp.cos(positions[..., None] * base["turn"][None, None])
        fresh = jnp.where(mask[..., None], turned, 0)
        x = jnp.sum(cache["states"][0], 1)[:, None] + jnp.cumsum(fresh, 1) + adapters.get("shift", jnp.float32(0))
        x = jnp.take_along_axis(x, inputs["chosen"][..., None], 1) if "chosen" in inputs else x
        states = jax.lax.dynamic_update_slice(cache["states"], fresh[None], (0, 0, filled, 0))
        seen = jax.lax.dynamic_update_slice(cache["mask"], mask, (0, filled))
        return jnp.tanh(x) @ base["head"], {"states": states, "mask": seen, "filled": filled + mask.shape[1]}

    def apply(base, adapters, inputs, key=None):
        return decode(base, adapters, init_cache(*inputs["mask"].shape), inputs)[0]

    return Model(None, apply, None, init_cache, decode), base


@functools.cache
def build(kind="toy"):
    if kind == "toy":
        return toy()
    model = llama.llama(decoder.config(kind) | {"num_hidden_layers": 1}, scan=False)
    return model, encoder.weights(jax.eval_shape(model.init, KEY))


def generator(kind="toy", **settings):
    return _generator(kind, tuple(sorted(settings.items())))


@functools.cache
def _generator(kind, settings):
    settings = {"new_tokens": NEW, "end": (), "pad": PAD} | dict(settings)
    return jax.jit(generate.make_generate(build(kind)[0], **settings))


def trained(kind, client):
    if kind == "toy":
        return {"shift": jnp.sin(3.0 * client + jnp.arange(WIDTH))[None, None] / 2}
    nodes = adapters.init(KEY, build(kind)[1], rank=2, targets="all-linear")
    return jax.tree.map(lambda leaf: leaf + 0.05 * jnp.sin(client + jnp.arange(leaf.size).reshape(leaf.shape)), nodes)


def prompts():
    inputs = decoder.inputs(LENGTHS)
    return [row[:length].tolist() for row, length in zip(np.asarray(inputs["tokens"]), LENGTHS, strict=True)]


@functools.cache
def scorer(kind):
    return jax.jit(build(kind)[0].apply)


def log_probabilities(kind, nodes, texts):
    """[texts, V] of the next token, each from one forward pass over the whole text."""
    # One shape for all, so that it compiles once.
    tokens, mask = np.zeros((4, 20), np.int32), np.zeros((4, 20), bool)
    for row, text in enumerate(texts):
        tokens[row, : len(text)], mask[row, : len(text)] = text, True
    logits = np.asarray(scorer(kind)(build(kind)[1], nodes, {"tokens": tokens, "mask": mask}), np.float64)
    return np.stack([special.log_softmax(logits[row, len(text) - 1]) for row, text in enumerate(texts)])


def forbidden(text, size):
    """Tokens that would complete an n-gram of `size` that the text has."""
    return {
        text[i + size - 1]
        for i in range(len(text) - size + 1)
        if text[i : i + size - 1] == text[len(text) - size + 1 :]
    }


def greedy(kind, nodes, prompt, end, no_repeat=0, repeat_prompt=False):
    found = []
    while len(found) < NEW and not (found and found[-1] in end):
        scores = log_probabilities(kind, nodes, [prompt + found])[0]
        scores[list(forbidden(found if repeat_prompt else prompt + found, no_repeat)) if no_repeat else []] = -np.inf
        found.append(int(np.argmax(scores)))
    return found


def beam(prompt, end, beams, penalty, no_repeat=0, early_stopping=False):
    """Best first: every candidate of every step as a Python list."""
    open_texts, ended = [(0.0, [])], []
    for count in range(1, NEW + 1):
        scores = log_probabilities("toy", {}, [prompt + text for _, text in open_texts])
        candidates = []
        for (score, text), row in zip(open_texts, scores, strict=True):
            row[list(forbidden(prompt + text, no_repeat)) if no_repeat else []] = -np.inf
            candidates += [(score + row[token], [*text, token]) for token in range(len(row))]
        candidates = sorted(candidates, reverse=True)[: (1 + len(end)) * beams]
        finished = [text[-1] in end or count == NEW for _, text in candidates]
        for (score, text), ends in list(zip(candidates, finished, strict=True))[:beams]:
            ended += [(score / count**penalty, text)] if ends else []
        ended = sorted(ended, reverse=True)[:beams]
        open_texts = [pair for pair, ends in zip(candidates, finished, strict=True) if not ends][:beams]
        full = len(ended) == beams
        if not open_texts or full and (early_stopping or open_texts[0][0] / count**penalty <= ended[-1][0]):
            break
    return ended[0][1]


def texts(result, end):
    """Generated tokens of each row with the end token, after a check of what is behind it."""
    rows = []
    for tokens, length in zip(*map(np.asarray, result), strict=True):
        stop = length + 1
        assert (tokens[stop:] == PAD).all() and not set(tokens[:length]) & set(end)
        assert stop > NEW or tokens[length] in end
        rows.append(tokens[:stop].tolist())
    return rows


@functools.cache
def common():
    """Ids of two ends, which the greedy texts of the first two rows come to, but not at once."""
    tokens, _ = generator()(build()[1], {}, decoder.inputs(LENGTHS))
    return int(tokens[0, 4]), int(tokens[1, 6])


@pytest.mark.parametrize(
    ("kind", "client", "settings"),
    [
        ("toy", None, {}),
        ("toy", 1, {"no_repeat": 2}),
        ("toy", None, {"no_repeat": 1, "repeat_prompt": True}),
        ("llama", 1, {"no_repeat": 2}),
    ],
)
def test_greedy_is_step_by_step_over_whole_texts(kind, client, settings):
    nodes = {} if client is None else trained(kind, client)
    result = generator(kind, end=common(), **settings)(build(kind)[1], nodes, decoder.inputs(LENGTHS))
    assert texts(result, common()) == [greedy(kind, nodes, prompt, common(), **settings) for prompt in prompts()]


def test_rows_end_where_they_should():
    tokens, lengths = generator(end=common())(build()[1], {}, decoder.inputs(LENGTHS))
    assert lengths.tolist() == [4, 6, 4] and tokens[1, 6] == common()[1]
    assert (generator()(build()[1], {}, decoder.inputs(LENGTHS))[1] == NEW).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"beams": 3, "length_penalty": 0.8, "no_repeat": 2},
        {"beams": 4, "length_penalty": 3.0, "early_stopping": True},
        {"beams": 4, "length_penalty": 3.0},
    ],
)
def test_beam_search_is_that_over_lists(settings):
    end = common()
    result = generator(method="beam", end=end, **settings)(build()[1], {}, decoder.inputs(LENGTHS))
    names = {"length_penalty": "penalty"}
    plain = {names.get(name, name): value for name, value in settings.items()}
    assert texts(result, end) == [beam(prompt, end, **plain) for prompt in prompts()]


SETTINGS = {
    "greedy": {"no_repeat": 2},
    "sampled": {"method": "sampled", "temperature": 0.7, "top_p": 0.9},
    "beam": {"method": "beam", "beams": 3, "length_penalty": 0.8, "no_repeat": 2},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_padding_changes_nothing(name):
    run, right = generator(end=common(), **SETTINGS[name]), decoder.inputs(LENGTHS)
    expected = run(build()[1], {}, right, KEY)
    left = decoder.inputs(LENGTHS, left=True)
    noisy = left | {"tokens": jnp.where(left["mask"], left["tokens"], 17)}
    wide = {name: jnp.pad(leaf, ((0, 0), (2, 3))) for name, leaf in right.items()}
    for inputs in (noisy, wide) if name == "beam" else (noisy,):
        jax.tree.map(np.testing.assert_array_equal, run(build()[1], {}, inputs, KEY), expected)


@pytest.mark.parametrize("name", ["greedy", "beam"])
def test_rows_do_not_depend_on_each_other(name):
    run, inputs = generator(end=common(), **SETTINGS[name]), decoder.inputs(LENGTHS)
    together = run(build()[1], {}, inputs)
    for row in range(3):
        alone = run(build()[1], {}, {key: jnp.stack([leaf[row]] * 3) for key, leaf in inputs.items()})
        jax.tree.map(lambda a, b, row=row: np.testing.assert_array_equal(a[0], b[row]), alone, together)


@pytest.mark.parametrize(("kind", "name"), [("toy", "sampled"), ("toy", "beam"), ("llama", "greedy")])
def test_clients_side_by_side_are_clients_one_by_one(kind, name):
    run, base = generator(kind, end=common(), **SETTINGS[name]), build(kind)[1]
    keys, inputs = jax.random.split(KEY, 2), decoder.inputs(LENGTHS)
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), trained(kind, 0), trained(kind, 1))
    result = jax.jit(jax.vmap(run, (None, 0, None, 0)))(base, both, inputs, keys)
    assert not np.array_equal(result[0][0], result[0][1])
    for client in range(2):
        alone = run(base, trained(kind, client), inputs, keys[client])
        jax.tree.map(lambda a, b, client=client: np.testing.assert_array_equal(a, b[client]), alone, result)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_position_in_the_cache_gains_no_axis_of_clients(name):
    run = generate.make_generate(build()[0], new_tokens=NEW, end=common(), pad=PAD, **SETTINGS[name])
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), trained("toy", 0), trained("toy", 1))
    program = jax.make_jaxpr(jax.vmap(run, (None, 0, None, None)))(build()[1], both, decoder.inputs(LENGTHS), KEY)
    (loop,) = (step for step in program.eqns if step.primitive.name == "while")
    # What the cache has filled, and the tokens that there are.
    assert sum(carried.aval.shape == () for carried in loop.outvars) == 2


def test_it_stops_when_all_rows_have_ended():
    model, base = build()
    steps = []

    def decode(*arguments):
        jax.debug.callback(lambda: steps.append(1))
        return model.decode(*arguments)

    run = generate.make_generate(model._replace(decode=decode), new_tokens=NEW, end=common(), pad=PAD)
    one_and_none = {name: leaf[:2].at[1].set(False) for name, leaf in decoder.inputs(LENGTHS).items()}
    tokens, lengths = jax.block_until_ready(jax.jit(run)(base, {}, one_and_none))
    jax.effects_barrier()
    # The prompt, and every token but the end token.
    assert len(steps) == lengths[0] + 1 < NEW
    assert lengths[1] == 0 and (tokens[1] == PAD).all()


@pytest.mark.parametrize("most", [0, 4])
def test_samples_come_from_the_nucleus_in_proportion(most):
    run = generator(method="sampled", temperature=1.5, top_p=0.8, top_k=most, new_tokens=1)
    rows = 4000
    inputs = {name: jnp.repeat(leaf[:1], rows, 0) for name, leaf in decoder.inputs(LENGTHS).items()}
    drawn = np.bincount(np.asarray(run(build()[1], {}, inputs, KEY)[0])[:, 0], minlength=decoder.VOCABULARY)
    likely = np.exp(log_probabilities("toy", {}, prompts()[:1])[0] / 1.5)
    order = np.argsort(-likely)
    # The nucleus is that of what is left.
    likely[order[most or len(order) :]] = 0
    likely /= likely.sum()
    kept = order[: 1 + int(np.argmax(np.cumsum(likely[order]) >= 0.8))]
    assert 2 < len(kept) < (most or decoder.VOCABULARY) and set(np.flatnonzero(drawn)) <= set(kept)
    expected = likely[kept] / likely[kept].sum()
    # Five standard deviations of a binomial share.
    assert (np.abs(drawn[kept] / rows - expected) < 5 * np.sqrt(expected * (1 - expected) / rows)).all()


def test_samples_depend_on_the_key():
    run, inputs = generator(end=common(), **SETTINGS["sampled"]), decoder.inputs(LENGTHS)
    one, again, other = (np.asarray(run(build()[1], {}, inputs, jax.random.key(k))[0]) for k in (1, 1, 2))
    assert (one == again).all() and (one != other).any(1).all()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"method": "best"}, "method is 'best', expected one of greedy, sampled, beam"),
        ({"new_tokens": 0}, "new_tokens is 0, expected at least 1"),
        ({"method": "beam", "beams": 0}, "beams is 0, expected at least 1"),
        ({"no_repeat": -1}, "no_repeat is -1, expected at least 0"),
        ({"temperature": 0.0}, "temperature is 0.0, expected above 0"),
        ({"top_p": 1.5}, "top_p is 1.5, expected above 0 and at most 1"),
        ({"top_k": -1}, "top_k is -1, expected at least 0"),
    ],
)
def test_mistakes_get_a_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        generate.make_generate(build()[0], **({"new_tokens": NEW, "end": (), "pad": PAD} | settings))


def test_what_a_model_cannot_do_gets_a_sentence():
    classifier = llama.llama(decoder.config(), head="classification", labels=2)
    with pytest.raises(ValueError, match="no function `decode`"):
        generate.make_generate(classifier, new_tokens=1, end=(), pad=0)
    with pytest.raises(ValueError, match="'sampled', which needs a key"):
        generator(method="sampled")(build()[1], {}, decoder.inputs())
    with pytest.raises(ValueError, match="39 tokens, but the model has positions for 32"):
        generator("llama", new_tokens=30)(build("llama")[1], {}, decoder.inputs())


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """(kind) -> the same random weights in transformers and here."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    names = {"llama": ("LlamaConfig", "LlamaForCausalLM"), "qwen2": ("Qwen2Config", "Qwen2ForCausalLM")}
    names |= {"gpt2": ("GPT2Config", "GPT2LMHeadModel")}

    @functools.cache
    def pair(kind):
        torch.manual_seed(0)
        settings, build = (getattr(transformers, name) for name in names[kind])
        theirs = build(settings(**decoder.config(kind))).eval()
        folder = tmp_path_factory.mktemp(kind)
        theirs.save_pretrained(folder)
        return torch, theirs, hf.load(folder, labels=0, head="lm", key=KEY)

    return pair


@pytest.mark.parity
@pytest.mark.parametrize(
    ("kind", "ends", "settings"),
    [
        ("qwen2", 1, {}),
        ("gpt2", 1, {}),
        ("llama", 2, {"no_repeat": 2}),
        ("llama", 1, {"beams": 3, "length_penalty": 1.0}),
        ("llama", 2, {"beams": 3, "length_penalty": 1.0, "early_stopping": True}),
        ("llama", 1, {"beams": 10, "length_penalty": 0.8, "no_repeat": 4}),
        ("llama", 2, {"beams": 4, "length_penalty": -1.0, "no_repeat": 2}),
    ],
)
def test_transformers_say_the_same(pairs, kind, ends, settings):
    torch, theirs, ours = pairs(kind)
    inputs = decoder.inputs((12, 9, 6, 5), left=True, width=12, seed=1)
    given = {"input_ids": inputs["tokens"], "attention_mask": inputs["mask"]}
    given = {name: torch.tensor(np.asarray(leaf, int)) for name, leaf in given.items()}
    with torch.no_grad():
        free = theirs.generate(**given, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=PAD)
        end = [int(free[0, 14]), int(free[1, 15])][:ends]
        names = {"beams": "num_beams", "no_repeat": "no_repeat_ngram_size"}
        keywords = {names.get(name, name): value for name, value in settings.items()}
        expected = theirs.generate(
            **given, max_new_tokens=NEW, do_sample=False, eos_token_id=end, pad_token_id=PAD, **keywords
        )[:, 12:].numpy()
    method = "beam" if "beams" in settings else "greedy"
    run = jax.jit(generate.make_generate(ours.model, new_tokens=NEW, end=end, pad=PAD, method=method, **settings))
    tokens, lengths = run(ours.base, {}, inputs)
    assert min(lengths) < NEW
    padded = np.full((4, NEW), PAD)
    padded[:, : expected.shape[1]] = expected
    np.testing.assert_array_equal(tokens, padded)


@pytest.mark.further
def test_chat_with_smollm2():
    pytest.importorskip("gguf")
    try:
        file = gguf.path()
    except ValueError as error:
        pytest.skip(str(error))
    found = hf.load("smollm2", labels=0, head="lm", key=KEY)
    tokenizer = tokenizers.from_bpe(*gguf.tokenizer_parts(file))
    question = "What is the capital of France?"
    answer = generate.chat(found.model, found.base, {}, tokenizer, question, new_tokens=12)
    assert answer == "The capital of France is Paris."


def test_a_prompt_goes_through_the_template_and_the_answer_ends_before_its_end():
    model, base = build()
    letters = [chr(ord("A") + i) for i in range(decoder.VOCABULARY)]
    first = prompts()[0]
    end = common()[0]
    tokenizer = tokenizers.from_bpe(letters, [], "gpt-2", [], {"eos": end}, False, None)
    said = "".join(letters[i] for i in first)
    expected = "".join(letters[i] for i in greedy("toy", {}, first, (end,))[:-1])
    assert len(expected) == 4
    ask = tokenizer._replace(chat=lambda messages, generate: messages[0]["content"] + said[2:])
    assert generate.chat(model, base, {}, ask, said[:2], new_tokens=NEW) == expected
    template = (said[:2] + "{}").format
    assert generate.chat(model, base, {}, ask, said[2:], template=template, new_tokens=NEW) == expected
    with pytest.raises(ValueError, match="prompt is '', expected at least one token"):
        generate.chat(model, base, {}, tokenizer, "")
