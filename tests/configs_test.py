"""Every config is an example, so every config must load and say what it is."""

import functools
import importlib.util
import pathlib

import pytest
from ml_collections import ConfigDict

from fedjax_peft import algorithms, experiment
from fedjax_peft import config as experiment_config
from fedjax_peft.algorithms import bayestune
from fedjax_peft.data import federations

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_loads_and_has_a_page(path):
    module = load(path)
    config = module.get_config()
    assert isinstance(config, ConfigDict)
    assert f"fedjax-peft run --config=configs/{path.name}" in module.__doc__
    if "study" in config:
        return
    assert set(config.keys()) == set(experiment.default_config().keys())
    assert config.algorithm.name in algorithms.ALL and config.data.name in federations.ALL
    assert (config.train.steps is None) != (config.train.epochs is None)


@pytest.mark.parametrize("name", ["fedp2eft_fedaya", "fedp2eft_masakhanews", "fedp2eft_xnli", "masakhanews"])
def test_a_variant_that_is_not_there_is_refused(name):
    module = load(next(path for path in CONFIGS if path.stem == name))
    with pytest.raises(KeyError, match="smal"):
        module.get_config("smal")


# What papers and their code say of the studies that stand in configs: dotted keys and their values.
STAGE_TWO = {
    "seed": 42,
    "rounds": 150,
    "adapter.rank": 32,
    "adapter.alpha": 64.0,
    "adapter.targets": "all-linear",
    "adapter.dropout": 0.0,
    "optimizer.name": "adamw",
    "optimizer.learning_rate": 1e-4,
    "optimizer.weight_decay": 0.0,
    "optimizer.clip": 1.0,
    "schedule.name": "constant",
    "train.epochs": 2,
    "personalize.epochs": 2,
    "personalize.budgets": (2, 4, 8, 16),
    "points.adalora.optimizer.learning_rate": 1e-3,
}
BERT = STAGE_TWO | {
    "adapter.head": "lora",
    "model.pool": "pooler",
    "train.batch": 32,
    "personalize.batch": 32,
    "base.seed": 42,
    "base.rounds": 100,
    "base.optimizer": {"learning_rate": 5e-5, "clip": 1.0},
    "base.train": {"epochs": 2, "batch": 32},
    "data.partition.alpha": 0.5,
    "data.partition.pools": 2,
    "data.partition.seed": 42,
}
XNLI = BERT | {"cohort": 30, "base.cohort": 30, "max_length": 128, "data.partition.clients_per_value": 20}
XNLI |= {"data.partition.rows_per_pool": {"train": 2000, "test": 500}, "data.partition.parallel": True}
MASAKHA = BERT | {"cohort": 16, "base.cohort": 16, "max_length": 256, "data.partition.clients_per_value": 10}
MASAKHA |= {"data.train": "train+validation", "data.text": "headline_text"}
REFERENCE = {"algorithm.profile": "reference", "task.dtype": "bfloat16", "points.adalora.algorithm.scale": "published"}
REFERENCE |= {"points.adalora.algorithm.penalty": 0.0, "observe.batch": 4, "observe.published": True}
REFERENCE |= {f"points.bayestune.algorithm.{name}": value for name, value in bayestune.REFERENCE.items()}
AYA = STAGE_TWO | {"cohort": 3, "max_length": 1024, "train.batch": 16, "personalize.batch": 16}
AYA |= {"model.dtype": "bfloat16", "evaluate.generate": 1024, "evaluate.decoding.method": "greedy"}
AYA_BASE = {
    "base.name": "fedit",
    "base.rounds": 200,
    "base.cohort": 3,
    "base.adapter": {"targets": "all-linear", "rank": 16, "alpha": 32.0, "dropout": 0.05},
    "base.optimizer": {"learning_rate": 2e-5, "clip": 1.0},
    "base.schedule": {"name": "annealed", "end": 0.05},
    "base.train": {"steps": 10, "batch": 16},
}
TWO_LEVEL = {
    "train.steps": 10,
    "personalize.batch": 16,
    "algorithm.client_rank": 2,
    "algorithm.client_rate": 5e-2,
    "optimizer.weight_decay": 0.01,
    "schedule.name": "linear",
}
GLUE = TWO_LEVEL | {"cohort": 8, "adapter.rank": 8, "adapter.alpha": 16.0, "optimizer.learning_rate": 5e-4}
GLUE |= {"train.batch": 32, "max_length": 128, "data.partition.h": 0.9, "data.partition.seed": 1234}
WRITTEN = TWO_LEVEL | {
    "data.clients": 8,
    "cohort": 8,
    "adapter.rank": 4,
    "adapter.alpha": 32.0,
    "adapter.dropout": 0.1,
    "adapter.targets": "c_attn",
    "optimizer.learning_rate": 2e-4,
    "schedule.warmup": 50,
    "task.smoothing": 0.1,
    "max_length": 512,
    "rounds": 300,
    "train.batch": 16,
    "personalize.batch": 8,
    "evaluate.generate": 64,
    "evaluate.decoding.beams": 10,
    "evaluate.decoding.length_penalty": 0.8,
    "evaluate.decoding.no_repeat": 4,
}
PUBLISHED = [
    ("fedp2eft_xnli", "published", XNLI | {"base.name": "fedavg", "algorithm": {"name": "fedp2eft"}}),
    ("fedp2eft_xnli", "reference", XNLI | REFERENCE | {"data.partition.reuse_first_pool": True}),
    (
        "fedp2eft_xnli",
        "feddpa",
        XNLI
        | {"base.name": "feddpa"}
        | {"base.adapter": {"rank": 8, "alpha": 8.0, "targets": "query,value", "dropout": 0.05}},
    ),
    ("fedp2eft_xnli", "dept", XNLI | {"base.name": "dept"}),
    ("fedp2eft_masakhanews", "published", MASAKHA | {"base.name": "fedavg", "algorithm": {"name": "fedp2eft"}}),
    ("fedp2eft_masakhanews", "reference", MASAKHA | REFERENCE | {"data.partition.same_mixes": True}),
    ("fedp2eft_fedaya", "", AYA | AYA_BASE),
    ("fedp2eft_fedaya", "llama", AYA | {"base.name": "pretrained", "data.template": "chat"}),
    *(
        ("pf2lora_glue", f"{task},pf2lora,published", GLUE | {"rounds": rounds})
        for task, rounds in {"cola": 50, "sst2": 100, "qnli": 100, "mnli": 300, "qqp": 300}.items()
    ),
    ("pf2lora_squad", "pf2lora,v1", TWO_LEVEL | {"data.clients": 4, "rounds": 300, "max_length": 384}),
    ("pf2lora_generation", "webnlg,pf2lora,published", WRITTEN),
    ("pf2lora_generation", "e2e,pf2lora,published", WRITTEN),
]


@pytest.mark.parametrize(("name", "variant", "expected"), PUBLISHED, ids=lambda part: part if str(part) == part else "")
def test_published_variants_have_the_published_numbers(name, variant, expected):
    config = load(next(path for path in CONFIGS if path.stem == name)).get_config(variant)

    def found(key):
        value = functools.reduce(lambda node, part: node[part], key.split("."), config)
        return value.to_dict() if isinstance(value, ConfigDict) else value

    assert {key: found(key) for key in expected} == expected
    if config.base.name != "pretrained":
        experiment_config.stage_one(config)


@pytest.mark.parametrize("name", ["pf2lora_glue", "pf2lora_generation", "pf2lora_squad"])
def test_methods_of_a_comparison_share_their_scale_and_the_size_of_minibatches(name):
    module = load(next(path for path in CONFIGS if path.stem == name))
    first = {"pf2lora_glue": "cola,", "pf2lora_generation": "webnlg,", "pf2lora_squad": ""}[name]
    scales, sizes = set(), set()
    for method, (*_, minibatches) in module.METHODS.items():
        config = module.get_config(first + method)
        scales.add(config.adapter.alpha / config.adapter.rank)
        sizes.add(config.train.batch / minibatches)
    assert len(scales) == len(sizes) == 1
