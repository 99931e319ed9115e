"""What clients write, from packs of tokens to scores of a corpus with several references a prompt."""

import functools
from typing import NamedTuple

import numpy as np
import pytest

from fedjax_peft import tasks, text_metrics, written
from fedjax_peft.data import instructions

WORDS = "the cat sat on a mat dog ran far away".split()
REFERENCES = [
    ("the dog ran far away", "the cat sat on a mat"),
    ("a dog ran far", "a cat ran far away on the mat"),
    ("the cat sat on a mat", "on a mat the cat sat", "a dog sat"),
    ("nothing",),
]
NAMES = ("bleu", "nist", "rougeL", "cider", "ter", "chrf_corpus")
# What is written to each example of the store; client 0 has examples 2 and 0, client 2 has example 1.
SAID = {0: "the cat sat on a mat", 1: "a dog ran far on the mat", 2: "on a mat the cat sat"}


class Pack(NamedTuple):
    rows: np.ndarray  # [I, B]
    weights: np.ndarray  # [I, B]
    slots: np.ndarray  # [I]


def packs():
    """Two packs of two batches of two, in which the padding row 4 stands for no example."""
    for rows, slots in (([[2, 4], [1, 4]], [0, 2]), ([[0, 4], [4, 4]], [0, 0])):
        rows = np.array(rows)
        pack = Pack(rows, (rows < 4).astype(np.float32), np.array(slots))
        ids = [[[WORDS.index(word) for word in SAID.get(row, "").split()] for row in batch] for batch in rows.tolist()]
        lengths = np.array([[len(text) for text in batch] for batch in ids])
        tokens = np.array([[text + [0] * (9 - len(text)) for text in batch] for batch in ids])
        yield pack, {"tokens": tokens, "lengths": lengths}


def task():
    def decode(tokens):
        return " ".join(WORDS[token] for token in tokens)

    measure = functools.partial(text_metrics.scored, NAMES)
    return tasks.causal(judge=instructions.judge(decode, REFERENCES, measure))


def expected(*rows):
    return text_metrics.scored(NAMES, [SAID[row] for row in rows], [REFERENCES[row] for row in rows])


def test_a_client_has_the_scores_of_its_own_corpus_with_all_references():
    found = written.by_client(task(), packs(), 3)
    assert [sorted(one.rows.tolist()) for one in found] == [[0, 2], [], [1]]
    assert found[0].metrics == pytest.approx(expected(2, 0)) and found[2].metrics == pytest.approx(expected(1))
    # Both texts of client 0 are further references, and perfect only beside them.
    assert found[0].metrics["bleu"] == pytest.approx(1) and found[0].metrics["ter"] == 0
    first = text_metrics.scored(["bleu"], [SAID[0], SAID[2]], [REFERENCES[row][:1] for row in (0, 2)])
    assert first["bleu"] < 0.9
    columns = written.columns([one.metrics for one in found])
    assert tuple(columns) == NAMES
    np.testing.assert_array_equal(np.isnan(columns["bleu"]), [False, True, False])


def test_a_pool_is_one_corpus():
    found = written.by_client(task(), packs(), 3)
    whole = written.judged(task(), found)
    assert whole == pytest.approx(expected(2, 0, 1))
    for name in set(NAMES) - {"rougeL"}:
        mean = np.average([found[0].metrics[name], found[2].metrics[name]], weights=[2, 1])
        assert abs(whole[name] - mean) > 1e-3, name
    assert written.judged(task(), found[1:2]) == {}


def test_who_was_asked_nothing_wrote_nothing():
    (one,) = written.by_client(task(), (), 1)
    assert len(one.rows) == 0 and one.metrics == {} and written.columns([one.metrics]) == {}
