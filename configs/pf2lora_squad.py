"""PF2LoRA on SQuAD: four clients, whole titles each (small: texts); exact match and F1 of answers in windows of a text.

    fedjax-peft run --config=configs/pf2lora_squad.py --config.data.source=FOLDER --workdir=runs/squad
    fedjax-peft run --config=configs/pf2lora_squad.py:pf2lora,v1 --workdir=runs/squad-v1

Paper: Hao et al., PF2LoRA, arXiv 2503.03920, with DeBERTa-v3 on SQuAD v1.1 and v2.0; partition, rounds and step sizes
are ours, since the paper's are not public. A variant is METHOD,SIZE: `v1` and `v2` are the published sizes with BERT in
DeBERTa's place (hub and accelerator); the small version has MiniLM and short windows and reads a FOLDER with
train.parquet (columns `context_id`, `context`, `question`, `answers`). Its results are still to be measured.
"""

from fedjax_peft import experiment

METHODS = {
    "pf2lora": ("pf2lora", {"client_rank": 2, "client_rate": 5e-2}, 2),
    "homlora": ("fedit", {"weighting": "uniform"}, 1),
    "perfedavg": ("perfedavg", {"inner_rate": 1e-2}, 3),
    "hetlora": ("hetlora", {"rank_min": 6, "gamma": 0.99, "penalty": 1e-2}, 1),
}


def get_config(variant: str = "pf2lora"):
    method, size = (variant.split(",") + ["small"])[:2]
    algorithm, settings, minibatches = METHODS[method]
    if size not in ("small", "v1", "v2"):
        raise ValueError(f"size is {size!r}, expected 'small', 'v1' or 'v2'")
    config = experiment.default_config()
    config.run.title = method
    config.data.name = "squad"
    config.data.clients = config.cohort = 4
    config.adapter.rank = 10 if method == "hetlora" else 8
    config.adapter.alpha = 2.0 * config.adapter.rank
    config.algorithm = {"name": algorithm, "keep_optimizer": True, **settings}
    config.optimizer.weight_decay = 0.01
    config.schedule.name = "linear"
    config.train.steps = 10
    config.personalize.steps = 1 if algorithm == "perfedavg" else 0
    config.evaluate.spectra = True
    if method == "hetlora":
        config.points = {"truncated": {"algorithm": {"evaluate_global": True}}}
    if size == "small":
        batch = 8
        config.data.source = "FOLDER"
        config.data.group = "context_id"
        config.data.test = None
        config.data.stride = 48
        config.max_length = 128
        config.widths = 2
        config.model.source = "minilm"
        config.rounds = 20
        config.evaluate.every = 10
        config.optimizer.learning_rate = 2e-3
        config.run.chunk = 2
    else:
        batch = 16
        config.data.source = {"v1": "rajpurkar/squad", "v2": "rajpurkar/squad_v2"}[size]
        if size == "v2":
            config.data.no_answer_threshold = 0.0
        config.max_length = 384
        config.model.source = "google-bert/bert-base-uncased"
        config.rounds = 300
        config.evaluate.every = 50
        config.optimizer.learning_rate = 5e-4
    config.train.batch = batch * minibatches
    config.personalize.batch = batch
    return config
