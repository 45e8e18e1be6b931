"""Reads the header of a GGUF file: the key-value pairs, and the list of tensors.

Nothing in the header is trusted: every count and length is checked against what is left of the file, and against what
a model can need, before anything is allocated. Long texts and arrays stay in the file until they are asked for, so
that a header costs neither time nor memory for what nobody reads.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from minikv_jax.errors import CheckpointError, shortened

_MAX_PAIRS = 1 << 14
_MAX_TENSORS = 1 << 14
_MAX_TEXTS = 1 << 20  # in one list; the largest vocabularies have 1 << 18, and twice as many merges
_MAX_NAME = 1 << 10  # bytes
_SHORT_TEXT = 64  # bytes; longer ones stay in the file
_BLOCK_BYTES = 1 << 20

_TYPES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9


@dataclass(frozen=True)
class Unread:
    """A text, a list of texts or a list of numbers that is still in the file; `len` counts bytes or entries."""

    path: Path
    offset: int
    size: int
    what: str
    count: int
    dtype: np.dtype | None = None  # of numbers

    def __len__(self) -> int:
        return self.count

    def __repr__(self) -> str:
        return f"<text of {self.count} bytes>" if self.what == "text" else f"<list of {self.count} {self.what}>"

    def _bytes(self) -> bytes:
        with open(self.path, "rb") as file:
            return Cursor(file, self.path, self.offset).take(self.size)

    def text(self) -> str:
        return _decoded(self._bytes(), self.path)

    def texts(self) -> list[str]:
        raw, at, texts = self._bytes(), 0, []
        for _ in range(self.count):
            start = at + 8
            at = start + int.from_bytes(raw[at:start], "little")
            texts.append(_decoded(raw[start:at], self.path))
        if at != self.size:
            raise _changed(self.path)
        return texts

    def numbers(self) -> np.ndarray:
        return np.frombuffer(self._bytes(), self.dtype)


@dataclass(frozen=True)
class TensorInfo:
    """One entry of the list of tensors. `shape` has the slowest axis first; `offset` counts from the data's start."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class Header:
    metadata: dict[str, Any]
    tensors: list[TensorInfo]
    end: int


def read_header(path: Path) -> Header:
    """Raises CheckpointError if the file is not GGUF, or is damaged, and OSError if it cannot be read."""
    with open(path, "rb") as file:
        cursor = Cursor(file, path)
        magic = cursor.take(min(4, cursor.size))
        if magic != b"GGUF":
            raise CheckpointError(f"{path} is not a GGUF file: it begins with {magic!r}, expected b'GGUF'.")
        version = cursor.value("I")
        if version not in (2, 3):
            raise CheckpointError(
                f"{path} has GGUF version {version}; supported: 2 and 3, little-endian. Convert the model again."
            )
        tensor_count, pair_count = cursor.value("Q"), cursor.value("Q")
        metadata: dict[str, Any] = {}
        for _ in range(cursor.fitting(pair_count, 8 + 4 + 1, _MAX_PAIRS, "entries")):
            key = cursor.name()
            if key in metadata:
                raise CheckpointError(f"{path}: the header holds {shortened(key)} twice.")
            metadata[key] = _value(cursor, key)
        count = cursor.fitting(tensor_count, 8 + 4 + 8 + 4 + 8, _MAX_TENSORS, "tensors")
        return Header(metadata, [_tensor_info(cursor) for _ in range(count)], cursor.position)


