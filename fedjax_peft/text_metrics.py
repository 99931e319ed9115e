"""Scores of generated texts against references, on the host.

All are fractions of 1, but NIST and CIDEr, which have no upper end that matters; of TER less is better. A text may have
several references. Packages are used where they are kept well and need no download: sacrebleu (Post, 2018, arXiv
1804.08771) and nltk's METEOR; the rest is written from the papers.
"""

import collections
import functools
import importlib
import math
import re
import types
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

_ORDER = 4  # longest n-grams of CIDEr
_NIST_ORDER = 5
_SIGMA = 6.0  # of CIDEr's Gaussian over differences of lengths, in tokens


class Metric(NamedTuple):
    """How texts are scored."""

    score: Callable[..., float]
    """(prediction, references) -> float, to be averaged over examples; or of a corpus (predictions, references of
    each) -> float."""
    corpus: bool = False
    """Whether there is a score for all examples together only."""


def scored(names: Sequence[str], predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Scores of one model on one set of examples: {name: mean over examples, or score of the corpus}.

    Args:
      names: keys of `METRICS`.
      predictions: [n] texts.
      references: [n] of one text or more each.

    Raises:
      ValueError: for an unknown name, no examples, one without references, or a package that is not installed.
    """
    for name in names:
        if name not in METRICS:
            raise ValueError(f"metric is {name!r}, expected one of {', '.join(METRICS)}")
    if len(predictions) != len(references) or not predictions:
        raise ValueError(
            f"{len(predictions)} predictions for {len(references)} examples, expected one for each of some"
        )
    bare = next((i for i, texts in enumerate(references) if isinstance(texts, str) or not texts), None)
    if bare is not None:
        raise ValueError(f"references of example {bare} are {references[bare]!r}, expected a sequence of texts")

    def of(metric):
        if metric.corpus:
            return metric.score(predictions, references)
        return float(np.mean([metric.score(*pair) for pair in zip(predictions, references, strict=True)]))

    return {name: of(METRICS[name]) for name in names}


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 if a reference is the same text, white space at the ends and its kind aside."""
    return float(prediction.split() in [text.split() for text in references])


def rouge_n(size: int, prediction: str, references: Sequence[str]) -> float:
    """ROUGE-N (Lin, 2004, "ROUGE: A Package for Automatic Evaluation of Summaries"), best of all references.

    F1 of n-grams with multiplicity, as the package rouge-score has it: lower case, all but a-z and 0-9 are spaces, no
    stemming. Texts in other scripts have no words and score 0.
    """

    def score(reference):
        ours, theirs = (_ngrams(_words(text), size) for text in (prediction, reference))
        return _f1((ours & theirs).total(), ours.total(), theirs.total())

    return max(map(score, references))


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L as in the package rouge-score: F1 of the longest common subsequence of words; words as in `rouge_n`."""

    def score(reference):
        ours, theirs = _words(prediction), _words(reference)
        return _f1(int(_table(ours, theirs)[-1, -1]), len(ours), len(theirs))

    return max(map(score, references))


def rouge_l_ref(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L as in the package rouge 1.0.1, which FedAMoLE's numbers come from; not comparable with `rouge_l`.

    A text is its sentences, cut at each full stop, and counts distinct words as they are written. What a reference has
    in common with a prediction is the union of the longest common subsequences of all pairs of sentences.
    """

    def score(reference):
        ours, theirs = _sentences(prediction), _sentences(reference)
        common = set().union(*(_subsequence(theirs_one, ours_one) for theirs_one in theirs for ours_one in ours))
        precision, recall = (len(common) / max(len(set().union(*texts)), 1) for texts in (ours, theirs))
        return 2 * precision * recall / (precision + recall + 1e-8)

    return max(map(score, references))


def meteor(prediction: str, references: Sequence[str], *, synonyms: bool = False) -> float:
    """METEOR (Banerjee and Lavie, 2005) as in nltk, alpha .9, beta 3, gamma .5: same words and same Porter stems.

    Words are those of nltk's tokenizer without its splitter of sentences, whose model is a download.

    Args:
      prediction: a text.
      references: one or more, of which the best counts.
      synonyms: match WordNet's synonyms as well, which nltk must have on disk.

    Raises:
      ValueError: nltk or its WordNet is not installed.
    """
    nltk = _package("nltk.translate.meteor_score", "nltk")
    cut = _package("nltk.tokenize", "nltk").NLTKWordTokenizer().tokenize
    lexicon = _wordnet() if synonyms else types.SimpleNamespace(synsets=lambda word: [])
    return float(nltk.meteor_score([cut(text) for text in references], cut(prediction), wordnet=lexicon))


def chrf(prediction: str, references: Sequence[str]) -> float:
    """chrF2 (Popovic, 2015): F score of character n-grams up to 6, recall counting twice; needs no words."""
    return _package("sacrebleu").sentence_chrf(prediction, list(references)).score / 100


def chrf_corpus(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """chrF2 of the n-grams of all texts together, as sacrebleu computes it."""
    return _package("sacrebleu").corpus_chrf(predictions, _streams(references)).score / 100


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]], *, lowercase: bool = False) -> float:
    """BLEU (Papineni et al., 2002) of a corpus as sacrebleu computes it: words of mteval 13a, exponential smoothing."""
    return _package("sacrebleu").corpus_bleu(predictions, _streams(references), lowercase=lowercase).score / 100


