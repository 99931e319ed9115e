"""Settings that become arguments of functions: a wrong name or type is answered with one sentence, not a traceback."""

import difflib
import inspect
import numbers
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

_KINDS = {
    bool: ("True or False", bool),
    int: ("a whole number", numbers.Integral),
    float: ("a number", numbers.Real),
    str: ("a text", str),
    type(None): ("None", type(None)),
}
_REST = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def check(
    key: str,
    function: Callable,
    settings: Mapping[str, Any],
    *,
    positional: int,
    elsewhere: Mapping[str, str] | None = None,
) -> None:
    """Raises ValueError for settings that a function cannot be called with.

    Args:
      key: path of the section that they are from.
      function: whose keywords they become; one that passes further ones on may be given any.
      positional: arguments that it is given in front of them.
      elsewhere: what asked for those that come from other sections, {name: "server.name is 'adam'"}.
    """
    every = list(inspect.signature(function).parameters.values())[positional:]
    own = {of.name: of for of in every if of.kind not in _REST}
    if all(of.kind is not inspect.Parameter.VAR_KEYWORD for of in every):
        for name in settings:
            if name not in own:
                raise ValueError(unknown(key, name, function, own, elsewhere))
    missing = [repr(name) for name, of in own.items() if of.default is of.empty and name not in settings]
    if missing:
        raise ValueError(f"{key} {settings.get('name', function.__name__)} needs {', '.join(missing)}")
    check_types(key, function, settings)


def check_types(key: str, function: Callable, settings: Mapping[str, Any]) -> None:
    """Raises ValueError for a value that is not of its parameter's type.

    Types that are compared are bool, int, float, str, None and unions of them; where a parameter names no type, it is
    that of its default. A whole number is a number; True and False are not.
    """
    parameters = inspect.signature(function).parameters
    for name, value in settings.items():
        kinds = _kinds(parameters[name]) if name in parameters else ()
        if kinds and not any(_fits(value, kind) for kind in kinds):
            expected = " or ".join(_KINDS[kind][0] for kind in kinds)
            raise ValueError(f"{key}.{name} is {value!r}, expected {expected}")


def unknown(
    key: str,
    name: str,
    function: Callable,
    known: Iterable[str] = (),
    elsewhere: Mapping[str, str] | None = None,
) -> str:
    """Says that a function has no such setting, and which of the `known` ones may be meant."""
    if name in (elsewhere or {}):
        return f"{elsewhere[name]}, which {function.__name__} has no use for"
    return f"{key}.{name} is not a setting of {function.__name__}{similar(name, known)}"


def similar(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about a name that nobody knows: the nearest of the known ones, if one is near."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f"; is {near[0]} meant?" if near else ""


def _kinds(parameter: inspect.Parameter) -> tuple[type, ...]:
    """Types that a value may have; none if they cannot all be compared."""
    said, usual = parameter.annotation, parameter.default
    if said is parameter.empty:
        return (type(usual),) if type(usual) in (bool, int, float, str) else ()
    union = typing.get_origin(said) in (typing.Union, types.UnionType)
    kinds = typing.get_args(said) if union else (said,)
    return kinds if all(kind in _KINDS for kind in kinds) else ()


def _fits(value: Any, kind: type) -> bool:
    # Of Python's numbers True and False are two.
    return isinstance(value, _KINDS[kind][1]) and (kind is bool or not isinstance(value, bool))
