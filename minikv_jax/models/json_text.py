"""JSON files that describe a model, none of which is trusted."""

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from minikv_jax.errors import CheckpointError
from minikv_jax.models.wording import one_line

# Of a description in JSON: room for ten times the tensors of the largest model. The safetensors format allows 100 MB,
# which Python's parser would turn into GBs.
_MAX_JSON_BYTES = 1 << 21
_MAX_JSON_VALUES = 1 << 18


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; a Hugging Face folder needs it. Download the model again.")
    with open(path, "rb") as file:
        return parse_json(file, os.fstat(file.fileno()).st_size, str(path))


def parse_json(file: BinaryIO, length: int, source: str) -> dict[str, Any]:
    """The object in the next bytes. What is too large is refused by length and punctuation, before it is parsed."""
    raw = file.read(length) if length <= _MAX_JSON_BYTES else b""
    if length > _MAX_JSON_BYTES or sum(map(raw.count, (b",", b"[", b"{"))) > _MAX_JSON_VALUES:
        raise CheckpointError(
            f"{source} has {length} bytes, too much for the description of a model: at most {_MAX_JSON_BYTES} bytes "
            f"and {_MAX_JSON_VALUES} values are read."
        )
    try:
        value = json.loads(raw, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} is not valid JSON ({one_line(error)}). Download the model again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{source} must hold a JSON object, not a {type(value).__name__}.")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(values := dict(pairs)) < len(pairs):
        raise ValueError("a key occurs twice")
    return values