def ter(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Edits and shifts for each word of the references (Snover et al., 2006); less is better, and it may exceed 1."""
    return _package("sacrebleu").corpus_ter(predictions, _streams(references)).score / 100


def nist(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """NIST (Doddington, 2002): n-grams up to 5 that match, weighted by their information; mteval's words in lower case.

    Several references are treated as in mteval: an n-gram counts as often as in the one that has it most, and the
    penalty for short texts compares with the mean of their lengths.
    """
    package = _package("sacrebleu.tokenizers.tokenizer_13a", "sacrebleu")
    cut = package.Tokenizer13a()
    ours = [cut(text.lower()).split() for text in predictions]
    theirs = [[cut(text.lower()).split() for text in texts] for texts in references]
    counts = collections.Counter()
    for several in theirs:
        for text in several:
            counts.update(_ngrams(text, *range(1, _NIST_ORDER + 1)))
            counts[()] += len(text)
    score = 0.0
    for n in range(1, _NIST_ORDER + 1):
        found, total = 0.0, 0
        for text, several in zip(ours, theirs, strict=True):
            own = _ngrams(text, n)
            most = functools.reduce(lambda a, b: a | b, (_ngrams(reference, n) for reference in several))
            # Eq. 2: bits that a word tells after the words before it.
            found += sum(count * math.log2(counts[gram[:-1]] / counts[gram]) for gram, count in (own & most).items())
            total += own.total()
        score += found / max(total, 1)
    expected = sum(float(np.mean([len(text) for text in several])) for several in theirs)
    ratio = min(sum(map(len, ours)) / max(expected, 1e-9), 1.0)
    # Eq. 3: one half at two thirds of the length.
    return score * math.exp(math.log(0.5) * (math.log(ratio) / math.log(1.5)) ** 2) if ratio else 0.0


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D (Vedantam et al., 2015, arXiv 1411.5726) times 10, without stemming, as COCO's and E2E's scripts have it.

    How rare an n-gram is, is counted in these references: examples that have it. Words are runs of letters and digits
    in lower case.
    """
    ours = [_grams(text) for text in predictions]
    theirs = [[_grams(text) for text in texts] for texts in references]
    seen = collections.Counter(gram for several in theirs for gram in set().union(*several))
    rarity = collections.defaultdict(lambda: math.log(len(theirs)))
    rarity |= {gram: math.log(len(theirs) / count) for gram, count in seen.items()}

    def vectors(counts):
        return [{g: c * rarity[g] for g, c in counts.items() if len(g) == n} for n in range(1, _ORDER + 1)]

    def bigrams(counts):
        return sum(count for gram, count in counts.items() if len(gram) == 2)

    def likeness(own, other):
        total = 0.0
        for x, y in zip(vectors(own), vectors(other), strict=True):
            norm = math.hypot(*x.values()) * math.hypot(*y.values())
            total += sum(min(value, y[gram]) * y[gram] for gram, value in x.items() if gram in y) / (norm or 1.0)
        # The scripts measure lengths in bigrams.
        return total / _ORDER * math.exp(-((bigrams(own) - bigrams(other)) ** 2) / (2 * _SIGMA**2))

    scores = [np.mean([likeness(own, other) for other in several]) for own, several in zip(ours, theirs, strict=True)]
    return 10 * float(np.mean(scores))


METRICS = {
    "exact_match": Metric(exact_match),
    "rouge1": Metric(functools.partial(rouge_n, 1)),
    "rouge2": Metric(functools.partial(rouge_n, 2)),
    "rougeL": Metric(rouge_l),
    "rougeL_ref": Metric(rouge_l_ref),
    "meteor": Metric(meteor),
    "meteor_wordnet": Metric(functools.partial(meteor, synonyms=True)),
    "chrf": Metric(chrf),
    "chrf_corpus": Metric(chrf_corpus, corpus=True),
    "bleu": Metric(bleu, corpus=True),
    "bleu_lower": Metric(functools.partial(bleu, lowercase=True), corpus=True),
    "ter": Metric(ter, corpus=True),
    "nist": Metric(nist, corpus=True),
    "cider": Metric(cider, corpus=True),
}
"""{name: metric}; E2E and WebNLG are published with `bleu_lower`."""


def _words(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())


def _sentences(text: str) -> list[list[str]]:
    # Blank between two full stops is a sentence of one empty word there.
    return [part.split() or [""] for part in text.split(".") if part]


def _ngrams(words: Sequence[str], *sizes: int) -> collections.Counter:
    return collections.Counter(tuple(words[i : i + n]) for n in sizes for i in range(len(words) - n + 1))


def _grams(text: str) -> collections.Counter:
    return _ngrams(re.findall(r"\w+", text.lower()), *range(1, _ORDER + 1))


def _table(a: Sequence[str], b: Sequence[str]) -> np.ndarray:
    """[len(a) + 1, len(b) + 1] lengths of the longest common subsequences of what both begin with."""
    table = np.zeros((len(a) + 1, len(b) + 1), np.int32)
    for i, word in enumerate(a):
        matches = np.where([word == other for other in b], table[i, :-1] + 1, 0).astype(np.int32)
        table[i + 1, 1:] = np.maximum.accumulate(np.maximum(matches, table[i, 1:]))
    return table


def _subsequence(a: Sequence[str], b: Sequence[str]) -> set[str]:
    """Words of one longest common subsequence: of several, the one that the package rouge finds."""
    table, i, j, found = _table(a, b), len(a), len(b), set()
    while i and j:
        if a[i - 1] == b[j - 1]:
            i, j = i - 1, j - 1
            found.add(a[i])
        elif table[i - 1, j] > table[i, j - 1]:
            i -= 1
        else:
            j -= 1
    return found


def _f1(common: int, ours: int, theirs: int) -> float:
    return 2 * common / (ours + theirs) if common else 0.0


def _streams(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """First references of all examples, second ones, and so on."""
    most = max(map(len, references))
    return [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]


def _wordnet():
    wordnet = _package("nltk.corpus", "nltk").wordnet
    try:
        wordnet.ensure_loaded()
    except LookupError:
        raise ValueError("nltk finds no WordNet: run `python -m nltk.downloader wordnet`") from None
    return wordnet


def _package(module: str, package: str | None = None):

    try:
        return importlib.import_module(module)
    except ImportError:
        name = package or module
        raise ValueError(f"this metric needs the package {name!r}: run `pip install {name}`") from None
