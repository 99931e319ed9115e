"""The quickstart's data: counts of the published corpus, and a split without leaks."""

import numpy as np
import pytest

from fedjax_peft.data import chatterbot

ROWS = {
    **{"en": 792, "fa": 773, "ja": 568, "it": 562, "zh": 467, "uk": 463, "zh-Hant": 456, "ko": 454},
    **{"nl": 284, "es": 270, "id": 163, "pt": 119, "bn": 113, "de": 113, "tr": 93, "fr": 89},
}


@pytest.fixture(scope="module")
def corpus():
    return chatterbot.load(seed=0)


def rows(pool, language):
    return {split: table["language"] == language for split, table in pool.items()}


def test_counts_of_the_corpus(corpus):
    assert len(chatterbot.dialogues()["text"]) == 7642
    assert len(corpus.topics) == 19 and {"ai", "greetings", "psychology"} < set(corpus.topics)
    assert not {"tech_support", "coding", "dinero", "emotions"} & set(corpus.topics)
    counts = {x: sum(int(r.sum()) for r in rows(corpus.seen, x).values()) for x in corpus.languages}
    assert counts == ROWS and list(counts.values()) == sorted(ROWS.values(), reverse=True)
    assert corpus.unseen_languages == ("hi", "he", "or", "ru", "sv", "mr", "hi-Latn", "ta", "yo")


def test_columns_agree(corpus):
    table = corpus.seen["test"]
    assert table["label"].dtype == np.int32
    assert [corpus.topics[label] for label in table["label"]] == table["topic"].tolist()
    assert all(text == f"{a}\n{b}" for text, a, b in zip(table["text"], table["prompt"], table["reply"], strict=True))
    assert all(table["prompt"]) and all(table["reply"])


def test_a_prompt_is_never_in_both_splits(corpus):
    prompts = {
        split: {x.casefold() for pool in (corpus.seen, corpus.unseen) for x in pool[split]["prompt"]}
        for split in ("train", "test")
    }
    assert not prompts["train"] & prompts["test"]


def test_every_language_gets_its_share(corpus):
    for pool, languages in ((corpus.seen, corpus.languages), (corpus.unseen, corpus.unseen_languages)):
        for language in languages:
            here = rows(pool, language)
            train, test = (np.bincount(pool[s]["label"][here[s]], minlength=19) for s in ("train", "test"))
            total = train.sum() + test.sum()
            assert 0.2 * total - 3 <= test.sum() <= 0.2 * total + 1
            assert 0.5 * np.abs(train / train.sum() - test / test.sum()).sum() < 0.3


def test_the_split_is_a_function_of_its_seed(corpus):
    again, other = chatterbot.load(seed=0), chatterbot.load(seed=1)
    assert again.seen["test"]["text"].tolist() == corpus.seen["test"]["text"].tolist()
    assert other.seen["test"]["text"].tolist() != corpus.seen["test"]["text"].tolist()


def test_pools_follow_the_limits():
    corpus = chatterbot.load(min_rows=200, min_unseen_rows=100)
    assert corpus.languages == ("en", "fa", "ja", "it", "zh", "uk", "zh-Hant", "ko", "nl", "es")
    assert corpus.unseen_languages == ("id", "pt", "bn", "de")
