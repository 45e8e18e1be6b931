"""Section 0.1 (min/max quantiser), 0.2 (packing) and the integer-zero quantiser of section 4.4."""

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

METADATA = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float32": np.dtype(np.float32),
}
METADATA_BITS = {name: 8 * dtype.itemsize for name, dtype in METADATA.items()}
CODE_BITS = (1, 2, 3, 4, 8)
EXACT_BITS = 16  # as a code width: no codec, the numbers are kept as they came


@dataclass
class Quantised:
    """Codes `[..., n]` with one scale and one minimum `[..., n / group]` for every run of `group` numbers of the last
    axis.
    """

    codes: np.ndarray
    scale: np.ndarray
    minimum: np.ndarray
    bits: int
    group: int


def quantise(x: np.ndarray, bits: int, group: int, metadata: str = "float16") -> Quantised:
    """Quantise runs of `group` numbers along the last axis (section 0.1).

    scale = (max - min) / (2^bits - 1) and minimum = min are worked out in float32 and rounded to the metadata dtype;
    the codes are then worked out in float32 against those rounded numbers: clip first, then round half to even. A
    scale of zero, that is a constant group or a range that the metadata dtype rounds away, gives code 0, so the group
    gives back its rounded minimum.
    """
    if bits not in CODE_BITS:
        raise ValueError(f"bits must be one of {CODE_BITS}, got {bits}")
    x = np.asarray(x, np.float32)
    if group < 1 or x.shape[-1] % group:
        raise ValueError(f"the last axis, {x.shape[-1]}, must be a multiple of the group, {group}")
    levels = np.float32(2**bits - 1)
    groups = x.reshape(*x.shape[:-1], x.shape[-1] // group, group)
    scale = np.zeros(groups.shape[:-1], METADATA[metadata])
    minimum = np.zeros(groups.shape[:-1], METADATA[metadata])
    codes = np.zeros(groups.shape, np.int32)
    for where in np.ndindex(groups.shape[:-1]):
        numbers = groups[where]
        low, high = numbers.min(), numbers.max()
        with np.errstate(over="ignore"):
            scale[where] = np.float32((high - low) / levels)
            minimum[where] = low
        step, start = np.float32(scale[where]), np.float32(minimum[where])
        if not (np.isfinite(step) and np.isfinite(start)):
            raise ValueError(f"a group from {low} to {high} does not fit {metadata} metadata")
        if step == 0:
            continue
        codes[where] = np.rint(np.clip((numbers - start) / step, np.float32(0), levels)).astype(np.int32)
    return Quantised(codes.reshape(x.shape), scale, minimum, bits, group)


def dequantise(quantised: Quantised) -> np.ndarray:
    """code * scale + minimum, in float32 (section 0.1)."""
    scale = np.repeat(quantised.scale.astype(np.float32), quantised.group, axis=-1)
    minimum = np.repeat(quantised.minimum.astype(np.float32), quantised.group, axis=-1)
    return quantised.codes.astype(np.float32) * scale + minimum


def from_a_tie(x: np.ndarray, levels: float = np.inf) -> float:
    """How near one of these numbers is to being rounded the other way; those beyond 0..levels are clipped anyway."""
    x = np.asarray(x, np.float64).ravel()
    inside = x[(x > 0) & (x < levels)] if levels < np.inf else x
    return float(np.abs(inside - np.floor(inside) - 0.5).min(initial=np.inf))


def short_floats(
    x: float, bits: int, calls: list[float] | None = None, least: float = 0.0, outwards: bool = False
) -> tuple[float, float, float]:
    """The next numbers of `bits` significant bits below and above x, or x twice, and the nearer of them (to even).
    Numbers lie `least` apart, or more. `calls` gets how near x is to one that has another nearest number, or, where
    that is not what matters (`outwards`), another next one.
    """
    if x == 0:
        return 0.0, 0.0, 0.0
    ulp = max(2.0 ** (np.floor(np.log2(abs(x))) - (bits - 1)), least)
    if calls is not None:
        calls.append(from_a_tie(x / ulp + 0.5 * outwards))
    return np.floor(x / ulp) * ulp, np.ceil(x / ulp) * ulp, np.rint(x / ulp) * ulp


def searched_grid(
    numbers: np.ndarray,
    bits: int,
    factors: tuple[float, ...],
    significant: int,
    calls: list[float] | None = None,
    least: float = 0.0,
) -> tuple[float, float]:
    """(scale, minimum) of one group, of the candidates that fit it with the least squared error.

    Candidates: the range as it is, and shrunk around its middle by each factor, with minimum and then scale rounded to
    the nearest short float; and last the whole range with the minimum rounded down and the scale up. `calls` gets how
    near the choice was to another one.
    """
    numbers = np.asarray(numbers, np.float32)
    low, high = np.float64(numbers.min()), np.float64(numbers.max())
    levels = 2**bits - 1
    candidates, rounded = [], []
    for factor in (1.0, *factors):
        middle, half = (low + high) / 2, (high - low) / 2 * factor
        rounded.append([])
        minimum = short_floats(middle - half if factor < 1 else low, significant, rounded[-1], least)[2]
        top = middle + half if factor < 1 else high
        step = short_floats(max(top - minimum, 0) / levels, significant, rounded[-1], least)[2]
        candidates.append((step, minimum))
    rounded.append([])
    minimum = short_floats(low, significant, rounded[-1], least, outwards=True)[0]
    step = short_floats((high - minimum) / levels, significant, rounded[-1], least, outwards=True)[1]
    candidates.append((step, minimum))
    errors = [np.square(on_grid(numbers, bits, *grid) - numbers).sum() for grid in candidates]
    best = candidates[int(np.argmin(errors))]
    if calls is not None:
        others = [error for error, grid in zip(errors, candidates) if grid != best]
        calls.append((min(others, default=np.inf) - min(errors)) / max(*errors, 1e-30))
        # Roundings of candidates that are far behind do not matter.
        calls += [x for error, mine in zip(errors, rounded) for x in mine if error < 1.5 * min(errors)]
    return best


def on_grid(x: np.ndarray, bits: int, scale: float, minimum: float, calls: list[float] | None = None) -> np.ndarray:
    """The numbers code * scale + minimum that are nearest to x."""
    if scale == 0:
        return np.full_like(x, minimum, np.float64)
    if calls is not None:
        calls.append(from_a_tie((np.asarray(x, np.float64) - minimum) / scale, 2**bits - 1))
    return np.clip(np.rint((np.asarray(x, np.float64) - minimum) / scale), 0, 2**bits - 1) * scale + minimum


def hadamard(size: int) -> np.ndarray:
    """Entry (i, j) is -1 to the number of ones that i and j share in binary, over sqrt(size)."""
    return np.array([[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]) / np.sqrt(size)


def gptq(
    x: np.ndarray,
    grid_of: Callable[[np.ndarray], tuple[float, float]],
    hessian: np.ndarray,
    bits: int,
    calls: list[float] | None = None,
) -> np.ndarray:
    """`x [T, H]` with every column rounded to its grid, the classical way (GPTQ, Algorithm 1): column after column, the
    columns to the right are moved to where they make up best for the error. Every eight columns the next eight grids
    are chosen, from those columns as they have been moved.
    """
    size = x.shape[1]
    x, out = np.array(x, np.float64), np.zeros(x.shape)
    for c in range(size):
        if c % 8 == 0:
            grids = [grid_of(column) for column in x[:, c : c + 8].T]
        # The columns that are left see the inverse of their own part of the Hessian.
        inverse = np.linalg.inv(hessian[c:, c:])
        out[:, c] = on_grid(x[:, c], bits, *grids[c % 8], calls)
        x[:, c:] -= np.outer((x[:, c] - out[:, c]) / inverse[0, 0], inverse[0])
    return out


def damped(hessian: np.ndarray) -> np.ndarray:
    """With a hundredth of its mean on the diagonal."""
    size = len(hessian)
    return hessian + 0.01 * np.trace(hessian) / size * np.eye(size)


def short_triangle(hessian: np.ndarray, dtype: str) -> np.ndarray:
    """The unit upper triangular U of U D U^T = hessian, kept in a short dtype."""
    size = len(hessian)
    triangle = np.eye(size)
    rest = np.array(hessian, np.float64)
    for c in reversed(range(size)):  # Gauss, from the last column
        triangle[:c, c] = rest[:c, c] / rest[c, c]
        rest[:c, :c] -= np.outer(triangle[:c, c], rest[c, :c])
    return triangle.astype(np.float32).astype(np.dtype(dtype)).astype(np.float64)


def roundtrip_per_token(x: np.ndarray, bits: int, group: int, metadata: str = "float16") -> np.ndarray:
    """What comes back from `x [T, H]` when every token is quantised in groups of `group` channels. 16 bits change
    nothing.
    """
    return x if bits == EXACT_BITS else dequantise(quantise(x, bits, group, metadata))


def roundtrip_per_channel(x: np.ndarray, bits: int, group: int, metadata: str = "float16") -> np.ndarray:
    """What comes back from `x [T, H]` when every channel is quantised in groups of `group` stored tokens. 16 bits
    change nothing.
    """
    return x if bits == EXACT_BITS else dequantise(quantise(x.T, bits, group, metadata)).T


def integer_zero_roundtrip(x: np.ndarray, bits: int = 4, metadata: str = "float16") -> np.ndarray:
    """Q-Hitter's quantiser (section 4.4) on `x [T, H]`: one scale and one integer zero point for a whole token.

    scale = max(max - min, 1e-5) / (2^bits - 1), zero = clamp(-round(min / scale)); it saturates unless min <= 0 <=
    max. The scale is rounded to the metadata dtype; one that rounds to zero gives back zeros.
    """
    x = np.asarray(x, np.float32)
    levels = np.float32(2**bits - 1)
    out = np.zeros_like(x)
    for t, token in enumerate(x):
        spread = max(np.float32(token.max() - token.min()), np.float32(1e-5))
        scale = np.float32(np.float32(spread / levels).astype(METADATA[metadata]))
        if scale == 0:
            continue
        zero = np.clip(-np.rint(token.min() / scale), np.float32(0), levels)
        out[t] = (np.clip(np.rint(token / scale) + zero, np.float32(0), levels) - zero) * scale
    return out


def pack_interleaved(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes along the last axis into int32 words, the first code of a run in the lowest bits (section 0.2)."""
    if bits not in (1, 2, 4, 8):
        raise ValueError(f"only 1, 2, 4 and 8 bits fill a word evenly, got {bits}")
    per_word = 32 // bits
    codes = np.asarray(codes)
    if codes.shape[-1] % per_word:
        raise ValueError(f"the last axis, {codes.shape[-1]}, must be a multiple of {per_word} codes a word")
    if codes.size and not 0 <= codes.min() <= codes.max() < 2**bits:
        raise ValueError(f"codes must lie in 0..{2**bits - 1}")
    runs = codes.reshape(*codes.shape[:-1], -1, per_word).astype(np.uint32)
    words = np.zeros(runs.shape[:-1], np.uint32)
    for j in range(per_word):
        words |= runs[..., j] << np.uint32(bits * j)
    return words.view(np.int32)


def unpack_interleaved(words: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `pack_interleaved`."""
    per_word = 32 // bits
    words = np.ascontiguousarray(words, np.int32).view(np.uint32)
    codes = [(words >> np.uint32(bits * j)) & np.uint32(2**bits - 1) for j in range(per_word)]
    return np.stack(codes, axis=-1).reshape(*words.shape[:-1], -1).astype(np.int32)
