"""Group-wise affine codes: value = code * scale + minimum, with one scale and one minimum for a group of numbers."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from pallas_kernels.packed_decode import layout
from pallas_kernels.packed_decode.layout import BLOCK, GroupAxis, PackedTensor


class Codes(NamedTuple):
    """Codes of consecutive tokens before packing. All arrays have tokens third and channels last.

    Groups over tokens have scale [B, K, S / group, H], groups over channels [B, K, S, H / group].
    """

    codes: UInt8[Array, "B K S H"]
    scale: Float[Array, "B K groups lanes"]
    zero: Float[Array, "B K groups lanes"]


def encode(x: Float[Array, "B K S H"], bits: int, group_size: int, group_axis: GroupAxis, metadata_dtype: str) -> Codes:
    """Asymmetric min/max quantisation (KIVI, arXiv 2402.02750, equation 1; MiniKV keeps it).

    scale = (max - min) / (2**bits - 1) and code = round(clip((x - min) / scale, 0, 2**bits - 1)), ties to even. Codes
    are computed in float32 against scale and minimum as they are stored, so their rounding costs nothing twice. A
    group without range (or one whose scale rounds to zero) has scale 0, codes 0 and gives back its minimum.
    """
    b, k, s, h = x.shape
    axis, shape = (
        (3, (b, k, s // group_size, group_size, h))
        if group_axis == "tokens"
        else (4, (b, k, s, h // group_size, group_size))
    )
    grouped = x.astype(jnp.float32).reshape(shape)
    minimum = grouped.min(axis=axis, keepdims=True)
    levels = (1 << bits) - 1
    limit = float(jnp.finfo(metadata_dtype).max)
    zero = jnp.clip(minimum, -limit, limit).astype(metadata_dtype)
    scale = jnp.minimum((grouped.max(axis=axis, keepdims=True) - minimum) / levels, limit).astype(metadata_dtype)
    step = scale.astype(jnp.float32)
    code = jnp.where(step > 0, (grouped - zero.astype(jnp.float32)) / jnp.where(step > 0, step, 1), 0)
    codes = jnp.round(jnp.clip(code, 0, levels)).astype(jnp.uint8).reshape(x.shape)
    return Codes(codes, scale.squeeze(axis), zero.squeeze(axis))


def to_packed(codes: Codes, bits: int, group_size: int, group_axis: GroupAxis, tokens_last: bool) -> PackedTensor:
    """Lays codes out in blocks of 128 tokens; their number must be a multiple of 128."""
    b, k, s, h = codes.codes.shape
    blocks = s // BLOCK
    in_blocks = codes.codes.reshape(b, k, blocks, BLOCK, h)
    packed = (
        layout.pack(jnp.swapaxes(in_blocks, -1, -2), bits, axis=-1)
        if tokens_last
        else layout.pack(in_blocks, bits, axis=-2)
    )

    def metadata(x):
        x = x.reshape(b, k, blocks, -1, x.shape[-1])
        return x if group_axis == "tokens" else jnp.swapaxes(x, -1, -2)

    return PackedTensor(packed, metadata(codes.scale), metadata(codes.zero), bits, group_size, group_axis, tokens_last)


def from_packed(packed: PackedTensor) -> Codes:
    """The inverse of `to_packed`."""
    codes = layout.unpack(packed.codes, packed.bits, axis=-1 if packed.tokens_last else -2)
    codes = jnp.swapaxes(codes, -1, -2) if packed.tokens_last else codes
    b, k, blocks, block, h = codes.shape

    def metadata(x):
        x = x if packed.group_axis == "tokens" else jnp.swapaxes(x, -1, -2)
        return x.reshape(b, k, -1, x.shape[-1])

    return Codes(codes.reshape(b, k, blocks * block, h), metadata(packed.scale), metadata(packed.zero))
