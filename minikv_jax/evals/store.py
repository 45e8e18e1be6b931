"""Finished items on disk: one JSON line each, so that a run cut off at any moment goes on where it stood."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from minikv_jax import outputs
from minikv_jax.errors import ConfigError

ITEMS, RUN = "items.jsonl", "run.json"
_TEXTS = ("task", "case", "group", "method")
_NUMBERS = ("bytes", "bits_per_element", "bits_of_tiers", "bits_of_codes")


def held(out: Path, identity: Mapping[str, Any]) -> list[dict]:
    """The items of the run in the folder `out`, which need not exist yet.

    Args:
        out: the folder.
        identity: what must be the same for items to belong together, such as model and seed.

    Raises:
        ConfigError: a folder that cannot be written, that holds another run, or whose items are damaged.
    """
    outputs.require_folder(out, "--out")
    run = out / RUN
    if run.exists():
        given = _parsed(run.read_bytes())
        if not isinstance(given, dict):
            raise ConfigError(f"{run} is damaged: remove {out} or name another folder.")
        other = {key: given.get(key) for key in identity if given.get(key) != identity[key]}
        if other:
            theirs, ours = (", ".join(f"{k}={x[k]!r}" for k in other) for x in (given, identity))
            raise ConfigError(f"--out {out} holds a run with {theirs}, not {ours}: name another folder.")
    return _load(out / ITEMS)


def begin(out: Path, identity: Mapping[str, Any]) -> None:
    """Makes the folder `out`, if need be, and says in it what its items share."""
    if not (out / RUN).exists():
        outputs.write_text(out / RUN, json.dumps(dict(identity), indent=1) + "\n")


def add(out: Path, items: Iterable[Mapping[str, Any]]) -> None:
    """Adds finished items; they are on the disk when this returns."""
    with (out / ITEMS).open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(item) + "\n" for item in items))
        file.flush()
        os.fsync(file.fileno())


def _load(path: Path) -> list[dict]:
    """The items written so far. A last line that was cut off is removed, and its item will be measured again."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
    items = [_parsed(line) for line in content[:whole].splitlines()]
    for i, item in enumerate(items, 1):
        if not _is_item(item):
            raise ConfigError(f"{path}, line {i} is damaged: remove that line; its item is measured again.")
    return items


def _parsed(text: bytes) -> Any:
    """What stands there as JSON, or None."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_item(x: Any) -> bool:
    """Whether it has all that figures are made of."""
    if not isinstance(x, dict) or not isinstance(x.get("values"), dict):
        return False
    figures = [figure for value in x["values"].values() for figure in (value if isinstance(value, list) else [value])]
    numbers = [*figures, *(x.get(name) for name in _NUMBERS)]
    place = x.get("place", {})
    return (
        all(isinstance(x.get(name), str) for name in _TEXTS)
        and all(isinstance(n, int | float) and math.isfinite(n) for n in numbers)
        and all(value != [] for value in x["values"].values())
        and isinstance(place, dict)
    )
