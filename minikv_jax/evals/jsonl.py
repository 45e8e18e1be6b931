"""JSON lines from a user's folder, checked where they are read."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from minikv_jax.errors import ConfigError


def files(folder: Path | None, option: str, what: str) -> list[Path]:
    """The folder's .jsonl files, its subfolder `data` included.

    Raises:
        ConfigError: no folder was given, or there are none in it.
    """
    if folder is None:
        raise ConfigError(f"This task needs {what}: give its folder with {option}.")
    found = sorted([*folder.glob("*.jsonl"), *folder.glob("data/*.jsonl")])
    if not found:
        raise ConfigError(f"{option} {folder}: there is no .jsonl file in it; expected {what}.")
    return found


def records(path: Path, fields: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Lines of the file as dictionaries that have these fields.

    Raises:
        ConfigError: a line that is no JSON object or lacks a field.
    """
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{path}, line {number} is no JSON ({error}).") from None
            missing = [x for x in fields if x not in record] if isinstance(record, dict) else list(fields)
            if missing:
                raise ConfigError(f"{path}, line {number} has no {', '.join(missing)}: is it of another data set?")
            yield record
