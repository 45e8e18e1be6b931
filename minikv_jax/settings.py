"""Methods and their settings as people write them: `full,minikv:heavy=0.1,recent=0.1,kivi`."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from minikv_jax.errors import ConfigError, shortened


def split(methods: str) -> list[tuple[str, list[str]]]:
    """Names and settings of methods in one line."""
    found: list[tuple[str, list[str]]] = []
    for part in re.split(r",(?![^\[]*\])", methods):
        name, colon, setting = part.strip().partition(":")
        if colon or "=" not in name:
            found.append((name, [setting] if colon else []))
        elif found:
            found[-1][1].append(name)
        else:
            raise ConfigError(
                f"{shortened(methods)} begins with a setting: write method:knob=value, for example minikv:bits=4."
            )
    return found


def knobs_of(name: str, settings: Iterable[str]) -> dict[str, Any]:
    """The knobs of a method by name, from `knob=value` settings.

    Raises:
        ConfigError: a setting without a value, or a knob that is set twice.
    """
    knobs: dict[str, Any] = {}
    for setting in settings:
        knob, _, value = setting.partition("=")
        if not knob or not value:
            raise ConfigError(
                f"{name}: {shortened(setting)} is no setting: write it as knob=value, for example bits=4."
            )
        if knob in knobs:
            raise ConfigError(f"{name}: {shortened(knob)} is set twice: give it once.")
        knobs[knob] = _value(value)
    return knobs


_PYTHON: Mapping[str, Any] = {"True": True, "False": False, "None": None, "()": ()}


def _value(text: str) -> Any:
    """What a setting's text stands for; a text that is neither JSON nor a word of Python's stands for itself."""
    if text in _PYTHON:
        return _PYTHON[text]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
