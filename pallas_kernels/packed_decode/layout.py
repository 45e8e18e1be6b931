"""How low-bit keys and values lie in memory.

The unit is a *block* of 128 tokens of one key/value head. Codes are packed along the tokens, in planes: with b bits
there are 8 / b planes of P = 16 b tokens, and one byte carries the same row of every plane:

    byte of row r (0 <= r < P):   bits [0, b)      token 0 P + r
                                  bits [b, 2b)     token 1 P + r
                                  ...              plane j holds the run of tokens j P .. j P + P - 1

    2 bits, P = 32:   7 6 | 5 4 | 3 2 | 1 0
                    96+r | 64+r | 32+r | r

A plane is a contiguous run of tokens, so unpacking is `(byte >> b j) & mask` with no shuffle, one plane of a tile has
the shape of the tile, and quantisation groups of 32, 64 or 128 tokens are whole planes. Three bits are a two-bit part
(32 rows) followed by a one-bit part (16 rows).

    keys    codes [B, K, blocks, P, H]    channels are contiguous: the contraction of query . key
    values  codes [B, K, blocks, H, P]    tokens are contiguous: the contraction of probability . value

Scale and zero point (the group's minimum: value = code * scale + zero) belong to a group of tokens of one channel or
to a group of channels of one token:

    group_axis "tokens"     [B, K, blocks, 128 / group, H]
    group_axis "channels"   [B, K, blocks, H / group, 128]
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

BLOCK = 128
SUPPORTED_BITS = (1, 2, 3, 4, 8)

GroupAxis = Literal["tokens", "channels"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedTensor:
    """Packed keys or values of one cache segment. See the module's text for the layout.

    Attributes:
        codes: uint8, [B, K, blocks, P, H] for keys or [B, K, blocks, H, P] for values, P = 16 * bits.
        scale: float16, bfloat16 or float8_e4m3fn, one number a group.
        zero: as scale; the group's minimum.
        bits: 1, 2, 3, 4 or 8.
        group_size: tokens or channels that share one scale.
        group_axis: "tokens" or "channels".
        tokens_last: False for the layout of keys, True for that of values.
    """

    codes: UInt8[Array, "B K blocks rows columns"]
    scale: Float[Array, "B K blocks groups lanes"]
    zero: Float[Array, "B K blocks groups lanes"]
    bits: int = dataclasses.field(metadata={"static": True})
    group_size: int = dataclasses.field(metadata={"static": True})
    group_axis: GroupAxis = dataclasses.field(metadata={"static": True})
    tokens_last: bool = dataclasses.field(metadata={"static": True})

    @property
    def head_size(self) -> int:
        return self.codes.shape[-2] if self.tokens_last else self.codes.shape[-1]

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        return self.codes.shape[2] * BLOCK


def rows_per_block(bits: int) -> int:
    """Bytes that 128 codes of `bits` bits take: P."""
    if bits not in SUPPORTED_BITS:
        raise ValueError(f"bits={bits} is not supported: choose one of {SUPPORTED_BITS}.")
    return BLOCK * bits // 8


def _pack_planes(codes: UInt8[Array, "..."], bits: int, axis: int) -> UInt8[Array, "..."]:
    planes = 8 // bits
    axis %= codes.ndim
    shape = codes.shape
    split = codes.reshape(*shape[:axis], planes, shape[axis] // planes, *shape[axis + 1 :])
    parts = [jax.lax.index_in_dim(split, j, axis, keepdims=False) << (bits * j) for j in range(planes)]
    return jax.tree.reduce(jnp.bitwise_or, parts)


def _unpack_planes(packed: UInt8[Array, "..."], bits: int, axis: int) -> UInt8[Array, "..."]:
    planes = 8 // bits
    axis %= packed.ndim
    parts = jnp.expand_dims(packed, axis)
    shifts = jax.lax.broadcasted_iota(jnp.uint8, [planes if i == axis else 1 for i in range(parts.ndim)], axis)
    codes = (parts >> (shifts * jnp.uint8(bits))) & ((1 << bits) - 1)
    return codes.reshape(*packed.shape[:axis], planes * packed.shape[axis], *packed.shape[axis + 1 :])


def pack(codes: UInt8[Array, "..."], bits: int, axis: int) -> UInt8[Array, "..."]:
    """Packs codes below 2**bits along `axis`, whose length must be a multiple of 8 (three bits: 8; else 8 / bits).

    The axis shrinks by bits / 8. Plane j of the result holds the j-th contiguous run of the axis.
    """
    if bits not in SUPPORTED_BITS:
        raise ValueError(f"bits={bits} is not supported: choose one of {SUPPORTED_BITS}.")
    if bits == 3:
        low, high = codes & 3, codes >> 2
        return jnp.concatenate([_pack_planes(low, 2, axis), _pack_planes(high, 1, axis)], axis=axis)
    return _pack_planes(codes, bits, axis)


def unpack(packed: UInt8[Array, "..."], bits: int, axis: int) -> UInt8[Array, "..."]:
    """The inverse of `pack`: codes as uint8."""
    if bits not in SUPPORTED_BITS:
        raise ValueError(f"bits={bits} is not supported: choose one of {SUPPORTED_BITS}.")
    if bits == 3:
        rows = packed.shape[axis] // 3
        low = jax.lax.slice_in_dim(packed, 0, 2 * rows, axis=axis)
        high = jax.lax.slice_in_dim(packed, 2 * rows, 3 * rows, axis=axis)
        return _unpack_planes(low, 2, axis) | (_unpack_planes(high, 1, axis) << 2)
    return _unpack_planes(packed, bits, axis)


def dequantize_blocks(packed: PackedTensor) -> Float[Array, "B K blocks rows columns"]:
    """Float32 numbers in the order they are stored: [.., 128, H] for keys, [.., H, 128] for values."""
    codes = unpack(packed.codes, packed.bits, axis=-1 if packed.tokens_last else -2)
    # Groups run over rows if they run over the tokens of keys or the channels of values.
    over_rows = (packed.group_axis == "channels") == packed.tokens_last
    scale, zero = (x.astype(jnp.float32) for x in (packed.scale, packed.zero))
    if not over_rows:
        scale, zero = jnp.swapaxes(scale, -1, -2), jnp.swapaxes(zero, -1, -2)
    axis = -2 if over_rows else -1
    rows, columns = codes.shape[-2:]
    split = (-1, packed.group_size, columns) if over_rows else (rows, -1, packed.group_size)
    grouped = codes.astype(jnp.float32).reshape(*codes.shape[:-2], *split)
    return (grouped * jnp.expand_dims(scale, axis) + jnp.expand_dims(zero, axis)).reshape(codes.shape)


def dequantize(packed: PackedTensor, dtype: DTypeLike = jnp.float32) -> Float[Array, "B K S H"]:
    """All tokens of a segment as plain numbers, in token order (rows past the segment's length are meaningless)."""
    numbers = dequantize_blocks(packed)
    if packed.tokens_last:
        numbers = jnp.swapaxes(numbers, -1, -2)
    b, k, blocks, block, h = numbers.shape
    return numbers.reshape(b, k, blocks * block, h).astype(dtype)
