"""The quickstart's data: dialogues that volunteers wrote for ChatterBot, in many languages, by topic.

They are the YAML files of the PyPI package `chatterbot-corpus` (BSD licence), read without importing it.
Languages are the natural clients: they differ in size, label mix and number of topics. Many files are
translations of the English ones, so a dialogue in the test set of one language may have its translation in
the training set of another.
"""

from typing import NamedTuple

import numpy as np

from fedjax_peft import packages

Table = dict[str, np.ndarray]

PACKAGE = "chatterbot-corpus"

# Spelling variants and Spanish names of a topic.
ALIASES = {
    "coversations": "conversations",
    "greeting": "greetings",
    "emotions": "emotion",
    "emociones": "emotion",
    "computer": "computers",
    "sport": "sports",
    "IA": "ai",
    "dinero": "money",
    "profile": "botprofile",
    "perfilbot": "botprofile",
    "psicologia": "psychology",
}

# BCP 47 tags of the package's folders.
LANGUAGES = {
    "bengali": "bn",
    "chinese": "zh",
    "dutch": "nl",
    "english": "en",
    "french": "fr",
    "german": "de",
    "hebrew": "he",
    "hindi": "hi",
    "hinglish": "hi-Latn",
    "indonesian": "id",
    "italian": "it",
    "japanese": "ja",
    "korean": "ko",
    "marathi": "mr",
    "oriya": "or",
    "persian": "fa",
    "portuguese": "pt",
    "russian": "ru",
    "spanish": "es",
    "swedish": "sv",
    "tamil": "ta",
    "telugu": "te",
    "thai": "th",
    "traditionalchinese": "zh-Hant",
    "turkish": "tr",
    "ukrainian": "uk",
    "urdu": "ur",
    "yoruba": "yo",
}


class Corpus(NamedTuple):
    """Dialogues by pool and split. Columns: language, topic, prompt, reply, text (str) and label (int32)."""

    seen: dict[str, Table]  # 'train' and 'test' of the languages that are large enough to train on
    unseen: dict[str, Table]  # 'train' and 'test' of smaller languages, for clients that never train
    topics: tuple[str, ...]  # name of each label
    languages: tuple[str, ...]  # of the seen pool, largest first
    unseen_languages: tuple[str, ...]  # largest first


def load(
    *,
    seed: int = 0,
    test_fraction: float = 0.2,
    min_rows: int = 80,
    min_unseen_rows: int = 20,
    min_languages: int = 6,
) -> Corpus:
    """Reads, merges, filters and splits the corpus.

    Args:
      seed: of the split into train and test.
      test_fraction: share of a language's rows that is held out.
      min_rows: languages of the seen pool have at least so many rows,
      min_unseen_rows: those of the unseen pool at least so many, but fewer than `min_rows`.
      min_languages: topics in fewer languages than this are left out.

    Raises:
      ValueError: the package is not installed.
    """
    table = dialogues()
    spread = {t: len(set(table["language"][table["topic"] == t])) for t in sorted(set(table["topic"]))}
    topics = tuple(t for t, languages in spread.items() if languages >= min_languages)
    table = _select(table, np.isin(table["topic"], topics))
    table["label"] = np.array([topics.index(t) for t in table["topic"]], np.int32)
    names, counts = np.unique(table["language"], return_counts=True)
    ranked = [names[i] for i in np.lexsort((names, -counts))]
    rows = dict(zip(names, counts, strict=True))
    seen = tuple(n for n in ranked if rows[n] >= min_rows)
    unseen = tuple(n for n in ranked if min_unseen_rows <= rows[n] < min_rows)
    held_out = _hold_out(table, test_fraction, seed)

    def split(languages: tuple[str, ...]) -> dict[str, Table]:
        here = np.isin(table["language"], languages)
        return {"train": _select(table, here & ~held_out), "test": _select(table, here & held_out)}

    return Corpus(split(seen), split(unseen), topics, seen, unseen)


def dialogues() -> Table:
    """All dialogues with at least a prompt and a reply; of longer ones, the first two turns.

    Columns language, topic, prompt, reply and text (prompt and reply, one a line), in the order of the
    files' names.
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    rows = []
    for path in packages.files(PACKAGE, ".yml"):
        language, topic = LANGUAGES[path.parent.name], ALIASES.get(path.stem, path.stem)
        for turns in yaml.load(path.read_bytes(), Loader=loader)["conversations"]:
            if len(turns) > 1:
                prompt, reply = (" ".join(str(turn).split()) for turn in turns[:2])
                rows.append((language, topic, prompt, reply, f"{prompt}\n{reply}"))
    columns = zip(*rows, strict=True)
    names = ("language", "topic", "prompt", "reply", "text")
    return {name: np.array(column, object) for name, column in zip(names, columns, strict=True)}


def _hold_out(table: Table, fraction: float, seed: int) -> np.ndarray:
    """[M] bool: rows of the test set. A prompt is in one set only, in whatever languages and topics it
    occurs.

    Each language is walked topic by topic in random order, and a prompt is held out whenever the test set
    would otherwise fall behind its share: languages and topics get their share without small ones being left
    empty.
    """
    rng = np.random.default_rng(seed)
    keys = np.array([prompt.casefold() for prompt in table["prompt"]], object)
    assigned: dict[str, bool] = {}
    for language in sorted(set(table["language"])):
        (here,) = np.nonzero(table["language"] == language)
        here = here[np.lexsort((rng.permutation(len(here)), table["topic"][here].astype(str)))]
        groups: dict[str, int] = {}
        for row in here:
            groups[keys[row]] = groups.get(keys[row], 0) + 1
        rows = held = 0
        for key, count in groups.items():
            rows += count
            test = assigned.setdefault(key, held + count <= fraction * rows)
            held += count * test
    return np.array([assigned[key] for key in keys])


def _select(table: Table, rows: np.ndarray) -> Table:
    return {name: column[rows] for name, column in table.items()}
