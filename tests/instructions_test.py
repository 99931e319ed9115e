"""Templates and tokens of prompts and answers against golden strings, and what judges generated answers."""

import numpy as np
import pytest
import tokenizers as rust

from fedjax_peft.data import instructions, tokenizers
from fedjax_peft.models import gguf

CHAT = "{% for m in messages %}<s>{{ m.content }}{% endfor %}{% if add_generation_prompt %}|{% endif %}"


def letters(tmp_path, chat=False, begins=True):
    """A tokenizer of single characters: <s> 0, </s> 1, then the printable ones."""
    names = ["<s>", "</s>", *map(chr, range(32, 127)), "\n"]
    tokenizer = rust.Tokenizer(rust.models.BPE({letter: i for i, letter in enumerate(names)}, []))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if begins:
        tokenizer.post_processor = rust.processors.TemplateProcessing(
            "<s> $A </s>", "<s> $A $B", [("<s>", 0), ("</s>", 1)]
        )
    tokenizer.decoder = rust.decoders.Fuse()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    if chat:
        (tmp_path / "chat_template.jinja").write_text(CHAT)
    return tokenizers.load(str(tmp_path))


@pytest.fixture(scope="module")
def smollm():
    pytest.importorskip("gguf")
    try:
        return tokenizers.from_bpe(**gguf.tokenizer_parts(gguf.path())._asdict())
    except ValueError as error:
        pytest.skip(str(error))


def examples(encoded):
    """(prompt, answer) token ids of each example."""
    parts = np.split(encoded.tokens, encoded.offsets[1:-1])
    return [(part[:n].tolist(), part[n:].tolist()) for part, n in zip(parts, encoded.prompts, strict=True)]


def ids(text):
    return [97 if letter == "\n" else ord(letter) - 30 for letter in text]


