"""Group-wise affine codes: value = code * scale + minimum, with one scale and one minimum for a group of numbers."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
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


def encode(
    x: Float[Array, "B K S H"],
    bits: int,
    group_size: int,
    group_axis: GroupAxis,
    metadata_dtype: str = "float16",
    clip: tuple[float, ...] = (),
    integer_zero: bool = False,
) -> Codes:
    """Asymmetric min/max quantisation (KIVI, arXiv 2402.02750, equation 1; MiniKV and MiKV keep it).

    scale = (max - min) / (2**bits - 1) and code = round(clip((x - min) / scale, 0, 2**bits - 1)), ties to even. Codes
    are computed in float32 against scale and minimum as they are stored, so their rounding costs nothing twice. A
    group without range (or one whose scale rounds to zero) has scale 0, codes 0 and gives back its minimum. One that
    holds NaN, or whose minimum or scale is beyond the metadata's largest number, gives back NaN.

    Of metadata shorter than float16 the nearest numbers may miss the group: a float8 minimum of 370 is 384. They are
    also tried rounded outwards, the minimum down and then the scale up, which reaches every number of the group, and
    the better of the two is kept.

    Args:
        x: numbers; S is a multiple of a group over tokens, H of one over channels.
        bits, group_size, group_axis, metadata_dtype: as `Codec`.
        clip: factors by which the range is shrunk around its middle; every group takes the one that fits it best.
        integer_zero: the minimum is rounded to a whole number of scales and must not be positive (Q-Hitter).
    """
    x = _held(x.astype(jnp.float32), bits, group_size, group_axis, metadata_dtype)
    return _encode(x, bits, group_size, group_axis, metadata_dtype, clip, integer_zero)


def _grouped(x: Float[Array, "B K S H"], group_size: int, group_axis: GroupAxis) -> tuple[Float[Array, "..."], int]:
    """x with an axis for the numbers of a group, and that axis."""
    b, k, s, h = x.shape
    if group_axis == "tokens":
        return x.reshape(b, k, s // group_size, group_size, h), 3
    return x.reshape(b, k, s, h // group_size, group_size), 4


def _held(x: Float[Array, "B K S H"], bits: int, group_size: int, group_axis: GroupAxis, dtype: str):
    """x with NaN in the groups whose minimum or scale the metadata's dtype cannot hold: a clamp would be silent."""
    grouped, axis = _grouped(x, group_size, group_axis)
    low, high = grouped.min(axis=axis, keepdims=True), grouped.max(axis=axis, keepdims=True)
    limit, levels = float(jnp.finfo(dtype).max), (1 << bits) - 1
    too_large = (jnp.abs(low) > limit) | ((high - low) / levels > limit)
    return jnp.where(too_large, jnp.nan, grouped).reshape(x.shape)


def _encode(
    x: Float[Array, "B K S H"],
    bits: int,
    group_size: int,
    group_axis: GroupAxis,
    metadata_dtype: str,
    clip: tuple[float, ...],
    integer_zero: bool = False,
) -> Codes:
    """`encode` of float32 numbers that need not be held: those beyond the metadata's range are clamped."""
    grouped, axis = _grouped(x, group_size, group_axis)
    low, high = grouped.min(axis=axis, keepdims=True), grouped.max(axis=axis, keepdims=True)
    levels = (1 << bits) - 1

    def grid(low, high, down=jnp.round, up=jnp.round):
        if integer_zero:
            scale = _stored(jnp.maximum(high - low, 1e-5), metadata_dtype, up, levels)
            whole = jnp.clip(-jnp.round(_over(low, scale)), 0, levels)
            return scale, _stored(-whole * scale, metadata_dtype)
        zero = _stored(low, metadata_dtype, down)
        # The papers' code has the unrounded minimum here, which differs for float16 by less than its last bit.
        lowest = low if metadata_dtype == "float16" else zero
        return _stored(jnp.maximum(high - lowest, 0), metadata_dtype, up, levels), zero

    def codes_on(scale, zero):
        if integer_zero:
            return jnp.clip(jnp.round(_over(grouped, scale)) + jnp.round(_over(-zero, scale)), 0, levels)
        return jnp.round(jnp.clip(_over(grouped - zero, scale), 0, levels))

    def error(scale, zero):
        restored = codes_on(scale, zero) * scale + zero
        return jnp.square(restored - grouped).sum(axis=axis, keepdims=True)

    middle, half = (low + high) / 2, (high - low) / 2
    others = [grid(middle - half * factor, middle + half * factor) for factor in clip]
    if metadata_dtype != "float16" and not integer_zero:
        others.append(grid(low, high, jnp.floor, jnp.ceil))
    scale, zero = grid(low, high)
    least = error(scale, zero) if others else jnp.inf
    for other in others:
        found = error(*other)
        better = found < least
        scale, zero, least = (jnp.where(better, *pair) for pair in zip((*other, found), (scale, zero, least)))
    codes = codes_on(scale, zero)
    # XLA's minimum may pass over NaN (it does on CPUs); a group that holds one must come back as NaN, not as garbage.
    zero = jnp.where(jnp.isnan(grouped).any(axis=axis, keepdims=True), jnp.nan, zero)
    scale, zero = (x.squeeze(axis).astype(metadata_dtype) for x in (scale, zero))
    return Codes(codes.astype(jnp.uint8).reshape(x.shape), scale, zero)


