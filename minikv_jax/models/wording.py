"""How messages quote what files and other libraries say: on one line, and no longer than a reader wants."""

from collections.abc import Iterable
from itertools import islice
from typing import Any

from minikv_jax.errors import shortened


def listed(values: Iterable[Any], most: int = 4) -> str:
    """The first few values."""
    first = list(islice(values, most + 1))
    text = ", ".join(map(shortened, first[:most]))
    return text if len(first) <= most else f"{text} and more"


def one_line(error: BaseException, most: int = 200) -> str:
    """What another library said; it may quote a file."""
    text = "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= most else f"{text[: most - 3]}..."