def test_templates_are_those_that_were_published():
    about = "Below is an instruction that describes a task"
    assert instructions.alpaca("Add.", "1 2") == (
        f"{about}, paired with an input that provides further context. Write a response that appropriately completes "
        "the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    )
    write = "Write a response that appropriately completes the request."
    assert instructions.alpaca("Add.", "") == f"{about}. {write}\n\n### Instruction:\nAdd.\n\n### Response:\n"
    form = instructions.TEMPLATES["alpaca_turn"]
    whole = form.prompt("Add.", "") + form.before + "3"
    assert whole == f"{about}. {write}\n\n### Instruction:\nAdd. \n\n### Response: 3"
    assert instructions.infer("A man eats.", "He sleeps.") == (
        'Suppose A man eats. Can we infer that "He sleeps."? Yes, No, or Maybe?\n'
    )
    assert instructions.INFERENCES == ("Yes", "Maybe", "No")


def test_an_example_is_prompt_answer_and_end_token(tmp_path):
    tokenizer = letters(tmp_path)
    prompts = instructions.encode_prompts(tokenizer, ["ab?", "c"], max_length=20)
    encoded = instructions.encode(tokenizer, prompts, [1, 0, 0], ["yes", "no", ""], max_length=20)
    assert examples(encoded) == [
        ([0, *ids("c")], [*ids("yes"), 1]),
        ([0, *ids("ab?")], [*ids("no"), 1]),
        ([0, *ids("ab?")], [1]),
    ]
    assert encoded.tokens.dtype == np.int32 and encoded.types is None


def test_a_long_answer_is_cut_before_its_end_token_and_a_long_prompt_is_no_example(tmp_path):
    tokenizer = letters(tmp_path)
    prompts = instructions.encode_prompts(tokenizer, ["abc", "abcdefgh"], max_length=7)
    assert np.diff(prompts.offsets).tolist() == [4, 7]
    encoded = instructions.encode(tokenizer, prompts, [0], ["12345"], max_length=7)
    assert examples(encoded) == [([0, *ids("abc")], [*ids("12"), 1])]
    with pytest.raises(ValueError, match="prompt 1 takes all of max_length=7 tokens"):
        instructions.encode(tokenizer, prompts, [0, 1], ["1", "2"], max_length=7)
    with pytest.raises(ValueError, match="names no end token"):
        instructions.encode(tokenizer._replace(eos=None), prompts, [0], ["1"], max_length=7)


def test_a_chat_template_writes_its_own_beginning(tmp_path):
    tokenizer = letters(tmp_path, chat=True)
    form = instructions.template("chat", tokenizer)
    prompts = instructions.encode_prompts(tokenizer, [form.prompt("a", "b")], max_length=20, begin=False)
    assert prompts.tokens.tolist() == [0, *ids("a\n\nb|")]
    with pytest.raises(ValueError, match="'chat', but this tokenizer has no chat template, expected one of plain"):
        instructions.template("chat", tokenizer._replace(chat=None))
    with pytest.raises(ValueError, match="data.template is 'alpacca', expected one of plain, alpaca"):
        instructions.template("alpacca", tokenizer)


@pytest.mark.further
def test_smollm2_reads_templates_as_text(smollm):
    prompt = instructions.infer("A man eats.", "He sleeps.")
    prompts = instructions.encode_prompts(smollm, [prompt], max_length=64)
    encoded = instructions.encode(smollm, prompts, [0] * 3, instructions.INFERENCES, max_length=64)
    # One piece for each answer, as the file numbers them, and the end token.
    assert smollm.eos == 2 and [answer for _, answer in examples(encoded)] == [[10539, 2], [26314, 2], [5230, 2]]
    for tokens, answer in examples(encoded):
        assert smollm.decode(tokens) == prompt and smollm.decode(answer) in instructions.INFERENCES
    form = instructions.template("chat", smollm)
    text = form.prompt("Hi", "")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    tokens = instructions.encode_prompts(smollm, [text], max_length=64, begin=False).tokens
    assert tokens[0] == 1 and (tokens == 2).sum() == 2  # <|im_start|> and two ends of messages, not their letters


def test_separate_tokens_of_one_turn_are_those_of_the_whole_text(smollm):
    form = instructions.TEMPLATES["alpaca_turn"]
    prompts = instructions.encode_prompts(smollm, [form.prompt("Name a fruit.", "")], max_length=64)
    encoded = instructions.encode(smollm, prompts, [0], [form.before + "An apple."], max_length=64)
    whole = smollm.encode([form.prompt("Name a fruit.", "") + " An apple."], max_length=64).tokens
    np.testing.assert_array_equal(encoded.tokens[:-1], whole)


def test_choices_are_branches_behind_one_prompt(tmp_path):
    tokenizer = letters(tmp_path)
    prompts = instructions.encode_prompts(tokenizer, ["ab", "c"], max_length=20)
    found = instructions.encode_choices(tokenizer, prompts, [1, 0], ["yes", "no"], max_length=20)
    end = [tokenizer.eos]
    for row, (prompt, (tokens, answers)) in enumerate(zip(["c", "ab"], examples(found), strict=True)):
        asked = instructions.encode_prompts(tokenizer, [prompt], max_length=20).tokens.tolist()
        assert tokens == asked and answers == ids("yes") + end + ids("no") + end
        own = found.branches[found.offsets[row] : found.offsets[row + 1]].tolist()
        assert own == [0] * len(asked) + [1] * 4 + [2] * 3
    assert not found.cut.any()
    # Each choice has the room that it would have alone.
    length = int(prompts.offsets[1]) + 3
    cut = instructions.encode_choices(tokenizer, prompts, [0], ["yes", "no"], max_length=length)
    assert examples(cut)[0][1] == ids("ye") + end + ids("no") + end and cut.cut.tolist() == [True]
    assert len(instructions.encode_choices(tokenizer, prompts, [], ["yes", "no"], max_length=20).tokens) == 0


def test_generated_answers_meet_the_references_of_their_rows(tmp_path):
    tokenizer = letters(tmp_path)

    def same(texts, references):
        return {"hits": sum(text in right for text, right in zip(texts, references, strict=True))}

    judged = instructions.judge(tokenizer.decode, [("x",), ("yes ", "no"), ("no",)], same)
    tokens = np.array([ids("no") + ids("!"), ids(" no")])
    assert judged(np.array([1, 2]), {"tokens": tokens, "lengths": np.array([2, 3])}) == {"hits": 2}
    assert judged(np.array([0, 1]), {"tokens": tokens, "lengths": np.array([3, 3])}) == {"hits": 1}
