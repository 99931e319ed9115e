"""Chat templates of tokenizers in folders, rendered as transformers renders them."""

import json

import pytest
import tokenizers as rust

from fedjax_peft.data import instructions, tokenizers

MESSAGES = [
    {"role": "user", "content": "<b>is</b> it?"},
    {"role": "assistant", "content": " yes "},
    {"role": "user", "content": "why"},
]
TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {{- raise_exception('no system here') }}
    {%- endif %}
    {%- if loop.index0 > 4 %}{% break %}{% endif %}
    {{- '[' + message['role'] + ']' + message['content'] | trim + eos_token }}
{% endfor %}
{%- if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"""


def folder(tmp_path, **files):
    """A tokenizer of single characters that begins texts with <s>, and what its owner says of it."""
    letters = ["<s>", "</s>", "<pad>", *map(chr, range(32, 127))]
    tokenizer = rust.Tokenizer(rust.models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.post_processor = rust.processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 0)])
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    named = {
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>"},
        "pad_token": "<pad>",
        "unk_token": None,
    }
    named |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    if "config" in files:
        named["chat_template"] = files["config"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    if "jinja" in files:
        (tmp_path / "chat_template.jinja").write_text(files["jinja"])
    return str(tmp_path)


@pytest.mark.parametrize(
    "files",
    [
        {"config": TEMPLATE},
        {"jinja": TEMPLATE, "config": "old"},
        {"config": [{"name": "tools", "template": "x"}, {"name": "default", "template": TEMPLATE}]},
    ],
)
def test_templates_are_found_and_rendered_as_transformers_does(tmp_path, files):
    import transformers

    place = folder(tmp_path, **files)
    tokenizer, judge = tokenizers.load(place), transformers.AutoTokenizer.from_pretrained(place)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (0, 1, 2)
    for generate in (False, True):
        text = tokenizer.chat(MESSAGES, generate=generate)
        assert text.startswith("<s>[user]<b>is</b> it?</s>") and text.endswith("[assistant]") == generate
        keywords = {"add_generation_prompt": generate, "tokenize": False}
        assert text == judge.apply_chat_template(MESSAGES, **keywords)
        ids = tokenizer.encode([text], max_length=200, special=False).tokens.tolist()
        assert ids == judge.apply_chat_template(MESSAGES, add_generation_prompt=generate)["input_ids"]
        assert ids.count(0) == 1 and tokenizer.encode([text], max_length=200).tokens.tolist() == [0, *ids]


def test_messages_that_a_template_refuses_get_a_sentence(tmp_path):
    chat = tokenizers.load(folder(tmp_path, config=TEMPLATE)).chat
    with pytest.raises(ValueError, match="the chat template refuses the messages: no system here"):
        chat([{"role": "system", "content": "be brief"}])


def test_no_template_is_no_chat(tmp_path):
    assert tokenizers.load(folder(tmp_path)).chat is None


@pytest.mark.parametrize("name", ["plain", "alpaca", "alpaca_turn", "chat"])
def test_clients_are_asked_with_the_tokens_of_training(tmp_path, name):
    tokenizer = tokenizers.load(folder(tmp_path, config=TEMPLATE))
    trained = instructions.encode_prompts(
        tokenizer, [instructions.template(name, tokenizer).prompt("why", "")], max_length=500, begin=name != "chat"
    )
    asking = instructions.asking(tokenizer, name)
    assert asking.chat is None
    tokens = asking.encode(["why"], max_length=2**30, special=True).tokens.tolist()
    assert tokens == trained.tokens.tolist() and tokens[0] == tokenizer.bos and tokens.count(tokenizer.bos) == 1
    assert (len(tokens) > 100) == name.startswith("alpaca")
