"""Damages files at random: a few edits of bytes or, in JSON, of values."""

import copy
import json
import struct
from typing import Any

import numpy as np

_WORDS = [struct.pack("<Q", n) for n in (0, 1, 255, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)]
_HALF_WORDS = [struct.pack("<I", n) for n in (*range(13), 255, 2**31, 2**32 - 1)]
_TELLING: list[Any] = [None, True, False, 0, 1, -1, 2, 0.5, 1e308, float("nan"), float("inf"), 2**31, 2**64, 10**30]
_TELLING += ["", "x" * 3000, "a\nb\x1b[31m", "\ud800", "é😀", "linear", "yarn", "F64", [], {}, [0], [-1, 2], {"a": {}}]
_TELLING += [json.loads("[" * 50 + "]" * 50)]


def mutated(rng: np.random.Generator, raw: bytes, header: int) -> bytes:
    """One to three edits: most of them in the first `header` bytes, where a file says what it is."""
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(0, header if rng.random() < 0.9 else len(raw) + 1))
        length = int(rng.integers(1, 12))
        other = int(rng.integers(0, max(len(raw), 1)))
        match rng.integers(0, 7):
            case 0:
                raw = raw[:at]
            case 1:
                raw = raw[:at] + raw[at + length :]
            case 2:
                raw = raw[:at] + raw[other : other + length] + raw[at:]
            case 3:
                raw = raw[:at] + rng.bytes(length) + raw[at + length :]
            case 4:
                raw = raw[:at] + _WORDS[rng.integers(len(_WORDS))] + raw[at + 8 :]
            case 5:
                raw = raw[:at] + _HALF_WORDS[rng.integers(len(_HALF_WORDS))] + raw[at + 4 :]
            case _:
                flipped = bytes([raw[at] ^ (1 << int(rng.integers(8)))]) if at < len(raw) else b""
                raw = raw[:at] + flipped + raw[at + 1 :]
    return raw


def mutated_json(rng: np.random.Generator, raw: bytes) -> bytes:
    """One to three values replaced, removed or moved; sometimes bytes, too."""
    document = json.loads(raw)
    for _ in range(rng.integers(1, 4)):
        places = _places(document)
        holder, key = places[rng.integers(len(places))]
        other_holder, other_key = places[rng.integers(len(places))]
        match rng.integers(0, 4):
            case 0:
                del holder[key]
            case 1:
                holder[key] = copy.deepcopy(other_holder[other_key])
            case 2 if isinstance(holder, dict):
                holder[str(rng.choice(["", "x", "a\nb", key + "_", "rope_scaling", "type"]))] = holder.pop(key)
            case _:
                holder[key] = copy.deepcopy(_TELLING[rng.integers(len(_TELLING))])
        if not _places(document):
            break
    text = json.dumps(document).encode()
    return mutated(rng, text, len(text)) if rng.random() < 0.2 else text


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every entry in the document, as what holds it and its key or index."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [(value, key) for key, _ in items]
    return found + [place for holder, key in found for place in _places(holder[key])]