def _over(x: Float[Array, "..."], step: Float[Array, "..."]) -> Float[Array, "..."]:
    """x / step, and 0 where the step is."""
    return jnp.where(step > 0, x / jnp.where(step > 0, step, 1), 0)


def _stored(x: Float[Array, "..."], dtype: str, whole: Callable = jnp.round, parts: int = 1) -> Float[Array, "..."]:
    """The float32 number that a short float holds of x / parts, within its range: the nearest, the next one below it
    (`whole` is floor) or above it (ceil).

    Computed, not converted there and back: XLA takes such a pair of conversions for none on a GPU. And divided once, by
    no constant: XLA multiplies by a constant's inverse, whose last bit may tip a number that lies between two others.
    """
    info = jnp.finfo(dtype)
    limit = min(float(info.max) * parts, float(jnp.finfo(jnp.float32).max))
    x = jnp.clip(x, -limit, limit)
    exponent = jnp.maximum(jnp.frexp(x / parts)[1] - 1, max(info.minexp, -100))
    last_bit = jnp.ldexp(jnp.float32(1), exponent - info.nmant)
    return whole(x / (parts * last_bit)) * last_bit


# Channels whose scales are chosen together, when what earlier channels add to them is known: enough for a matrix
# product, few enough to be one fused piece of work.
_TOGETHER = 8


