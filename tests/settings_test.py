"""Settings against the functions that take them: names, types, and what is left to the functions themselves."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from fedjax_peft import settings
from fedjax_peft.config import call, called


def train(model, *, steps: int, rate: float = 0.1, name: str = "sgd", limit: int | None = None, fast: bool = False):
    return model, steps, rate, name, limit, fast


def loose(model, share=0.5, names: Sequence[str] = (), rule: Callable | None = None, **further):
    return train(model, **further)


def test_settings_that_fit_are_passed_on():
    assert called("key", train, "m", steps=np.int64(3), rate=1, limit=None) == ("m", 3, 1, "sgd", None, False)
    assert called("key", loose, "m", steps=3, share=1, names="abc", rule="x") == ("m", 3, 0.1, "sgd", None, False)


@pytest.mark.parametrize(
    ("function", "given", "message"),
    [
        (train, {"stepz": 3}, "key.stepz is not a setting of train; is steps meant?"),
        (train, {"model": 3, "steps": 3}, "key.model is not a setting of train"),
        (train, {"rate": 0.1}, "key train needs 'steps'"),
        (train, {"rate": 0.1, "name": "adam"}, "key adam needs 'steps'"),
        (train, {"steps": 3.0}, "key.steps is 3.0, expected a whole number"),
        (train, {"steps": True}, "key.steps is True, expected a whole number"),
        (train, {"steps": None}, "key.steps is None, expected a whole number"),
        (train, {"steps": 3, "rate": "0,1"}, "key.rate is '0,1', expected a number"),
        (train, {"steps": 3, "limit": "all"}, "key.limit is 'all', expected a whole number or None"),
        (train, {"steps": 3, "fast": "false"}, "key.fast is 'false', expected True or False"),
        (train, {"steps": 3, "name": 3}, "key.name is 3, expected a text"),
        (loose, {"steps": 3, "share": "half"}, "key.share is 'half', expected a number"),
        (loose, {"steps": 3, "stepz": 3}, "key.stepz is not a setting of loose"),
    ],
)
def test_what_cannot_be_taken_is_one_sentence(function, given, message):
    with pytest.raises(ValueError) as raised:
        called("key", function, "m", **given)
    assert str(raised.value) == message


@pytest.mark.parametrize("function", [train, loose])
def test_a_setting_of_another_section_is_named_after_it(function):
    with pytest.raises(ValueError, match=f"^server.name is 'adam', which {function.__name__} has no use for$"):
        call("key", function, ("m",), {"steps": 3, "server": 3}, {"server": "server.name is 'adam'"})


def test_mistakes_of_the_function_itself_stay_what_they_are():
    def broken(*, rate: float):
        return rate + "1"

    with pytest.raises(TypeError, match="unsupported operand"):
        called("key", broken, rate=1.0)


def test_types_are_those_of_a_class_of_fields_too():
    from fedjax_peft.algorithms import fedl2p

    settings.check_types("algorithm", fedl2p.AdamW, {"clip": None, "b1": 0.5, "other": "x"})
    with pytest.raises(ValueError, match="algorithm.clip is 'no', expected a number or None"):
        settings.check_types("algorithm", fedl2p.AdamW, {"clip": "no"})
