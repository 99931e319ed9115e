"""The variants of PF2LoRA's configs: what each asks for, and what is refused."""

import configs_test
import pytest


def variant(name, variant):
    return configs_test.load(next(path for path in configs_test.CONFIGS if path.stem == name)).get_config(variant)


@pytest.mark.parametrize(
    ("name", "wrong", "sentence"),
    [
        ("pf2lora_generation", "webnlg,pf2lora,publised", "size is 'publised', expected 'small' or 'published'"),
        ("pf2lora_squad", "pf2lora,v3", "size is 'v3', expected 'small', 'v1' or 'v2'"),
    ],
)
def test_an_unknown_size_is_refused(name, wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        variant(name, wrong)


@pytest.mark.parametrize(("name", "wrong"), [("pf2lora_generation", "webnl"), ("pf2lora_squad", "lora")])
def test_an_unknown_task_or_method_is_refused(name, wrong):
    with pytest.raises(KeyError, match=wrong):
        variant(name, wrong)


@pytest.mark.parametrize(
    ("name", "wanted"), [("pf2lora_generation", "webnlg"), ("pf2lora_generation", "e2e"), ("pf2lora_squad", "pf2lora")]
)
def test_what_is_read_from_a_folder_says_so(name, wanted):
    """The first command of the page has to work as it stands."""
    assert variant(name, wanted).data.source == "FOLDER"
    module = configs_test.load(next(path for path in configs_test.CONFIGS if path.stem == name))
    command = next(line for line in module.__doc__.splitlines() if "fedjax-peft run" in line)
    assert "--config.data.source=FOLDER" in command
