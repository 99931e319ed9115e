"""GGUF: names, layouts and the tokenizer of one file; SmolLM2's golden answer; transformers as an independent judge."""

import decoder
import encoder
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers as rust

from fedjax_peft.data import tokenizers
from fedjax_peft.models import gguf, hf, llama

KEY = jax.random.key(0)
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
TEXTS = ["The quick brown fox jumps over the lazy dog.", "La capitale de la France est Paris."]
# Mean loss a token of TEXTS in nats, from this code and confirmed by transformers; they may change only with the
# package's weights.
LOSSES = [4.01166, 5.49640]


def written(path, kind, quantized=(), divisors=None, **changes):
    """A tiny model as llama.cpp's converter writes it, and the same weights here."""
    package = pytest.importorskip("gguf")
    config = decoder.config(kind) | {"hidden_size": 32, "intermediate_size": 64} | changes
    model = llama.llama(config)
    base = encoder.weights(jax.eval_shape(model.init, KEY))
    writer = package.GGUFWriter(path, config["model_type"])
    writer.add_block_count(decoder.LAYERS)
    writer.add_context_length(decoder.POSITIONS)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(decoder.VOCABULARY)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(divisors, np.float32))
    names = {"self_attn.": "attn_", "mlp.": "ffn_", "_proj": "", "model.layers": "blk", "o.weight": "output.weight"}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "lm_head": "output"}
    names |= {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    for name, tensor in decoder.published(base).items():
        if config["model_type"] == "llama" and ("q_proj" in name or "k_proj" in name):
            # As llama.cpp turns halves into pairs.
            heads = 4 if "q_proj" in name else 2
            tensor = tensor.reshape(heads, 2, -1, 32).swapaxes(1, 2).reshape(tensor.shape)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if any(part in name for part in quantized):
            kind = package.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, package.quants.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return config, base


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_every_tensor_finds_its_place(tmp_path, kind):
    config, base = written(tmp_path / "model.gguf", kind)
    found = hf.load(tmp_path / "model.gguf", labels=0, head="lm", key=KEY)
    assert found.fresh == found.unused == ()
    jax.tree.map(np.testing.assert_array_equal, found.base, base)
    same = {name: config[name] for name in found.config if name in config and name != "rms_norm_eps"}
    assert {name: found.config[name] for name in same} == same and found.config["rms_norm_eps"] == 1e-5


def test_divided_frequencies_are_those_of_llama_three(tmp_path):
    # 1303, 49, 1.8 and .07 turns in 8192 tokens: fast rotations stay, slow ones are divided by 8, one is between.
    divisors = [1.0, 1.0, 2.6945, 8.0]
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192}
    plain = 5e5 ** -(np.arange(4) / 4)
    scaled = llama.frequencies({"rope_theta": 5e5, "rope_scaling": scaling}, 8)
    np.testing.assert_allclose(plain / scaled, divisors, rtol=1e-3)
    written(tmp_path / "model.gguf", "llama", divisors=plain / scaled, rope_theta=5e5)
    found = hf.load(tmp_path / "model.gguf", labels=0, head="lm", key=KEY)
    assert found.unused == () and found.config["rope_scaling"] == scaling
    np.testing.assert_allclose(llama.frequencies(found.config, 8), scaled, rtol=1e-6)
    for other in ([1.0, 1.0, 2.0, 8.0], [1.0, 8.0]):
        written(tmp_path / "other.gguf", "llama", divisors=other, rope_theta=5e5)
        with pytest.raises(ValueError, match="numbers that are not those of Llama 3"):
            gguf.read(tmp_path / "other.gguf")


def test_rows_of_quantised_tables_are_those_of_the_whole(tmp_path):
    _, base = written(tmp_path / "model.gguf", "llama", quantized=("token_embd", "output.weight"))
    kept = np.array([3, 49, 7])
    full, small = (
        hf.load(tmp_path / "model.gguf", labels=0, head="lm", key=KEY, vocabulary=rows).base for rows in (None, kept)
    )
    exact, table = base["model"]["embed_tokens"]["embedding"], full["model"]["embed_tokens"]["embedding"]
    assert not np.array_equal(table, exact)
    np.testing.assert_allclose(table, exact, atol=0.02)
    np.testing.assert_array_equal(small["model"]["embed_tokens"]["embedding"], table[kept])
    np.testing.assert_array_equal(small["lm_head"]["kernel"], full["lm_head"]["kernel"][:, kept])


