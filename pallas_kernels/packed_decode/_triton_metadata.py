"""Scales and zero points in the Triton decode kernel, one lane per element of a [32] tensor.

KIND 0 float16, 1 bfloat16, 2 float8_e4m3fn, 3 the same on chips that do not know it; always handed on as pairs of
float16.
"""
# Triton builds tuples by `+` alone.

import triton
import triton.language as tl

from pallas_kernels.packed_decode._triton_instructions import (
    load1,
    load2,
    load4,
    multiply2,
    pair,
    spread_up,
    store1,
    unpack_float8,
    warp_max,
)


@triton.constexpr_function
def bytes_of(kind):
    """Of one number."""
    return 1 if kind >= 2 else 2


@triton.jit
def from_bfloat16(x):
    return pair((x << 16).to(tl.float32, bitcast=True), (x & -65536).to(tl.float32, bitcast=True))


@triton.jit
def from_float8(x, KIND: tl.constexpr):
    """The four float8_e4m3fn of a word as two pairs."""
    if KIND == 2:
        return unpack_float8(x)
    else:
        # As the upper byte of a float16, exponent and mantissa one bit on, each is a 256th of itself.
        y = spread_up(x)
        low = ((y[0] >> 1) & 0x3FFF3FFF) | (y[0] & -2147450880)
        high = ((y[1] >> 1) & 0x3FFF3FFF) | (y[1] & -2147450880)
        by = tl.full([32], 0x5C005C00, tl.int32)
        return multiply2(low, by), multiply2(high, by)


@triton.jit
def metadata4(address, KIND: tl.constexpr):
    """Four consecutive numbers as two pairs."""
    if KIND == 0:
        return load2(address)
    elif KIND == 1:
        x = load2(address)
        return from_bfloat16(x[0]), from_bfloat16(x[1])
    else:
        return from_float8(load1(address), KIND)


@triton.jit
def metadata8(address, KIND: tl.constexpr):
    """Eight consecutive numbers as four pairs."""
    if KIND == 0:
        return load4(address)
    elif KIND == 1:
        x = load4(address)
        return from_bfloat16(x[0]), from_bfloat16(x[1]), from_bfloat16(x[2]), from_bfloat16(x[3])
    else:
        x = load2(address)
        return from_float8(x[0], KIND) + from_float8(x[1], KIND)


@triton.jit
def token_metadata(address, t, NARROW: tl.constexpr, KIND: tl.constexpr):
    """Numbers of the tokens of a run of 32 that lane t multiplies: pairs in the order (w, b) of `row_of`."""
    BYTES: tl.constexpr = bytes_of(KIND)
    if NARROW:
        x = metadata4(address + t * (4 * BYTES), KIND)
        y = metadata4(address + t * (4 * BYTES) + 16 * BYTES, KIND)
        return x[0], x[1], y[0], y[1]
    else:
        return metadata8(address + t * (8 * BYTES), KIND)


@triton.jit
def scale_exponent(scale, lane, GROUPS: tl.constexpr, KIND: tl.constexpr):
    """max(0, e) with all value scales of the block, as they are handed on, below 2^e."""
    BYTES: tl.constexpr = bytes_of(KIND)
    largest = tl.zeros([32], tl.int32)
    for group in tl.static_range(GROUPS):
        x = metadata4(scale + (128 * group + 4 * lane) * BYTES, KIND)
        for i in tl.static_range(2):
            largest = tl.maximum(largest, tl.maximum(x[i] & 0x7FFF, (x[i] >> 16) & 0x7FFF))
    return tl.maximum((warp_max(largest) >> 10) - 14, 0).to(tl.float32)


@triton.jit
def clear_metadata(address, left, lane, GROUPS: tl.constexpr, KIND: tl.constexpr):
    """Zeroes, in shared memory, value metadata of the tokens from `left` on: 0 times garbage may be NaN."""
    BYTES: tl.constexpr = bytes_of(KIND)
    for group in tl.static_range(GROUPS):
        for i in tl.static_range(BYTES):
            token = (4 // BYTES) * (lane + 32 * i)
            word = address + 128 * BYTES * group + 128 * i + 4 * lane
            kept = tl.minimum(tl.maximum(left - token, 0), 4 // BYTES)
            mask = tl.where(kept == 4 // BYTES, -1, (1 << (kept * (8 * BYTES) % 32)) - 1)
            store1(word, load1(word) & mask)
