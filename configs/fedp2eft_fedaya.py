"""FedP2EFT on instructions in eight languages: 38 natural clients of Fed-Aya, eight of them unseen.

    fedjax-peft run --config=configs/fedp2eft_fedaya.py --config.data.source=FOLDER --workdir=runs/fedaya
    fedjax-peft run --config=configs/fedp2eft_fedaya.py:llama --config.data.source=FOLDER --workdir=runs/fedaya-llama

Paper: Lee et al., FedP2EFT, AAAI 2026, arXiv 2502.04387. Data: FedLLM-Bench's aya_38c_25k.json (Ye et al., arXiv
2406.04845), of which FOLDER has train.jsonl with the columns client, language, instruction and response. The extras
`causal` and `text` are needed. Variants: the default is MobileLLaMA-1.4B on a base that FedIT makes in 200 rounds,
`llama` is Llama-3.2-3B-Instruct off the shelf, asked in its own chat template; `small` has the form of the study on
SmolLM2-135M and any such folder. METEOR here matches words and stems; with WordNet's synonyms, as published, it is the
measure `meteor_wordnet`. Tables by language count a client of several under the one that most of its rows have.

All published values are open, and nothing has been measured here yet: `small` was seen to run on other texts with
these columns, no more.
"""

from fedjax_peft import experiment


def get_config(variant: str = ""):
    config = experiment.default_config()
    config.seed = 42
    config.data.name = "fed_aya"
    config.data.source = "FOLDER"
    config.adapter.targets = "all-linear"
    config.adapter.rank = 32
    config.adapter.alpha = 64.0
    config.algorithm = {"name": "fedp2eft"}
    config.optimizer.learning_rate = 1e-4
    config.optimizer.clip = 1.0
    config.personalize.budgets = (2, 4, 8, 16)
    config.points = {
        "lora": {"algorithm": {"name": "lora"}},
        "adalora": {"algorithm": {"name": "adalora"}, "optimizer": {"learning_rate": 1e-3}},
        "bayestune": {"algorithm": {"name": "bayestune"}},
    }
    config.evaluate.every = 1000
    config.evaluate.measures = ("meteor", "rouge1", "rouge2", "rougeL", "chrf")
    config.evaluate.generate = 1024
    config.max_length = 1024
    config.rounds = 150
    config.cohort = 3
    config.train.epochs = config.personalize.epochs = 2
    config.train.batch = config.personalize.batch = 16
    config.model.dtype = "bfloat16"
    VARIANTS[variant](config)
    return config


def _llama(config):
    config.model.source = "meta-llama/Llama-3.2-3B-Instruct"
    config.data.template = "chat"


def _mobile(config):
    config.model.source = "mtgv/MobileLLaMA-1.4B-Base"
    config.base = {"name": "fedit", "seed": 42, "rounds": 200, "cohort": 3}
    config.base.adapter = {"targets": "all-linear", "rank": 16, "alpha": 32.0, "dropout": 0.05}
    config.base.optimizer = {"learning_rate": 2e-5, "clip": 1.0}
    config.base.schedule = {"name": "annealed", "end": 0.05}  # from 2e-5 to 1e-6
    config.base.train = {"steps": 10, "batch": 16}


def _small(config):
    _mobile(config)
    config.model.source = "smollm2"
    config.model.dtype = "float32"
    config.max_length = 128
    config.widths = 2
    config.adapter.rank = 8
    config.adapter.alpha = 16.0
    config.base.rounds = 4
    config.base.optimizer.learning_rate = 1e-4
    config.base.train = {"steps": 4, "batch": 4}
    config.rounds = 4
    config.train.epochs = config.personalize.epochs = None
    config.train.steps = config.personalize.steps = 4
    config.train.batch = config.personalize.batch = 4
    config.personalize.budgets = (2,)
    config.data.train_limit = 60
    config.data.test_limit = config.data.validation_limit = 4
    config.evaluate.generate = 32
    config.run.scan = True
    config.run.chunk = 3


VARIANTS = {"": _mobile, "llama": _llama, "small": _small}
