"""The command line: `fedjax-peft run --config=configs/quickstart.py --workdir=DIR`."""

import functools
import logging
import os
import pathlib
import re
import sys
import sysconfig
import traceback
from collections.abc import Sequence

from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

USAGE = """usage: fedjax-peft COMMAND [flags]

  run     --config=FILE.py[:VARIANT] --workdir=DIR [--config.KEY=VALUE ..]   run an experiment, or go on with it
          [--coordinator=HOST:PORT|auto --processes=N --process=I]           as one of several processes
  report  WORKDIR [WORKDIR .. --plots=FOLDER]     table and plots of a finished run, or one table of several runs
  gains   METHOD WORKDIR [WORKDIR ..]             how much better it is than the best other method, by three averages
  bench   [--clients=1,8 --batch=8 --tokens=64 --chunk=2 --lengths=full|natural --dtype=float32|bfloat16 --scan
           --model=minilm --rank=8 --steps=4 --repeats=5 --notorch --output=bench.json]
                                                  the same job as a round here and one by one in PyTorch + PEFT
  bench   --population=1000,100000 [--cohort=32 --rounds=40 --kilobytes=1000 --every=5 --folder=DIR
           --output=population.json]              time and memory of rounds whose clients have large states on disk
  generate  --workdir=DIR --client=K|NAME --prompt=TEXT [--template=plain|alpaca|alpaca_turn|chat --tokens=128
           --temperature=0 --top_p=1 --top_k=0 --seed=0]
                                                  what the personalized model of one client of a finished run answers
  export  --workdir=DIR --client=K|NAME|global --output=FOLDER [--point=NAME --merged]
                                                  adapters of that client, or of the server, for peft; or the whole
                                                  model for transformers
  plan    --config=FILE.py --topology=v5e:16x16[,v5p:4x4x4,gpu ..] [--search --scaling --classes=16 --steps=N
           --answer=TOKENS --output=plan.json --config.KEY=VALUE ..]
                                                  memory, time and traffic of a round on hardware that need not exist
  doctor  [--workdir=DIR --clients=N --model=1 --coordinator=HOST:PORT|auto --processes=N --process=I --megabytes=16
           --timeout=120]                         versions, devices, memory, exchange between devices, storage, cache
"""


