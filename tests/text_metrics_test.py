"""Metrics of texts: values worked out by hand, and values of other packages that were asked once."""

import itertools
import math
import random
import sys

import pytest

from fedjax_peft import text_metrics

OFFLINE = [name for name in text_metrics.METRICS if name != "meteor_wordnet"]


def one(name, prediction, *references):
    return text_metrics.scored([name], [prediction], [references])[name]


@pytest.mark.parametrize(
    ("reference", "prediction", "ref", "google"),
    [
        ("the cat sat on the mat", "the cat is on the mat", 0.8, 0.833333),
        ("A b c. d e", "A b c d e", 1.0, 1.0),
        ("yes", "Yes", 0.0, 1.0),
        ("a a a a", "a b a b", 0.666667, 0.5),
        ("one two three", "three two one", 0.333333, 0.333333),
        ("one two three", "...", 0.0, 0.0),
        ("one two three", "", 0.0, 0.0),
        # The packages rouge 1.0.1 and rouge-score 0.1.2 were asked for these.
        ("a b. . c", "a. . c b. d", 8 / 9, 4 / 7),
        ("b a c. a d", "a b c. d a", 0.75, 0.6),
        ("It's 3.5 m, not-so far", "its 3.5m not so Far", 1 / 6, 4 / 7),
    ],
)
def test_both_kinds_of_rouge_l(reference, prediction, ref, google):
    assert one("rougeL_ref", prediction, reference) == pytest.approx(ref, abs=1e-6)
    assert one("rougeL", prediction, reference) == pytest.approx(google, abs=1e-6)


def test_common_subsequences_are_the_longest():
    rng = random.Random(0)
    for _ in range(60):
        a, b = ([rng.choice("xyz") for _ in range(rng.randint(0, 6))] for _ in range(2))
        every = (set(itertools.combinations(b, n)) & set(itertools.combinations(a, n)) for n in range(len(a) + 1))
        longest = [found for found in every if found][-1]
        assert text_metrics._table(a, b)[-1, -1] == len(next(iter(longest)))
        assert text_metrics._subsequence(a, b) in [set(words) for words in longest]


def test_rouge_n():
    assert one("rouge1", "The cat sat", "the cat ran off") == pytest.approx(4 / 7)
    assert one("rouge2", "The cat sat", "the cat ran off") == pytest.approx(2 / 5)
    assert one("rouge1", "a a b", "a c") == pytest.approx(2 / 5), "a counts once"
    assert one("rouge2", "a", "a") == 0


def test_exact_match():
    assert one("exact_match", " New\n York ", "Paris", "New York") == 1
    assert one("exact_match", "new York", "New York") == 0


def test_meteor():
    # Three of five words match in two chunks; then two stems in one.
    assert one("meteor", "a cat sits here now", "one cat sat here now") == pytest.approx(0.6 * (1 - 0.5 * (2 / 3) ** 3))
    assert one("meteor", "Dogs run", "dog runs") == pytest.approx(1 - 0.5 / 8)
    # Precision 1, recall 1/2: F = PR / (.9 P + .1 R).
    assert one("meteor", "Dogs run", "dog runs far away") == pytest.approx(0.5 / 0.95 * (1 - 0.5 / 8))
    assert one("meteor", "big", "large") == 0


def test_wordnet_is_asked_for_only_where_it_is_wanted():
    nltk = pytest.importorskip("nltk")
    try:
        nltk.data.find("corpora/wordnet.zip")
    except LookupError:
        with pytest.raises(ValueError, match="nltk finds no WordNet: run `python -m nltk.downloader wordnet`"):
            one("meteor_wordnet", "big", "large")
    else:
        assert one("meteor_wordnet", "big", "large") == 0.5


def test_chrf():
    # Half of the letters, none of the pairs, and nothing is longer.
    assert one("chrf", "ab", "ac") == pytest.approx(0.25)
    assert one("chrf", "日本語", "日本語") == 1
    # Recall counts twice: of 4 letters and 3, 2, 1 longer runs, 2 and 1 are found, where two orders exist.
    assert one("chrf", "ab", "xx", "abcd") == pytest.approx(5 * (5 / 12) / (4 + 5 / 12))


