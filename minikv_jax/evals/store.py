"""Finished items on disk: one JSON line each, so that a run cut off at any moment goes on where it stood."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from minikv_jax.errors import ConfigError

ITEMS, RUN = "items.jsonl", "run.json"


def begin(out: Path, identity: Mapping[str, Any]) -> list[dict]:
    """Opens or continues a run in the folder `out`, and returns the items it has.

    Args:
        out: made if it does not exist.
        identity: what must be the same for items to belong together, such as model and seed.

    Raises:
        ConfigError: a folder that cannot be written, that holds another run, or whose items are damaged.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written ({error.strerror}): name another folder.") from None
    run = out / RUN
    if run.exists():
        try:
            given = json.loads(run.read_text(encoding="utf-8"))
        except ValueError:
            raise ConfigError(f"{run} is damaged: remove {out} or name another folder.") from None
        other = {key: given.get(key) for key in identity if given.get(key) != identity[key]}
        if other:
            theirs, ours = (", ".join(f"{k}={x[k]!r}" for k in other) for x in (given, identity))
            raise ConfigError(f"--out {out} holds a run with {theirs}, not {ours}: name another folder.")
    else:
        _replace(run, json.dumps(dict(identity), indent=1) + "\n")
    return _load(out / ITEMS)


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
        _replace(path, content[:whole].decode("utf-8", errors="replace"))
    items = []
    for i, line in enumerate(content[:whole].splitlines(), 1):
        try:
            items.append(json.loads(line))
        except ValueError:
            raise ConfigError(f"{path}, line {i} is damaged: remove that line; its item is measured again.") from None
    return items


def _replace(path: Path, text: str) -> None:
    """Writes a file in one step: whoever looks sees the old content or the new."""
    scratch = path.with_name(f".{path.name}.new")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)
