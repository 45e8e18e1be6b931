"""JSON lines from a user's folder, checked where they are read."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, get_origin

from minikv_jax.errors import ConfigError, shortened


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


def records(path: Path, fields: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Lines of the file as dictionaries that have these fields, of these types.

    Raises:
        ConfigError: a file that cannot be read, a line that is no JSON object, lacks a field or has it of another type.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}, line {number}"
                if line.strip():
                    yield checked(_parsed(line, where), fields, where)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}).") from None


def read(path: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """A file that is one JSON object with these fields.

    Raises:
        ConfigError: as `records`.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}).") from None
    return checked(_parsed(content, str(path)), fields, str(path))


def checked(record: Any, fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The record, if it is a dictionary with these fields, of these types.

    Raises:
        ConfigError: naming the first field that is not.
    """
    missing = [x for x in fields if x not in record] if isinstance(record, dict) else list(fields)
    if missing:
        raise ConfigError(f"{where} has no {', '.join(missing)}: is it of another data set?")
    for name, kind in fields.items():
        if not _is_a(record[name], kind):
            raise ConfigError(f"{where}: {name} is {shortened(record[name])}, which this data set does not have there.")
    return record


def _is_a(value: Any, kind: Any) -> bool:
    """`isinstance`, for `list[...]` and what is made of it too; a list holds something."""
    if isinstance(kind, UnionType):
        return any(_is_a(value, one) for one in kind.__args__)
    if get_origin(kind) is list:
        return isinstance(value, list) and value != [] and all(_is_a(x, *kind.__args__) for x in value)
    return isinstance(value, kind)


def _parsed(content: bytes, where: str) -> Any:
    try:
        return json.loads(content)
    except UnicodeDecodeError:
        raise ConfigError(f"{where} is no UTF-8 text.") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is no JSON ({error}).") from None
