"""Exceptions for mistakes a user can correct: each message says what was given, what was expected and what to do."""

from typing import Any


class MiniKVError(ValueError):
    """Base of every error this library raises for its user's input."""


class CheckpointError(MiniKVError):
    """A model's files are missing, damaged, or do not fit together."""


class UnsupportedModelError(MiniKVError):
    """The files are sound, but describe a model this library cannot run."""


class ConfigError(MiniKVError):
    """An unknown method, or a budget, width or capacity outside its range."""


class MissingExtraError(MiniKVError):
    """A package that is not installed by default: the message names the extra that brings it."""


class PromptError(MiniKVError):
    """A prompt that is empty or does not fit the model or the cache."""


def shortened(x: Any, most: int = 80) -> str:
    """`repr`, cut to a readable length."""
    # Python refuses to write whole numbers of more than 4,300 digits.
    text = f"a number of {x.bit_length()} bits" if isinstance(x, int) and x.bit_length() > 512 else repr(x)
    return text if len(text) <= most else f"{text[: most - 3]}..."