def test_bleu():
    # 5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 quadruples.
    assert one("bleu", "a b c d e f", "a b c d x f") == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 / 3) ** 0.25)
    assert one("bleu", "a b c d", "a b c d e") == pytest.approx(math.exp(-1 / 4)), "too short"
    assert one("bleu", "A b c d", "a b c d") == pytest.approx((3 / 4 * 2 / 3 / 2 / 2) ** 0.25), "0 of 1 counts 1/2"
    assert one("bleu_lower", "A b c d", "a b c d") == pytest.approx(1)


def test_a_corpus_is_more_than_its_examples():
    predictions, references = ["a b c d e f", "v w x y z"], [["a b c d x f"], ["q", "v w x y z"]]
    found = text_metrics.scored(["bleu", "rouge1"], predictions, references)
    assert found["bleu"] == pytest.approx((10 / 11 * 7 / 9 * 5 / 7 * 3 / 5) ** 0.25)
    assert found["rouge1"] == pytest.approx((5 / 6 + 1) / 2)


def test_chrf_of_a_corpus_is_that_of_all_n_grams():
    # Of 2 and 6 letters 1 and 6 are found, of 1 and 5 pairs 0 and 5; only longer runs of the second exist.
    predictions, references = ["ab", "abcdef"], [["ac"], ["zz", "abcdef"]]
    found = text_metrics.scored(["chrf_corpus", "chrf"], predictions, references)
    assert found["chrf_corpus"] == pytest.approx((7 / 8 + 5 / 6 + 4) / 6)
    assert found["chrf"] == pytest.approx((1 / 4 + 1) / 2)


def test_ter():
    assert one("ter", "a b c d", "a b d") == pytest.approx(1 / 3)
    assert one("ter", "c d a b", "a b c d") == pytest.approx(1 / 4), "one shift"
    corpus = text_metrics.scored(["ter"], ["a b c d", "c d a b"], [["a b d"], ["a b c d"]])["ter"]
    assert corpus == pytest.approx(2 / 7)


def test_nist():
    # Of four words of references a is two: a tells 1 bit, b 2, b after a 1.
    assert one("nist", "a b", "a b", "a c") == pytest.approx((1 + 2) / 2 + 1)
    assert one("nist", "A a", "a b", "a c") == pytest.approx(1 / 2), "no reference has a twice"
    assert one("nist", "a b", "a b c") == pytest.approx(math.log2(3) / 2), "half at two thirds of the length"
    # Half of the references' words are a, the others b, which follows a always: 1 bit each, and 0.
    assert one("nist", "a b", "a b", "a b a b") == pytest.approx(1 / 2), "two thirds of the mean length"


def test_cider():
    predictions, references = ["a b", "c x"], [["a b"], ["c d"]]
    found = text_metrics.scored(["cider"], predictions, references)["cider"]
    # All of words and pairs of the first, half of the words of the second; nothing of triples and quadruples.
    assert found == pytest.approx(10 * ((1 + 1) / 4 + (1 / 2) / 4) / 2)
    longer = text_metrics.scored(["cider"], ["a b e", "c d"], [["A, b!"], ["c d"]])["cider"]
    first = (2 / math.sqrt(6) + 1 / math.sqrt(2)) / 4 * math.exp(-1 / 72)
    assert longer == pytest.approx(10 * (first + 1 / 2) / 2)
    assert one("cider", "a b", "a b") == 0, "in one example nothing is rare"


@pytest.mark.parametrize("name", OFFLINE)
def test_perfect_and_empty_texts(name):
    texts = ["the cat sat on the mat", "a dog runs far away"]
    perfect = text_metrics.scored([name], texts, [[text] for text in texts])[name]
    empty = text_metrics.scored([name], ["", "..."], [[text] for text in texts])[name]
    assert math.isfinite(perfect) and math.isfinite(empty)
    assert (perfect, empty) == pytest.approx((0, 1)) if name == "ter" else perfect > 0.99 and empty < 0.01


def test_mistakes_get_a_sentence(monkeypatch):
    with pytest.raises(ValueError, match="metric is 'rouge', expected one of exact_match, rouge1"):
        text_metrics.scored(["rouge"], ["a"], [["a"]])
    with pytest.raises(ValueError, match="2 predictions for 1 examples"):
        text_metrics.scored(["rougeL"], ["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="references of example 1 are 'b', expected a sequence of texts"):
        text_metrics.scored(["rougeL"], ["a", "b"], [["a"], "b"])
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ValueError, match="needs the package 'sacrebleu': run `pip install sacrebleu`"):
        one("bleu", "a", "a")