def _value(cursor: "Cursor", key: str) -> Any:
    kind = cursor.value("I")
    if kind in _TYPES:
        return cursor.value(_TYPES[kind])
    if kind == _TEXT:
        length = cursor.value("Q")
        if length <= _SHORT_TEXT:
            return _decoded(cursor.take(length), cursor.path)
        return Unread(cursor.path, cursor.skip(length), length, "text", length)
    item, count = (cursor.value("I"), cursor.value("Q")) if kind == _ARRAY else (None, 0)
    if item == _TEXT:
        start = cursor.position
        cursor.skip_texts(count)
        return Unread(cursor.path, start, cursor.position - start, "texts", count)
    if item in _TYPES:
        dtype = np.dtype(_TYPES[item]).newbyteorder("<")
        size = count * dtype.itemsize
        return Unread(cursor.path, cursor.skip(size), size, "numbers", count, dtype)
    raise CheckpointError(
        f"{cursor.path}: the value of {shortened(key)} has the unknown type {kind if item is None else item}."
    )


def _tensor_info(cursor: "Cursor") -> TensorInfo:
    name = cursor.name()
    axes = cursor.value("I")
    if not 1 <= axes <= 4:
        raise CheckpointError(f"{cursor.path}: tensor {shortened(name)} has {axes} axes, expected 1 to 4.")
    shape = tuple(cursor.value("Q") for _ in range(axes))[::-1]
    return TensorInfo(name, shape, cursor.value("I"), cursor.value("Q"))


class Cursor:
    """Reads little-endian values from a file, and never past its end."""

    def __init__(self, file: BinaryIO, path: Path, position: int = 0):
        self.file = file
        self.path = path
        self.size = os.fstat(file.fileno()).st_size
        self._seek(position)

    def _seek(self, position: int) -> None:
        self.file.seek(position)
        self.block, self.at, self.end = b"", 0, position  # the next byte is block[at]; the block ends at byte `end`

    @property
    def position(self) -> int:
        return self.end - len(self.block) + self.at

    def require(self, length: int, wanted: str) -> None:
        if length > self.size - self.position:
            raise CheckpointError(
                f"{self.path} is cut off or damaged: its header asks for {wanted} at byte {self.position} of "
                f"{self.size}. Download it again."
            )

    def _buffer(self, length: int) -> None:
        """Sees to it that the block holds so many bytes more."""
        self.require(length, f"{length} bytes")
        if length <= len(self.block) - self.at:
            return
        rest = self.block[self.at :]
        self.block = rest + self.file.read(max(length - len(rest), _BLOCK_BYTES))
        self.end += len(self.block) - len(rest)
        self.at = 0
        if len(self.block) < length:
            raise _changed(self.path)

    def take(self, length: int) -> bytes:
        self._buffer(length)
        self.at += length
        return self.block[self.at - length : self.at]

    def skip(self, length: int) -> int:
        """Passes over bytes, and returns where they begin."""
        self.require(length, f"{length} bytes")
        start = self.position
        if length <= len(self.block) - self.at:
            self.at += length
        else:
            self._seek(start + length)
        return start

    def skip_texts(self, count: int) -> None:
        """Passes over texts, a block of the file at a time: vocabularies have hundreds of thousands."""
        left = self.fitting(count, 8, _MAX_TEXTS, "texts")
        while left:
            self._buffer(8)
            block, at = self.block, self.at
            while left and at + 8 <= len(block):
                at += 8 + int.from_bytes(block[at : at + 8], "little")
                left -= 1
            self.skip(at - self.at)

    def value(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def fitting(self, count: int, least_bytes: int, most: int, what: str) -> int:
        """`count`, if that many items of at least so many bytes can still follow, and a model can need so many."""
        self.require(count * least_bytes, f"{count} {what}")
        if count > most:
            raise CheckpointError(f"{self.path}: the header lists {count} {what}; at most {most} are read.")
        return count

    def name(self) -> str:
        length = self.value("Q")
        self.require(length, f"a name of {length} bytes")
        if length > _MAX_NAME:
            raise CheckpointError(
                f"{self.path}: the header holds a name of {length} bytes; at most {_MAX_NAME} are read."
            )
        return _decoded(self.take(length), self.path)


def _decoded(raw: bytes, path: Path) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: the header holds text that is not UTF-8 ({error}).") from error


def _changed(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} ends early; it changed while it was being read. Load it again.")
