"""Typed look-ups in what a file says of a model."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from minikv_jax.errors import CheckpointError, UnsupportedModelError, shortened
from minikv_jax.models.gguf_header import Unread

_LONGEST_TEXT = 1 << 20  # bytes; chat templates, the longest texts that are read, have under 1 << 16


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def is_number(value: Any) -> bool:
    return is_integer(value) or (isinstance(value, float) and math.isfinite(value))


class Entries:
    """Typed look-ups that name the entry and its source when something is wrong. JSON null counts as absent."""

    def __init__(self, values: Mapping[str, Any], source: str):
        self.values = values
        self.source = source

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def _checked(self, key: str, fits: Callable[[Any], bool], expected: str) -> Any:
        value = self.get(key)
        if value is not None and not fits(value):
            raise self.wrong(key, expected)
        return value

    def _needed[T](self, key: str, value: T | None, default: T | None) -> T:
        if value is not None:
            return value
        if default is None:
            raise CheckpointError(f"{self.source} has no {key!r}; a model cannot be built without it.")
        return default

    def wrong(self, key: str, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: {key} must be {expected}, got {shortened(self.get(key))}.")

    def optional_integer(self, key: str) -> int | None:
        return self._checked(key, is_integer, "an integer")

    def integer(self, key: str, default: int | None = None) -> int:
        return self._needed(key, self.optional_integer(key), default)

    def optional_number(self, key: str) -> float | None:
        value = self._checked(key, is_number, "a finite number")
        return None if value is None else float(value)

    def number(self, key: str, default: float | None = None) -> float:
        return self._needed(key, self.optional_number(key), default)

    def boolean(self, key: str, default: bool) -> bool:
        return self._needed(key, self._checked(key, lambda value: isinstance(value, bool), "true or false"), default)

    def optional_object(self, key: str) -> dict[str, Any] | None:
        return self._checked(key, lambda value: isinstance(value, dict), "an object or null")

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One id, a list of ids or none. Negative ids stand for none, as in files that write -1 for "no such token"."""
        value = self.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(map(is_integer, ids)):
            raise self.wrong(key, "a token id or a list of token ids")
        return tuple(i for i in ids if i >= 0)

    def optional_text(self, key: str) -> str | None:
        value = self._checked(key, lambda value: isinstance(value, str) or _is_unread(value, "text"), "text")
        if not isinstance(value, Unread):
            return value
        if len(value) > _LONGEST_TEXT:
            raise self.wrong(key, f"text of at most {_LONGEST_TEXT} bytes")
        return value.text()

    def optional_count(self, key: str) -> int | None:
        """How many entries a list of texts has."""
        value = self._checked(key, _is_list_of_text, "a list of text")
        return None if value is None else len(value)

    def texts(self, key: str) -> list[str]:
        value = self._checked(key, lambda value: _is_unread(value, "texts") and len(value) > 0, "a list of text")
        return self._needed(key, value, None).texts()

    def optional_numbers(self, key: str, kinds: str, length: int) -> np.ndarray | None:
        """A list of `length` numbers whose kind, as numpy's dtypes name it, is one of `kinds`."""

        def fits(value: Any) -> bool:
            return _is_unread(value, "numbers") and value.dtype.kind in kinds and len(value) == length

        value = self._checked(key, fits, f"a list of {length} {'numbers' if 'f' in kinds else 'integers'}")
        return None if value is None else value.numbers()

    def numbers(self, key: str, kinds: str, length: int) -> np.ndarray:
        return self._needed(key, self.optional_numbers(key, kinds, length), None)


def _is_list_of_text(value: Any) -> bool:
    return isinstance(value, list) or _is_unread(value, "texts")


def _is_unread(value: Any, what: str) -> bool:
    return isinstance(value, Unread) and value.what == what


def agreed[T](source: str, key: str, given: Mapping[str, T | None]) -> T | None:
    """The value that some places give, if all of them give the same."""
    values = {place: value for place, value in given.items() if value is not None}
    if len(set(values.values())) > 1:
        said = " and ".join(f"{shortened(value)} in {place}" for place, value in values.items())
        raise CheckpointError(f"{source} gives {key} as {said}; keep the right one.")
    return next(iter(values.values()), None)


def default_head_dim(hidden_size: int, num_heads: int) -> int:
    """What a head's size is where a file does not say."""
    if hidden_size < 1 or num_heads < 1 or hidden_size % num_heads:
        raise UnsupportedModelError(
            f"hidden size {hidden_size} does not divide into {num_heads} heads, and no head size is given."
        )
    return hidden_size // num_heads
