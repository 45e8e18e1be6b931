"""Where tensors lie in files, and how their values are read, whatever the format."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

from minikv_jax.errors import CheckpointError, shortened

BLOCK_VALUES = 1 << 20  # values decoded at once: large enough for numpy, small beside any model
DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# What the gguf package dequantises.
QUANTIZED = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ3_S"),
    *("IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4"),
)


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies. `shape` has the slowest axis first, as numpy's and Hugging Face's have."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    encoding: str

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        return _row_bytes(self.encoding, self.columns)

    def part(self, start: int, stop: int) -> "Stored":
        """The rows from `start` to `stop` of a matrix, as a tensor."""
        offset = self.offset + start * self.row_bytes
        return replace(self, offset=offset, shape=(stop - start, self.columns))

    def read(self, file: BinaryIO, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` as `[stop - start, columns]`, in the stored dtype or float32 if quantized."""
        file.seek(self.offset + start * self.row_bytes)
        raw = np.fromfile(file, np.uint8, (stop - start) * self.row_bytes)
        if raw.size < (stop - start) * self.row_bytes:
            raise CheckpointError(f"{self.path} ends early; it changed while it was being read. Load it again.")
        raw = raw.reshape(stop - start, self.row_bytes)
        if self.encoding in DTYPES:
            return raw.view(DTYPES[self.encoding])
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        return dequantize(raw, GGMLQuantizationType[self.encoding])


@dataclass(frozen=True)
class Source:
    """The stored tensor behind one parameter, and what sets them apart."""

    name: str
    stored: Stored
    transposed: bool
    interleaved_heads: int  # llama.cpp's order of rotary rows in this many heads; 0 if already half-split
    scale: float = 1.0  # of every value

    def load(self, dtype: np.dtype) -> np.ndarray:
        stored = self.stored
        rows, columns = stored.rows, stored.columns
        out = np.empty((columns, rows) if self.transposed else (rows, columns), dtype)
        step = max(1, BLOCK_VALUES // columns)
        with open(stored.path, "rb") as file, np.errstate(all="ignore"):
            for start in range(0, rows, step):
                stop = min(start + step, rows)
                block = stored.read(file, start, stop)
                scaled = block if self.scale == 1 else block.astype(np.float32) * np.float32(self.scale)
                converted = scaled.astype(dtype, copy=False)
                if not _all_finite(converted):
                    raise self.not_finite(block, dtype)
                if self.transposed:
                    out[:, start:stop] = converted.T
                else:
                    out[start:stop] = converted
        if len(stored.shape) == 1:
            out = out.reshape(stored.shape)
        if self.interleaved_heads:
            out = _half_split(out, self.interleaved_heads)
        return out

    def not_finite(self, block: np.ndarray, dtype: np.dtype) -> CheckpointError:
        """A model with such a weight answers every prompt with nonsense, and seldom says so."""
        where = f"{self.stored.path}: tensor {shortened(self.name)}"
        if not np.isfinite(block).all():
            return CheckpointError(
                f"{where} holds NaN or infinity: the file or the model is damaged. Download it again."
            )
        largest = float(ml_dtypes.finfo(dtype).max)
        return CheckpointError(f"{where} has values beyond {dtype}'s {largest:.5g}; use dtype bfloat16 or float32.")


def _all_finite(values: np.ndarray) -> bool:
    """Looks at the bits, in which infinity and NaN are the largest: on 16 bits isfinite takes ten times as long."""
    signed, unsigned = (values.view(np.dtype(f"{kind}{values.itemsize}")) for kind in "iu")
    limits = np.array([np.inf, -np.inf], values.dtype)
    return bool(signed.max() < limits.view(signed.dtype)[0] and unsigned.max() < limits.view(unsigned.dtype)[1])


def _half_split(array: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's row order `[heads, head_dim / 2, 2]` along the last axis."""
    return array.reshape(*array.shape[:-1], heads, -1, 2).swapaxes(-1, -2).reshape(array.shape)


def _row_bytes(encoding: str, columns: int) -> int:
    """Bytes of one row; raises ValueError if the row does not divide into whole blocks."""
    if encoding in DTYPES:
        return columns * DTYPES[encoding].itemsize
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[encoding]]
    if columns % block:
        raise ValueError(f"rows of {columns} values do not divide into {encoding} blocks of {block}")
    return columns // block * size