def main() -> None:
    """Runs a command; a user's mistake ends with one sentence and exit code 2."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    for noisy in ("absl", "jax", "orbax"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    command, *arguments = sys.argv[1:] or ["help"]
    if command in ("help", "--help") or "--help" in arguments:
        print(USAGE)
        sys.exit(0)
    if command not in COMMANDS:
        print(f"fedjax-peft: there is no command {command!r}\n{USAGE}", file=sys.stderr)
        sys.exit(2)
    try:
        COMMANDS[command](arguments)
    except ValueError as error:
        sys.exit(_mistake(error))


def run(arguments: list[str]) -> None:
    """`run`: see USAGE."""
    own = flags.FlagValues()
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, or auto", flag_values=own)
    flags.DEFINE_integer("processes", None, "all processes", lower_bound=1, flag_values=own)
    flags.DEFINE_integer("process", None, "which one this is", lower_bound=0, flag_values=own)
    # The rest is late, so that a mistake in the flags is answered at once.
    values = _flags(arguments, {"workdir": "run directory"}, own)
    from fedjax_peft import experiment, loop, processes
    from fedjax_peft.reports import report

    processes.connect(values.coordinator, values.processes, values.process)
    minutes = values.config.get("run", {}).get("watchdog_minutes", 30.0)
    with processes.together(), processes.watchdog(epath.Path(values.workdir) / "processes", minutes) as begin:
        try:
            experiment.run(values.config, values.workdir, begin)
        except loop.Interrupted as stopped:
            print(f"fedjax-peft: {stopped}", file=sys.stderr)
            sys.exit(143)
        begin("the report")
        if processes.first():
            report.show(values.workdir)
        processes.gather(None)


def report(arguments: list[str]) -> None:
    """`report`: see USAGE."""
    own = flags.FlagValues()
    flags.DEFINE_string("plots", None, "folder for pictures of several runs", flag_values=own)
    workdirs = [argument for argument in arguments if not argument.startswith("-")]
    _parse(own, [argument for argument in arguments if argument not in workdirs], ())
    if not workdirs:
        raise ValueError("report needs one or more run directories: fedjax-peft report WORKDIR [WORKDIR ..]")
    from fedjax_peft.reports import report as reports

    several = len(workdirs) > 1 or own.plots
    reports.compare(workdirs, own.plots) if several else reports.show(workdirs[0])


def gains(arguments: list[str]) -> None:
    """`gains`: see USAGE."""
    from fedjax_peft.reports import gains as averages

    if len(arguments) < 2:
        raise ValueError("gains needs a method and run directories: fedjax-peft gains METHOD WORKDIR [WORKDIR ..]")
    averages.show(arguments[0], arguments[1:])


def bench(arguments: list[str]) -> None:
    """`bench`: see USAGE."""
    if any(argument.startswith("--population") for argument in arguments):
        from fedjax_peft.benchmarks import many_clients as benchmark
    else:
        from fedjax_peft.benchmarks import bench as benchmark
    benchmark.main(arguments)


def plan(arguments: list[str]) -> None:
    """`plan`: see USAGE."""
    own = flags.FlagValues()
    for name, text in (("search", "try chunks, meshes and remat"), ("scaling", "compare with one chip")):
        flags.DEFINE_bool(name, False, text, flag_values=own)
    flags.DEFINE_integer("classes", 16, "of a classifier", lower_bound=1, flag_values=own)
    flags.DEFINE_integer("steps", None, "local steps where the config has epochs", lower_bound=1, flag_values=own)
    flags.DEFINE_integer("answer", None, "tokens of the longest answer", lower_bound=1, flag_values=own)
    flags.DEFINE_string("output", None, "file for all numbers", flag_values=own)
    values = _flags(arguments, {"topology": "v5e:16x16, gpu .., separated by commas"}, own)
    from fedjax_peft.planning import plan as planning

    settings = {name: values[name].value for name in ("search", "scaling", "classes", "steps", "answer", "output")}
    planning.main(values.config, values.topology.split(","), **settings)


def doctor(arguments: list[str]) -> None:
    """`doctor`: see USAGE."""
    from fedjax_peft import doctor as examination

    if code := examination.main(arguments):
        sys.exit(code)


def generate(arguments: list[str]) -> None:
    """`generate`: see USAGE."""
    own = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "run directory", flag_values=own)
    flags.DEFINE_string("prompt", None, "what to answer", flag_values=own)
    flags.DEFINE_string("client", None, "number of a client, or its name", flag_values=own)
    flags.DEFINE_string("template", None, "what the prompt is put in; that of training by default", flag_values=own)
    flags.DEFINE_integer("tokens", 128, "most tokens of the answer", lower_bound=1, flag_values=own)
    flags.DEFINE_float("temperature", 0.0, "0 takes the most likely token", lower_bound=0.0, flag_values=own)
    flags.DEFINE_float("top_p", 1.0, "share of probability that is drawn from", flag_values=own)
    flags.DEFINE_integer(
        "top_k", 0, "most likely tokens that are drawn from, 0 for all", lower_bound=0, flag_values=own
    )
    flags.DEFINE_integer("seed", 0, "of what is drawn", flag_values=own)
    _parse(own, arguments, ("workdir", "client", "prompt"))
    if not own.temperature:
        for name in ("top_p", "top_k", "seed"):
            if own[name].value != own[name].default:
                raise ValueError(f"--{name} is {own[name].value}, but nothing is drawn with --temperature=0")
    import jax

    from fedjax_peft import asking

    drawn = {"method": "sampled", "temperature": own.temperature, "top_p": own.top_p, "top_k": own.top_k}
    sampled = drawn if own.temperature else {}
    key = jax.random.key(own.seed) if own.temperature else None
    asked = own.workdir, own.client, own.prompt
    print(asking.answer(*asked, template=own.template, key=key, new_tokens=own.tokens, **sampled))


def export(arguments: list[str]) -> None:
    """`export`: see USAGE."""
    own = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "run directory", flag_values=own)
    flags.DEFINE_string("client", None, "number of a client, its name, or global for the server", flag_values=own)
    flags.DEFINE_string("output", None, "folder to write", flag_values=own)
    flags.DEFINE_string("point", None, "evaluation point; the headline one by default", flag_values=own)
    flags.DEFINE_bool("merged", False, "write the whole model", flag_values=own)
    _parse(own, arguments, ("workdir", "client", "output"))
    from fedjax_peft import export as exporting

    print(exporting.export(own.workdir, own.client, own.output, point=own.point, merged=own.merged))


COMMANDS = {function.__name__: function for function in (run, generate, export, report, gains, bench, plan, doctor)}


def _flags(arguments: list[str], needed: dict[str, str], further: flags.FlagValues | None = None) -> flags.FlagValues:
    """Flags with `--config`; those of `needed`, {name: help}, must be given too."""
    values = flags.FlagValues()
    # Keys that a config does not have yet may be arguments of its functions; others are refused with the config.
    settings = {"lock_config": False, "accept_new_attributes": True}
    config_flags.DEFINE_config_file("config", help_string="experiment file", flag_values=values, **settings)
    for name, text in needed.items():
        flags.DEFINE_string(name, None, text, flag_values=values)
    values.append_flag_values(further or flags.FlagValues())
    # What reads a text or a number takes None for one, or refuses it.
    unset = [re.fullmatch(r"--config\.([\w.]+)=None", argument) for argument in arguments]
    told = [argument for argument, key in zip(arguments, unset, strict=True) if key is None]
    _parse(values, told, ("config", *needed))
    try:
        values.config.keys()
    except OSError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except AttributeError:
        pass  # of no config
    if not isinstance(values.config, ConfigDict):
        kind = type(values.config).__name__
        raise ValueError(f"get_config of --config gives a {kind}, expected experiment.default_config() with changes")
    for key in filter(None, unset):
        *sections, name = key[1].split(".")
        functools.reduce(lambda config, section: config[section], sections, values.config)[name] = None
    return values


def _parse(values: flags.FlagValues, arguments: list[str], needed: Sequence[str]) -> None:
    try:
        rest = values(["fedjax-peft", *arguments])[1:]
    except KeyError as error:
        # Its text is a representation, quotes and line breaks included.
        raise ValueError(f"the config does not know {' '.join(str(error.args[0]).split())}") from None
    except (flags.Error, OSError, AttributeError, TypeError) as error:
        raise ValueError(_sentence(str(error))) from None
    except ValueError:
        raise
    except Exception as error:  # whatever a config file may do
        path = re.search(r"--config[= ]([^: ]*)", " ".join(arguments))
        raise ValueError(_sentence(f"{path and path[1]}: {''.join(traceback.format_exception(error))}")) from None
    if rest:
        known = [f"--{name}=.." for name in needed] + ["--config.KEY=VALUE"] * ("config" in needed)
        raise ValueError(f"{rest[0]!r} is no flag; flags are {', '.join(known)}")
    for name in needed:
        if values[name].value is None:
            given = "gives nothing: does get_config return its config?" if values[name].present else "is missing"
            raise ValueError(f"--{name} {given}")


def _sentence(text: str) -> str:
    """One line; of the traceback of a config file only in which of its lines, and what."""
    head, traced, trace = text.partition("Traceback (most recent call last):")
    if traced:
        steps = re.findall(r'File "(.+)", line (\d+)', trace)
        lines = [f"line {line}: " for path, line in steps if pathlib.Path(path).name in head]
        text = f"{head} {lines[-1] if lines else ''}{trace.strip().splitlines()[-1]}"
    return " ".join(text.split())


def _mistake(error: ValueError) -> int:
    lines = [line for one in (error.__cause__, error) if one is not None for line in _lines_of_users(one)]
    print(f"fedjax-peft: {error}{f' ({lines[-1]})' if lines else ''}", file=sys.stderr)
    return 2


def _lines_of_users(error: BaseException) -> list[str]:
    """The lines that an error came through in files that are not installed, such as that of a method of one's own."""
    known = [str(pathlib.Path(__file__).parent), *sysconfig.get_paths().values()]
    installed = tuple(folder + os.sep for folder in known)
    steps = traceback.extract_tb(error.__traceback__)
    paths = [str(pathlib.Path(step.filename).absolute()) for step in steps]
    return [
        f"{step.filename}, line {step.lineno}"
        for step, path in zip(steps, paths, strict=True)
        if not step.filename.startswith("<") and not path.startswith(installed)
        if not {"site-packages", "dist-packages"} & set(pathlib.Path(path).parts)
    ]


if __name__ == "__main__":
    main()