def encode_with_feedback(
    x: Float[Array, "B K S H"],
    coupling: Float[Array, "B K H H"],
    bits: int,
    group_size: int,
    metadata_dtype: str = "float16",
    clip: tuple[float, ...] = (),
) -> Codes:
    """`encode` with groups over tokens, its errors made up for in later channels, as queries allow.

    What counts of a key's error e is that of its logits, e M e^T summed over queries, with M = sum query^T query. Write
    M = U D U^T with U unit upper triangular, and it is the sum over channels of D_cc (e U)_c^2: a channel's own error,
    and what the errors of channels before it add up to. That is known when its turn comes, so it is added to what is
    rounded (GPTQ, arXiv 2210.17323; in this form QuIP, arXiv 2307.13304, section 3).

    Args:
        x, bits, group_size, metadata_dtype, clip: as `encode`.
        coupling: U - 1, of the queries that will meet x (`coupling_of`).
    """
    h = x.shape[-1]
    width = next(width for width in range(min(_TOGETHER, h), 0, -1) if h % width == 0)

    def step(error, run):
        x, coupling, own, undone, start = run
        added = jnp.einsum("bkhs,bkhw->bkws", error, coupling)
        # Where the run's numbers would end up if rounding them cost nothing more: what their scales must span.
        ahead = jnp.einsum("bkws,bkwv->bkvs", added, undone)
        grids = _encode(x + ahead, bits, group_size, "channels", metadata_dtype, clip)
        scale, zero = (jnp.repeat(y.astype(jnp.float32), group_size, axis=3) for y in grids[1:])
        rounded, errors = [], []
        for i in range(width):
            wanted = x[:, :, i] + added[:, :, i] + sum(e * own[:, :, j, i, None] for j, e in enumerate(errors))
            size = scale[:, :, i]
            code = _over(wanted - zero[:, :, i], size)
            rounded.append(jnp.round(jnp.clip(code, 0, (1 << bits) - 1)))
            errors.append(x[:, :, i] - (rounded[-1] * size + zero[:, :, i]))
        error = jax.lax.dynamic_update_slice_in_dim(error, jnp.stack(errors, axis=2), start, axis=2)
        return error, grids._replace(codes=jnp.stack(rounded, axis=2).astype(jnp.uint8))

    # A channel's tokens lie together here, for the groups over them and for what every step reads and writes.
    x = jnp.swapaxes(_held(x.astype(jnp.float32), bits, group_size, "tokens", metadata_dtype), -1, -2)
    b, k, _, s = x.shape
    own = jnp.diagonal(coupling.reshape(b, k, h // width, width, h // width, width), axis1=2, axis2=4)
    runs = x.reshape(b, k, -1, width, s), coupling.reshape(b, k, h, -1, width), own
    runs = [jnp.moveaxis(y, axis, 0) for y, axis in zip(runs, (2, 3, 4))]
    _, codes = jax.lax.scan(
        step, jnp.zeros_like(x), (*runs, _inverse(runs[-1]), jnp.arange(0, h, width, dtype=jnp.int32))
    )
    return Codes(*(jnp.moveaxis(y, 0, 2).reshape(b, k, h, -1).swapaxes(-1, -2) for y in codes))


def coupling_of(moment: Float[Array, "B K H H"]) -> Float[Array, "B K H H"]:
    """U - 1 of moment = U D U^T: how errors of channels (rows) add up in later ones (columns).

    The moment's size does not matter. No number is above 10 sqrt(H) or so, for the damping bounds D from below.
    """
    h = moment.shape[-1]
    mean = jnp.trace(moment, axis1=-2, axis2=-1)[..., None, None] / h
    # One part in a hundred of the mean keeps the factors finite where queries leave a direction empty.
    damping = 0.01 * jnp.eye(h, dtype=jnp.float32)
    moment = jnp.where(mean > 0, moment / jnp.where(mean > 0, mean, 1), 0) + jnp.expand_dims(damping, (0, 1))
    # With channels counted from the last, Cholesky's lower factor is the upper one.
    factor = jnp.linalg.cholesky(moment[..., ::-1, ::-1])[..., ::-1, ::-1]
    return jnp.triu(factor / jnp.diagonal(factor, axis1=-2, axis2=-1)[..., None, :], 1)


def fold(triangle: Float[Array, "... H H"]) -> Float[Array, "... half H"]:
    """A strictly upper triangular matrix in half of its room: its last rows, turned round, lie below the first ones."""
    rows = -(-triangle.shape[-1] // 2)
    return (triangle + triangle[..., ::-1, ::-1])[..., :rows, :]


def unfold(folded: Float[Array, "... half H"]) -> Float[Array, "... H H"]:
    """The inverse of `fold`, float32."""
    folded, h = folded.astype(jnp.float32), folded.shape[-1]
    return jnp.triu(jnp.concatenate([folded, folded[..., : h // 2, :][..., ::-1, ::-1]], axis=-2), 1)


def _inverse(above: Float[Array, "... W W"]) -> Float[Array, "... W W"]:
    """(1 + N)^-1 of strictly upper triangular N: (1 - N)(1 + N^2)(1 + N^4)..., which ends, for N^W = 0."""
    width = above.shape[-1]
    product = functools.partial(jnp.matmul, precision="highest")
    one = jnp.expand_dims(jnp.eye(width, dtype=jnp.float32), range(above.ndim - 2))
    inverse, power, reached = one - above, product(above, above), 2
    while reached < width:
        inverse, power, reached = product(inverse, one + power), product(power, power), 2 * reached
    return inverse


def decode(codes: Codes, group_size: int, group_axis: GroupAxis) -> Float[Array, "B K S H"]:
    """The numbers that codes stand for, float32."""
    axis = 2 if group_axis == "tokens" else 3
    scale, zero = (jnp.repeat(x.astype(jnp.float32), group_size, axis=axis) for x in (codes.scale, codes.zero))
    return codes.codes.astype(jnp.float32) * scale + zero


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