def test_faulty_files_get_a_sentence(tmp_path):
    written(tmp_path / "model.gguf", "llama")
    content = (tmp_path / "model.gguf").read_bytes()
    damaged = {"cut": content[:400], "short": content[:-5000], "foreign": b"abc" * 50}
    for name, part in damaged.items():
        (tmp_path / f"{name}.gguf").write_bytes(part)
        with pytest.raises(ValueError, match=f"{name}.gguf is no complete GGUF file: ") as caught:
            hf.load(tmp_path / f"{name}.gguf", labels=0, head="lm", key=KEY)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="has a tokenizer of the kind None, expected 'gpt2'"):
        gguf.tokenizer_parts(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"general.architecture": "mamba"}, "architecture 'mamba', expected llama or qwen2"),
        ({"llama.rope.scaling.type": "yarn"}, "scales its rotations"),
        ({"llama.rope.dimension_count": 4}, "rotates 4 features of heads of 8"),
    ],
)
def test_models_that_differ_get_a_sentence(change, sentence):
    fields = {"general.architecture": "llama", "llama.embedding_length": 32, "llama.attention.head_count": 4}
    with pytest.raises(ValueError, match=sentence):
        gguf._config("some.gguf", fields | change, set())


def test_a_tokenizer_needs_what_it_names():
    parts = gguf.Tokenizer(["a", "b", "<e>"], [], "gpt-2", [2], {"eos": 2}, False, None)
    tokenizer = tokenizers.from_bpe(*parts)
    assert tokenizer.encode(["ab<e>"], max_length=8).tokens.tolist() == [0, 1, 2]
    assert (tokenizer.pad, tokenizer.eos, tokenizer.bos, tokenizer.chat) == (2, 2, None, None)
    begun = tokenizers.from_bpe(*parts._replace(begins=True, special={"bos": 2, "eos": 2}))
    assert begun.encode(["ab"], max_length=8).tokens.tolist() == [2, 0, 1]
    assert begun.encode(["ab"], max_length=8, special=False).tokens.tolist() == [0, 1]
    with pytest.raises(ValueError, match="splits texts as 'tekken', expected one of gpt-2, smollm, llama-bpe, qwen2"):
        tokenizers.from_bpe(*parts._replace(split="tekken"))
    with pytest.raises(ValueError, match="names the special tokens .*, expected eos and bos"):
        tokenizers.from_bpe(*parts._replace(begins=True))


LETTERS = sorted(rust.pre_tokenizers.ByteLevel.alphabet())
MERGES = ["1 2", "3 4", "12 34", "' L", "'L L", ". Ċ", "( a", "Ã ©"]
PIECES = [*LETTERS, *(merge.replace(" ", "") for merge in MERGES), "xyz", "<begin>", "<end>", "<call>"]
CUT = {
    "gpt-2": ["1234", "'", "L", "L", ".", "Ċ", "(", "a", "x", "y", "z", "e", "Ì", "ģ"],
    "smollm": ["1", "2", "3", "4", "'", "L", "L", ".", "Ċ", "(", "a", "x", "y", "z", "e", "Ì", "ģ"],
    "llama-bpe": ["12", "3", "4", "'LL", ".Ċ", "(a", "xyz", "e", "Ì", "ģ"],
    "qwen2": ["1", "2", "3", "4", "'LL", ".Ċ", "(a", "x", "y", "z", "Ã©"],
}


