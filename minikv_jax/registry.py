"""The table of methods by name, and methods by what a user writes: `minikv:heavy=0.1,recent=0.1`.

`presets.py` fills the table, and is where to ask for a method: there is none here before it is imported.
"""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Iterable
from typing import cast

from minikv_jax.checks import check_types
from minikv_jax.config import CacheConfig
from minikv_jax.errors import ConfigError, shortened
from minikv_jax.settings import knobs_of, split

METHODS: dict[str, Callable[..., CacheConfig]] = {}
_MOST = 2**30 - 1  # sizes are 32-bit numbers, and so is twice a size


def row[**P](preset: Callable[P, CacheConfig]) -> Callable[P, CacheConfig]:
    """A row of `METHODS`, whose knobs are checked against its annotations.

    Lists are taken for tuples, and whole numbers for the floats that a knob takes: 1 is the share 1.0.
    """
    signature, hints = inspect.signature(preset), typing.get_type_hints(preset)
    knobs = dataclasses.make_dataclass(preset.__name__, [(name, hints[name]) for name in signature.parameters])

    @functools.wraps(preset)
    def checked(*args: P.args, **kwargs: P.kwargs) -> CacheConfig:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        values = {name: tuple(x) if isinstance(x, list | range) else x for name, x in given.arguments.items()}
        check_types(knobs(**values))
        for name, value in values.items():
            if isinstance(value, int) and abs(value) > _MOST:
                raise ConfigError(f"{name}={shortened(value)}: no number here is above {_MOST}.")
        values = {name: _as_float(value, hints[name]) for name, value in values.items()}
        return cast(Callable[..., CacheConfig], preset)(**values)

    METHODS[preset.__name__] = checked
    return checked


def _as_float(value, hint):
    """The value, its whole numbers as floats where the annotation has floats and no whole numbers."""
    kinds = typing.get_args(hint) or (hint,)
    if isinstance(value, tuple):
        return tuple(_as_float(x, kinds[0]) for x in value)
    whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if whole and float in kinds and int not in kinds else value


def by_name(name: str, **knobs) -> CacheConfig:
    """The preset called `name`, with some knobs changed.

    Raises:
        ConfigError: an unknown name, an unknown knob, or a value of the wrong type or out of range.
    """
    if name not in METHODS:
        raise ConfigError(f"Unknown method {shortened(name)}: choose one of {', '.join(METHODS)}.")
    known = inspect.signature(METHODS[name]).parameters
    unknown = sorted(set(knobs) - set(known))
    if unknown:
        raise ConfigError(f"{name} has no knob {shortened(', '.join(unknown))}: it has {', '.join(known) or 'none'}.")
    return METHODS[name](**knobs)


def with_settings(name: str, settings: Iterable[str]) -> CacheConfig:
    """The preset called `name` with `knob=value` settings, values written as in JSON or as `minikv methods` shows them.

    Raises:
        ConfigError: as `by_name`; a setting without a value, or a knob that is set twice.
    """
    return by_name(name, **knobs_of(name, settings))


def parse(methods: str) -> dict[str, CacheConfig]:
    """Methods in one line, settings after a colon, by what was written: `full,minikv:heavy=0.1,recent=0.1,kivi`.

    Raises:
        ConfigError: as `with_settings`; nothing, or a setting without a method.
    """
    named = [
        (name + (":" + ",".join(settings) if settings else ""), name, settings) for name, settings in split(methods)
    ]
    return {label: with_settings(name, settings) for label, name, settings in named}


def parse_one(method: str, settings: Iterable[str] = ()) -> dict[str, CacheConfig]:
    """One method as `parse` reads it, with more settings.

    Raises:
        ConfigError: as `parse`; several methods.
    """
    (name, own), *others = split(method)
    if others:
        raise ConfigError(f"{shortened(method)} names several methods: give one.")
    return {method: with_settings(name, [*own, *settings])}
