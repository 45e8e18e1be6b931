"""Whether the fields of a frozen value are what their annotations say, in words for people."""

import types
import typing
from typing import Any, Literal

from minikv_jax.errors import ConfigError, shortened


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def check_types(part: Any) -> None:
    """Refuses fields of a dataclass that are not what their annotations say: 1.5 tokens, True bits, an unknown choice.

    Raises:
        ConfigError: naming the field, its value and what it takes.
    """
    hints = typing.get_type_hints(type(part))
    for name, value in vars(part).items():
        wanted = hints[name]
        require(_is_a(value, wanted), f"{name}={shortened(value)}: give {_described(wanted)}.")


def _is_a(value: Any, wanted: Any) -> bool:
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if isinstance(wanted, typing.TypeAliasType):
        return _is_a(value, wanted.__value__)
    if origin in (types.UnionType, typing.Union):
        return any(_is_a(value, one) for one in arguments)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in arguments)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        wanted = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        return len(value) == len(wanted) and all(map(_is_a, value, wanted))
    if wanted is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, wanted) and not (wanted is int and isinstance(value, bool))


_PLAIN_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a string",
    types.NoneType: "None",
}


def _described(wanted: Any) -> str:
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if isinstance(wanted, typing.TypeAliasType):
        return _described(wanted.__value__)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(_described, arguments))
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin is tuple:
        if arguments[1:] == (...,):
            return f"a tuple, each {_described(arguments[0])}"
        return f"({', '.join(map(_described, arguments))})"
    return _PLAIN_WORDS.get(wanted, f"a {wanted.__name__}")
