"""The variants of configs/fedamole.py: what the authors do differently, and that all can be built."""

import functools
import importlib.util
import pathlib

import jax
import numpy as np
import pytest
import toy
from flax import traverse_util

from fedjax_peft import adapters, algorithms, config, local, tasks

PATH = pathlib.Path(__file__).parents[1] / "configs" / "fedamole.py"
SPEC = importlib.util.spec_from_file_location("fedamole_config", PATH)
MODULE = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(MODULE)

MIXTURE = {
    "algorithm.adapter_dtype": "bfloat16",
    "algorithm.score_dtype": "bfloat16",
    "algorithm.mask_padding": False,
    "algorithm.min_experts": 2,
}
WRITTEN = {
    "evaluate.measures": ("rougeL_ref", "rougeL"),
    "evaluate.decoding.method": "sampled",
    "evaluate.decoding.temperature": 0.6,
    "evaluate.decoding.top_p": 0.9,
    "evaluate.decoding.top_k": 50,
}
REFERENCE = {method: MIXTURE if method.startswith("fedamole") else {"data.aux": 0.0} for method in MODULE.METHODS} | {
    "fdlora": {"algorithm.warmup_ticks": True},
    "fedmutual": {"algorithm.kl_reduce": "elements", "data.aux": 0.0},
    "fedapen": {"algorithm.kl_reduce": "elements"},
}


def flat(*variant):
    found = MODULE.get_config(",".join(variant))
    config.check_numbers(found)
    assert found.evaluate.every  # its first evaluation is that of the base
    return traverse_util.flatten_dict(found.to_dict(), sep=".")


@pytest.mark.parametrize("method", MODULE.METHODS)
@pytest.mark.parametrize("scenario", ["snli_1", "dolly_0.1", "ni"])
def test_the_reference_differs_in_these_keys_alone(scenario, method):
    published, reference = (flat(scenario, method, size) for size in ("published", "reference"))
    changed = {key: value for key, value in reference.items() if key not in published or published[key] != value}
    assert published.keys() <= reference.keys()
    assert changed == REFERENCE[method] | ({} if scenario == "snli_1" else WRITTEN)


@pytest.mark.parametrize("size", ["small", "published", "reference"])
@pytest.mark.parametrize("method", MODULE.METHODS)
def test_methods_have_the_settings_that_they_are_given(method, size):
    settings = MODULE.get_config(f"ni,{method},{size}")
    own = settings.algorithm.to_dict()
    factory = algorithms.ALL[own.pop("name")]
    if method.startswith("fedamole"):
        own["clients"] = 10
    if method == "fedprompt":
        own["prompt"] = (1, 2)
    model = toy.model()
    base = jax.eval_shape(model.init, jax.random.key(0))

    def init_adapters(key, **changed):
        return adapters.init(key, shapes=base, **{"rank": 2, "targets": "query"} | changed)

    optimizer = local.make_optimizer(**settings.optimizer)
    assert factory(model, tasks.causal(), init_adapters, optimizer, **own).init_client is not None


def parameters(settings, widths, clients):
    """Numbers that a client trains at layers of the given (inputs, outputs of query, of value), and sends."""
    shapes = {
        name: {"kernel": jax.ShapeDtypeStruct((1, widths[0], outputs), "float32")}
        for name, outputs in zip(("q_proj", "v_proj"), widths[1:], strict=True)
    }
    own = settings.algorithm.to_dict()
    name = own.pop("name")
    own |= {"clients": clients} if name == "fedamole" else {}
    init = functools.partial(adapters.init, shapes={"layers": {"self_attn": shapes}}, **settings.adapter)
    method = algorithms.ALL[name](toy.model(), tasks.causal(), init, local.make_optimizer(learning_rate=1.0), **own)
    return np.array(method.traffic(jax.eval_shape(method.init, jax.random.key(0))))


@pytest.mark.parametrize(
    ("variant", "rank", "widths", "clients"),
    [
        ("snli_1,{},published", 61, (2048, 2048, 512), 10),
        ("ni,{}", 45, (576, 576, 192), 10),
        ("flan1,{}", 53, (576, 576, 192), 8),
    ],
)
def test_the_matched_lora_trains_and_sends_what_a_mixture_does(variant, rank, widths, clients):
    mixed, matched = (MODULE.get_config(variant.format(method)) for method in ("fedamole", "fedit_matched"))
    assert matched.adapter.rank == rank and matched.adapter.alpha == 2 * rank
    sent = [parameters(settings, widths, clients) for settings in (mixed, matched)]
    np.testing.assert_allclose(sent[0], sent[1], rtol=0.01)


def test_the_last_round_has_the_published_rate():
    found = MODULE.get_config("ni,fedamole,published")
    last = found.optimizer.learning_rate * found.algorithm.personal_rate
    np.testing.assert_allclose(last, 3.7358604716579807e-5)
    assert found.rounds == 29 and found.evaluate.generate == 128


@pytest.mark.parametrize("method, rounds", [("fedit", 29), ("fdlora", 31)])
def test_the_rate_falls_by_one_percent_a_round(method, rounds):
    found = MODULE.get_config(f"ni,{method},published")
    factor = local.make_schedule(rounds=found.rounds, **found.schedule)
    np.testing.assert_allclose([factor(index) for index in range(rounds)], 0.99 ** np.arange(rounds), rtol=1e-6)
    assert found.rounds == rounds


def test_fdlora_trains_in_its_last_round_instead_of_personalization():
    more = {"small": 0, "published": 1}  # and instead of personalization
    for size, own in more.items():
        assert MODULE.get_config(f"ni,fdlora,{size}").rounds == MODULE.get_config(f"ni,fedit,{size}").rounds + 1 + own


@pytest.mark.parametrize("size", ["small", "published", "reference"])
def test_personalization_is_the_round_after_the_last(size):
    found = flat("snli_1", "fedamole", size)
    assert found["personalize.round"] == found["rounds"]
    for key in ("steps", "batch", "group_by_length"):
        assert found[f"personalize.{key}"] == found[f"train.{key}"]


def test_tasks_are_those_of_the_published_split():
    assert flat("ni", "fedamole", "published")["data.split"] == "train"
    assert "data.split" not in flat("snli_1", "fedamole", "published")


@pytest.mark.parametrize("scenario", ["snli", "flan", "ni_1", "snl_1"])
def test_a_scenario_that_there_is_not_gets_a_sentence(scenario):
    with pytest.raises(ValueError, match=f"the scenario is '{scenario}', expected snli_A or dolly_A"):
        MODULE.get_config(scenario)


def test_a_size_that_there_is_not_gets_a_sentence():
    with pytest.raises(ValueError, match="the size is 'tiny', expected 'small', 'published' or 'reference'"):
        MODULE.get_config("ni,fedamole,tiny")
