"""What one client's own causal model answers, asked as it was trained."""

import logging
from typing import Any

from etils import epath

from fedjax_peft import experiment, generate, one_client
from fedjax_peft import ground as grounds
from fedjax_peft.data import instructions
from fedjax_peft.types import Array


def answer(
    workdir: epath.PathLike,
    client: int | str,
    prompt: str,
    *,
    template: str | None = None,
    key: Array | None = None,
    **settings: Any,
) -> str:
    """The answer of a client of a finished run, as text without special tokens.

    Args:
      workdir: the run directory.
      client: its number, or its name if that is no number.
      prompt: the instruction.
      template: one of `instructions.template`; None is the one that the run's own prompts were put in.
      key, settings: for `generate.chat`.

    Raises:
      ValueError: the directory holds no finished run, its model writes nothing, or there is no such client or template.
    """
    run = experiment.rebuilt(workdir)
    model, names = run.stage.model, run.ground.federation.names
    if model.decode is None:
        raise ValueError(f"the model of {workdir} classifies texts, it writes none")
    chosen = one_client.number(names, client)
    template = template or grounds.template(run.config.data)
    tokenizer = instructions.asking(grounds.spelling(run.config, run.ground), template)
    own = one_client.adapt(run, workdir, chosen)
    logging.info("asked client %d, %s, in the template %s", chosen, names[chosen], template)
    return generate.chat(model, run.base, own, tokenizer, prompt, key=key, **settings)
