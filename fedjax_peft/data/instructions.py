"""Prompts that models answer: templates, tokens of prompts and answers, and what comes of generated answers.

An example of a causal model is a prompt, an answer and the end token. Loss is taken on the answer and the end token.
Prompt and answer are tokenized each by itself, so that the prompt has the same tokens in training and in generation.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fedjax_peft.data.federated import Encoded
from fedjax_peft.data.tokenizers import Tokenizer

_TASK = "Below is an instruction that describes a task"
_WRITE = "Write a response that appropriately completes the request."


class Template(NamedTuple):
    """How an instruction is put to a model."""

    prompt: Callable[[str, str], str]
    """(instruction, context, which may be empty) -> text."""
    before: str = ""
    """What an answer begins with, behind the prompt."""


def alpaca(instruction: str, context: str) -> str:
    """The template of Alpaca (Taori et al., 2023), whose response begins on a line of its own."""
    if not context:
        return f"{_TASK}. {_WRITE}\n\n### Instruction:\n{instruction}\n\n### Response:\n"
    about = f"{_TASK}, paired with an input that provides further context. {_WRITE}"
    return f"{about}\n\n### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"


def alpaca_turn(instruction: str, context: str) -> str:
    """Alpaca's template as federated studies of one-turn chats have it (Ye et al., 2024, arXiv 2406.04845).

    It ends without the space that belongs to the response.
    """
    return f"{_TASK}. {_WRITE}\n\n### Instruction:\n{_joined(instruction, context)} \n\n### Response:"


TEMPLATES = {
    "plain": Template(lambda instruction, context: _joined(instruction, context) + "\n"),
    "alpaca": Template(alpaca),
    "alpaca_turn": Template(alpaca_turn, " "),
}


def template(name: str, tokenizer: Tokenizer) -> Template:
    """One of `TEMPLATES`, or `chat`, which is the tokenizer's own.

    Raises:
      ValueError: an unknown name, or a tokenizer without a chat template.
    """
    if name == "chat" and tokenizer.chat is not None:
        return Template(
            lambda instruction, context: tokenizer.chat(
                [{"role": "user", "content": _joined(instruction, context)}], generate=True
            )
        )
    if name not in TEMPLATES:
        lacks = ", but this tokenizer has no chat template" if name == "chat" else ""
        raise ValueError(f"data.template is {name!r}{lacks}, expected one of {', '.join((*TEMPLATES, 'chat'))}")
    return TEMPLATES[name]


def asking(tokenizer: Tokenizer, name: str) -> Tokenizer:
    """A tokenizer whose `encode` puts texts to a model as the prompts of the template `name`, token by token.

    It has no chat template of its own any more.
    """
    form = template(name, tokenizer)

    def encode(texts: Sequence[str], *, max_length: int, special: bool = True) -> Encoded:
        del special
        prompts = [form.prompt(text, "") for text in texts]
        return encode_prompts(tokenizer, prompts, max_length=max_length, begin=name != "chat")

    return tokenizer._replace(encode=encode, chat=None)


def infer(premise: str, hypothesis: str) -> str:
    """The question of natural language inference as PromptSource puts it (Bach et al., 2022, arXiv 2202.01279)."""
    return f'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n'


INFERENCES = ("Yes", "Maybe", "No")
"""Answers to `infer`: entailment, neutral, contradiction."""


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str], *, max_length: int, begin: bool = True) -> Encoded:
    """Tokens of prompts, cut to `max_length`; one that reaches it leaves no room for an answer.

    Args:
      begin: put what the tokenizer begins its texts with before each prompt. A chat template writes that itself.
    """
    encoded = tokenizer.encode(prompts, max_length=max_length, special=False)
    prefix = _prefix(tokenizer) if begin else np.zeros(0, np.int32)
    return _ragged([np.concatenate([prefix, tokens])[:max_length] for tokens in _split(encoded)])


def encode(
    tokenizer: Tokenizer, prompts: Encoded, rows: Sequence[int], answers: Sequence[str], *, max_length: int
) -> Encoded:
    """Prompts with their answers and the end token.

    Args:
      prompts: from `encode_prompts`.
      rows: [n] which prompt belongs to each answer.
      answers: [n] texts.
      max_length: tokens of an example; a longer answer is cut, the end token stays.

    Raises:
      ValueError: the tokenizer has no end token, or a prompt leaves no room for it.
    """
    if tokenizer.eos is None:
        raise ValueError("this tokenizer names no end token, but an answer has to end with one")
    asked, said = _split(prompts), _split(tokenizer.encode(answers, max_length=max_length, special=False))
    room = [max_length - 1 - len(asked[row]) for row in rows]
    if min(room, default=0) < 0:
        raise ValueError(f"prompt {rows[int(np.argmin(room))]} takes all of {max_length=} tokens and leaves no answer")
    end = np.array([tokenizer.eos], np.int32)
    examples = [
        np.concatenate([asked[row], answer[:most], end]) for row, answer, most in zip(rows, said, room, strict=True)
    ]
    cut = np.array([len(answer) > most for answer, most in zip(said, room, strict=True)], bool)
    return _ragged(examples)._replace(prompts=np.diff(prompts.offsets)[np.asarray(rows, np.int64)], cut=cut)


def encode_choices(
    tokenizer: Tokenizer, prompts: Encoded, rows: Sequence[int], choices: Sequence[str], *, max_length: int
) -> Encoded:
    """Prompts with all choices behind them, each of which ends with the end token and is a branch of its own.

    Args:
      prompts: from `encode_prompts`.
      rows: [n] which prompt each example asks.
      choices: texts, the same for all prompts.
      max_length: tokens of a prompt with any one choice; a longer choice is cut.

    Raises:
      ValueError: as `encode`.
    """
    count, before = len(choices), np.diff(prompts.offsets)[np.asarray(rows, np.int64)]
    each = encode(tokenizer, prompts, np.repeat(rows, count), [*choices] * len(rows), max_length=max_length)
    asked, said = _split(prompts), _split(each)
    examples, branches = [], []
    for place, row in enumerate(rows):
        answers = [tokens[before[place] :] for tokens in said[place * count : (place + 1) * count]]
        examples.append(np.concatenate([asked[row], *answers]))
        branches.append(np.repeat(np.arange(count + 1), [before[place], *map(len, answers)]))
    branches = np.concatenate([np.zeros(0, np.int8), *branches]).astype(np.int8)
    cut = each.cut.reshape(len(rows), count).any(1)
    return _ragged(examples)._replace(prompts=before, cut=cut, branches=branches)


def judge(
    decode: Callable[[Sequence[int]], str],
    references: Sequence[Sequence[str]],
    measure: Callable[[Sequence[str], Sequence[Sequence[str]]], dict[str, float]],
) -> Callable[..., dict[str, float]]:
    """Builds what compares generated answers with references, all without white space around them.

    Args:
      decode: token ids -> text.
      references: of each example of the test store.
      measure: (texts [n], references of each) -> {name: value}, such as `text_metrics.scored`.

    Returns:
      (rows [n], {`tokens` [n, P], `lengths` [n], the tokens before the end token}) -> {name: value}.
    """

    def judged(rows: np.ndarray, answers: Mapping[str, np.ndarray]) -> dict[str, float]:
        pairs = zip(answers["tokens"], answers["lengths"], strict=True)
        texts = [decode(tokens[:length]).strip() for tokens, length in pairs]
        return measure(texts, [[reference.strip() for reference in references[row]] for row in rows])

    return judged


def _joined(instruction: str, context: str) -> str:
    return f"{instruction}\n\n{context}" if context else instruction


def _prefix(tokenizer: Tokenizer) -> np.ndarray:
    """What the tokenizer puts before any text."""
    plain, special = (tokenizer.encode(["a"], max_length=32, special=kind).tokens for kind in (False, True))
    starts = range(len(special) - len(plain) + 1)
    return special[: next(start for start in starts if (special[start : start + len(plain)] == plain).all())]


def _split(encoded: Encoded) -> list[np.ndarray]:
    return [encoded.tokens[first:last] for first, last in zip(encoded.offsets[:-1], encoded.offsets[1:], strict=True)]


def _ragged(sequences: Sequence[np.ndarray]) -> Encoded:
    offsets = np.concatenate([[0], np.cumsum([len(tokens) for tokens in sequences], dtype=np.int64)]).astype(np.int64)
    return Encoded(np.concatenate([np.zeros(0, np.int32), *sequences]).astype(np.int32), None, offsets)