@pytest.mark.parametrize("split", CUT)
def test_texts_are_cut_into_words_as_published(tmp_path, split):
    """Digits, contractions, line ends after signs, a sign before a word, whole pieces, composed letters."""
    package = pytest.importorskip("gguf")
    kinds = package.TokenType
    writer = package.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(PIECES)
    writer.add_token_types([kinds.NORMAL] * (len(PIECES) - 3) + [kinds.CONTROL, kinds.CONTROL, kinds.USER_DEFINED])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(PIECES.index("<begin>"))
    writer.add_eos_token_id(PIECES.index("<end>"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    tokenizer = tokenizers.from_bpe(*gguf.tokenizer_parts(tmp_path / "model.gguf"))
    found = tokenizer.encode(["1234'LL.\n(a<call>xyz<end>e\u0301"], max_length=32).tokens
    pieces = [PIECES[i] for i in found]
    assert (pieces[0] == "<begin>") == (split == "llama-bpe")
    assert [piece for piece in pieces if piece[0] != "<"] == CUT[split]
    assert [piece for piece in pieces if piece in ("<call>", "<end>")] == ["<call>", "<end>"]
    assert "<call>" in tokenizer.decode(found) and "<end>" not in tokenizer.decode(found)


@pytest.mark.parity
def test_words_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Qwen2Tokenizer(vocab={piece: i for i, piece in enumerate(LETTERS)}, merges=[])
    ours = rust.pre_tokenizers.Sequence(tokenizers.SPLITS["qwen2"]())
    for text in [*TEXTS, "It'S 1999,\r\n isn't it?  12345  x=3.14\n\n\tnaïve café 日本語 🙂 _a 1٣²"]:
        assert ours.pre_tokenize_str(text) == theirs.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)


@pytest.fixture(scope="module")
def file():
    pytest.importorskip("gguf")
    try:
        return gguf.path()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def tokenizer(file):
    return tokenizers.from_bpe(*gguf.tokenizer_parts(file))


@pytest.fixture(scope="module")
def smollm2(file):
    found = hf.load("smollm2", labels=0, head="lm", key=KEY)
    return found, jax.jit(found.model.apply), jax.jit(found.model.decode)


@pytest.mark.further
def test_smollm2_tokenizer(tokenizer):
    assert (tokenizer.pad, tokenizer.eos, tokenizer.bos, tokenizer.size) == (2, 2, 1, 49152)
    assert tokenizer.special == tuple(range(17))
    text = "Hello, Wörld 2024!\n  def f(x):\n\treturn x * 10 日本"
    encoded = tokenizer.encode([text], max_length=64)
    assert tokenizer.decode(encoded.tokens) == text
    assert "2024" not in [tokenizer.decode([i]).strip() for i in encoded.tokens], "digits stand alone"
    prompt = tokenizer.chat(QUESTION, generate=True)
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert prompt.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    tokens = tokenizer.encode([prompt], max_length=64, special=False).tokens
    assert tokens[0] == 1 and (tokens == 1).sum() == 3 and (tokens == 2).sum() == 2


@pytest.mark.further
def test_smollm2_answers(smollm2, tokenizer):
    found, _, decode = smollm2
    prompt = tokenizer.chat(QUESTION, generate=True)
    tokens = tokenizer.encode([prompt], max_length=64, special=False).tokens[None]
    cache = found.model.init_cache(1, 48)
    answer = []
    while len(answer) < 10 and tokenizer.eos not in answer:
        logits, cache = decode(found.base, {}, cache, {"tokens": tokens, "mask": np.ones_like(tokens, bool)})
        answer.append(int(jnp.argmax(logits[0, -1])))
        tokens = np.asarray([answer[-1:]], np.int32)
    assert tokenizer.decode(answer) == "The capital of France is Paris."
    assert answer[-1] == tokenizer.eos


def batch(tokenizer):
    encoded = tokenizer.encode(TEXTS, max_length=16)
    lengths = np.diff(encoded.offsets)
    mask = np.arange(16)[None] < lengths[:, None]
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = encoded.tokens
    return {"tokens": jnp.asarray(tokens), "mask": jnp.asarray(mask)}


@pytest.mark.further
def test_smollm2_losses(smollm2, tokenizer):
    found, apply, _ = smollm2
    inputs = batch(tokenizer)
    likely = jax.nn.log_softmax(apply(found.base, {}, inputs))
    taken = jnp.take_along_axis(likely[:, :-1], inputs["tokens"][:, 1:, None], -1)[..., 0]
    real = inputs["mask"][:, 1:]
    losses = -jnp.sum(jnp.where(real, taken, 0), 1) / jnp.sum(real, 1)
    np.testing.assert_allclose(losses, LOSSES, rtol=1e-4)


@pytest.mark.parity
def test_smollm2_equals_transformers(smollm2, tokenizer, file):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    keywords = {"gguf_file": file.name}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **keywords).eval()
    found, apply, _ = smollm2
    inputs = batch(tokenizer)
    with torch.no_grad():
        tokens, mask = (torch.tensor(np.asarray(inputs[name], int)) for name in ("tokens", "mask"))
        expected = theirs(input_ids=tokens, attention_mask=mask).logits.numpy()
    real = np.asarray(inputs["mask"])
    np.testing.assert_allclose(np.asarray(apply(found.base, {}, inputs))[real], expected[real], atol=2e-3)
    del theirs
    judge = transformers.AutoTokenizer.from_pretrained(file.parent, **keywords)
    # transformers does not cut digits off first, which shows only where two spaces are before them.
    texts = [*TEXTS, "It's 1999, isn't it? 12345  x=3.14\n\n\tnaïve café 日本語 🙂 <|im_end|>"]
    ours = tokenizer.encode(texts, max_length=100)
    for text, start, stop in zip(texts, ours.offsets, ours.offsets[1:], strict=False):
        assert ours.tokens[start:stop].tolist() == judge(text)["input_ids"]
    assert tokenizer.chat(QUESTION, generate=True) == judge.apply_chat_template(
        QUESTION, tokenize=False, add_generation_prompt=True
    )
