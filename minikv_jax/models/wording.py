"""How messages quote what files and other libraries say: on one line, and no longer than a reader wants."""

from collections.abc import Iterable
from itertools import islice
from typing import Any


def shown(value: Any, most: int = 80) -> str:
    """A value from a file, cut where it is long."""
    return _cut(repr(value), most)


def listed(values: Iterable[Any], most: int = 4) -> str:
    """The first few values."""
    first = list(islice(values, most + 1))
    text = ", ".join(shown(value) for value in first[:most])
    return text if len(first) <= most else f"{text} and more"


def one_line(error: BaseException) -> str:
    """What another library said; it may quote a file."""
    text = "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split()))
    return _cut(text or type(error).__name__, 200)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
