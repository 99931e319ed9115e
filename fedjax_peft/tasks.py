"""What is learnt and how it is judged, example by example.

Outputs that are not finite choose nothing: whatever their example asks for, it counts as wrong.

B examples   T tokens   K classes   P tokens of an answer   V tokens of the vocabulary
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_peft.types import Task


def classification(*, mcc: bool = False, dtype: str = "float32") -> Task:
    """Cross-entropy and accuracy of logits [B, K] against labels [B] int32.

    Args:
      dtype: of the loss and of the logits that it reads. In `bfloat16`, as some published code has it, a loss of 1.6
        comes in steps of 1 / 128.
      mcc: reports Matthews' correlation coefficient as well, as CoLA does (Warstadt et al., 2018, arXiv 1805.12471).
        That of a pool is the coefficient of all its predictions.
    """

    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"task.dtype is {dtype!r}, expected 'float32' or 'bfloat16'")

    def loss(logits, labels):
        read = logits.astype(dtype) if dtype == "bfloat16" else logits
        return optax.softmax_cross_entropy_with_integer_labels(read, labels).astype(logits.dtype)

    def metrics(logits, labels):
        classes = logits.shape[-1]
        predicted = jnp.where(_finite(logits), jnp.argmax(logits, -1), classes)
        values = {
            "loss": loss(logits, labels),
            "accuracy": (predicted == labels).astype(jnp.float32),
        }
        if mcc:
            # No answer is one more class, which no example has.
            true, predicted = (jax.nn.one_hot(x, classes + 1) for x in (labels, predicted))
            values["confusion"] = true[:, :, None] * predicted[:, None, :]
        return values

    def derived(means):
        return {"loss": means["loss"], "mcc": matthews(means["confusion"]), "accuracy": means["accuracy"]}

    return Task(loss, metrics, derived=derived if mcc else None)


def span(*, score: Callable | None = None, max_answer: int = 30) -> Task:
    """Where an answer starts and ends: cross-entropy of both, averaged (Devlin et al., 2018, arXiv 1810.04805).

    Outputs are logits of start and end [B, T, 2]. Labels are `span` [B, 2] int32, first and last token of the answer or
    0, 0 without one, and `context` [B, 2] int32, first token of the text that holds it and one past its last. Only
    these tokens and the first of all, which stands for no answer, take part; so padding changes nothing, and
    probabilities differ from those of implementations that let a question answer itself.

    Args:
      score: compares predictions with gold answers on the host, `squad.scorer`; without it only the loss is reported.
      max_answer: tokens of a predicted answer at most.
    """

    def of_context(outputs, labels):
        at = jnp.arange(outputs.shape[1])[None]
        inside = (at >= labels["context"][:, :1]) & (at < labels["context"][:, 1:])
        return jnp.where(inside[..., None], outputs, -1e30)

    def loss(outputs, labels):
        logits = of_context(outputs, labels).at[:, 0].set(outputs[:, 0])
        each = optax.softmax_cross_entropy_with_integer_labels(logits.swapaxes(1, 2), labels["span"])
        return jnp.mean(each, axis=1)

    def predict(outputs, labels):
        logits = of_context(outputs, labels)
        start, end = logits[..., 0], logits[..., 1]
        later = jnp.arange(start.shape[1])[:, None] + jnp.arange(max_answer)[None]
        # [B, T, max_answer]: every span in question, by its first token and its length.
        sums = start[:, :, None] + jnp.take(end, later, axis=1, mode="fill", fill_value=-1e30)
        sums = sums.reshape(len(sums), -1)
        best = jnp.argmax(sums, axis=1)
        first = best // max_answer
        return {
            "start": first,
            "end": first + best % max_answer,
            "score": jnp.max(sums, axis=1),
            "null": jnp.sum(outputs[:, 0], axis=-1),
        }

    def derived(means):
        return {"loss": means["loss"], **{name: means[name] / means["questions"] for name in ("f1", "exact_match")}}

    task = Task(loss, lambda outputs, labels: {"loss": loss(outputs, labels)})
    return task if score is None else task._replace(predict=predict, score=_strict(score), derived=derived)


def causal(*, judge: Callable | None = None, average: str = "tokens", smoothing: float = 0.0) -> Task:
    """Answers to prompts: cross-entropy of each token of the answer, its end token included.

    Outputs are logits [B, P, V] of the inputs' `chosen` tokens. Labels are `targets` [B, P] int32 or longer, the tokens
    that should follow; -1 says that there is none. Reported are the averages over examples of the mean loss of an
    answer's tokens, of the share of tokens that would have been chosen greedily, given the right ones before them, and
    of answers, `exact`, all of whose tokens would: those that greedy generation gives word for word.

    Args:
      judge: compares generated answers with references on the host, `instructions.judge`.
      average: the loss of a batch is the mean over all its target `tokens`, as most implementations have it, or the
        mean over `examples` of means over tokens. A batch of one example has both alike.
      smoothing: of labels in training, the share of the target's weight that all V tokens divide among them (Szegedy
        et al., 2016, arXiv 1512.00567).
    """
    if average not in ("tokens", "examples"):
        raise ValueError(f"task.average is {average!r}, expected 'tokens' or 'examples'")
    if not 0 <= smoothing < 1:
        raise ValueError(f"task.smoothing is {smoothing}, expected at least 0 and below 1")

    def loss(outputs, labels):
        targets = _targets(outputs, labels)
        losses = _token_losses(outputs, targets)
        if smoothing:
            even = jax.nn.logsumexp(outputs, -1) - jnp.mean(outputs, -1)
            losses = (1 - smoothing) * losses + smoothing * jnp.where(targets >= 0, even, 0.0)
        counts = jnp.sum(targets >= 0, 1, dtype=jnp.float32)
        if average == "tokens":
            # The mean of this over the examples that have targets is the mean over tokens; padding has none.
            counts = jnp.sum(counts) / jnp.maximum(jnp.sum(counts > 0, dtype=jnp.float32), 1.0)
        return jnp.sum(losses, 1) / jnp.maximum(counts, 1.0)

    def metrics(outputs, labels):
        targets = _targets(outputs, labels)
        right = (jnp.argmax(outputs, -1) == targets) & _finite(outputs)
        return {
            "loss": _answer_loss(outputs, labels),
            "token_accuracy": jnp.sum(right, 1) / jnp.maximum(jnp.sum(targets >= 0, 1), 1),
            "exact": jnp.all(right | (targets < 0), 1).astype(jnp.float32),
        }

    def derived(means):
        generated = [name for name in means if name not in ("loss", "token_accuracy", "exact")]
        return {name: means[name] for name in ("loss", *generated, "exact", "token_accuracy")}

    return Task(loss, metrics, derived=None if judge is None else derived, judge=judge)


def choice(count: int) -> Task:
    """Classification by a causal model: of K answers to a prompt, the one with the least mean loss of a token.

    It trains as `causal` does. A test example is a prompt with all its answers, which are branches of one text. Labels
    are `targets` [B, P] int32 as there, the answer that each is of, `choice` [B, P] int32 from 1 on and 0 behind the
    last one, and `right` [B] int32, the right answer from 0 on. The first of equally likely answers counts.

    Args:
      count: K.
    """

    def metrics(outputs, labels):
        targets = _targets(outputs, labels)
        own = jax.nn.one_hot(labels["choice"][:, : targets.shape[1]] - 1, count)
        # Chosen one by one: a loss that is not finite is that of its own answer alone.
        losses = jnp.where(own > 0, _token_losses(outputs, targets)[..., None], 0.0)
        losses = jnp.sum(losses, 1) / jnp.maximum(jnp.sum(own, 1), 1.0)
        predicted = jnp.where(jnp.isfinite(jnp.sum(losses, 1)), jnp.argmin(losses, 1), count)
        return {
            "loss": jnp.take_along_axis(losses, labels["right"][:, None], 1)[:, 0],
            "accuracy": (predicted == labels["right"]).astype(jnp.float32),
        }

    return Task(causal().loss, metrics)


def _finite(logits: jax.Array) -> jax.Array:
    """[..] whether the largest of logits [.., K] is a number: one that is none would win."""
    return jnp.isfinite(jnp.max(logits, -1))


def _strict(score: Callable) -> Callable:
    """The scorer of questions, which have rows one after the other, where one with a broken prediction is wrong."""

    def strict(rows, predictions):
        values = score(rows, predictions)
        broken = ~np.all([np.isfinite(value) for value in predictions.values()], axis=0)
        if not broken.any():
            return values
        # What is said of a question stands at its first row.
        order = np.argsort(rows, kind="stable")
        question = np.cumsum(values["questions"][order])
        right = np.ones(len(rows))
        right[order] = ~np.isin(question, question[broken[order]])
        return {name: own if name in ("loss", "questions") else own * right for name, own in values.items()}

    return strict


def _targets(outputs, labels):
    """Targets [B, P] as long as the outputs, whose inputs may have been cut to a width."""
    return labels["targets"][:, : outputs.shape[1]]


def _token_losses(outputs, targets):
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs, jnp.maximum(targets, 0))
    return jnp.where(targets >= 0, losses, 0.0)


def _answer_loss(outputs, labels):
    """[B]: mean over the tokens of each answer, 0 without any."""
    targets = _targets(outputs, labels)
    return jnp.sum(_token_losses(outputs, targets), 1) / jnp.maximum(jnp.sum(targets >= 0, 1), 1)


def matthews(confusion: np.ndarray) -> np.ndarray:
    """Matthews' correlation coefficient of K classes (Gorodkin, 2004, doi 10.1016/j.compbiolchem.2004.09.006).

    Args:
      confusion: [.., K, K] counts or shares of examples, true classes by row, predicted classes by column.

    Returns:
      [..] in [-1, 1]. Where all examples have, or are given, one class, it is undefined and 0 is returned; NaN stays.
    """
    true, predicted = confusion.sum(-1), confusion.sum(-2)
    agreed = np.trace(confusion, axis1=-2, axis2=-1)
    covariance = agreed * true.sum(-1) - (true * predicted).sum(-1)
    # Each total is the sum of its own margin, so that with one class alone the variance is exactly 0.
    variances = [margin.sum(-1) ** 2 - (margin**2).sum(-1) for margin in (true, predicted)]
    scale = np.sqrt(variances[0] * variances[1])
    return np.where(scale == 0, 0.0, covariance / np.where(scale == 0, 1.0, scale))
