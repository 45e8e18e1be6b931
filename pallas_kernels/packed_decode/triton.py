"""Packed decode attention on CUDA GPUs from Ampere on, in Triton through jax-triton.

Why. One new token reads the whole cache, so decode lasts as long as moving the cache takes. Two-bit codes with float16
metadata in groups of 32 tokens are 2.6 bits a number: a sixth of bfloat16. To keep that sixth, unpacking must hide
behind the loads, and a dequantised number must never exist outside a register.

How a code becomes a number: it does not. `word & 0x00030003` leaves one code in each half of a word, and such a half
*is* a float16: the subnormal code * 2^-24. The next plane's mask gives code * 2^-22, and so on. Tensor cores multiply
subnormals exactly and at full rate, so one AND prepares two operands, the power of two is taken back in float32 once a
sum, and scales are folded into the small operand,

    query . key = sum_c (query_c scale_c) code_c + query . zero          one product per group of tokens and channel
    sum_t p_t value_t = sum_t (p_t scale_t) code_t + sum_t p_t zero_t    one product per token and group of channels

and both zero-point terms are rows of a further small product.

How a warp sees a block of 128 tokens (lane = 4 g + t, P = 32 byte rows of 2-bit codes):

    keys [P, H]: codes are the left operand      values [H, P]: codes are the left operand

        channels, 16 bytes a lane                     tokens, 8 bytes a lane
         t=0    t=1    t=2    t=3                      t=0      t=1      t=2      t=3
    g   +------+------+------+------+             g   +--------+--------+--------+--------+
    row |c0..15|      |      |      |   . q^T     chan|r0 .. 7 |8 .. 15 |        |        |   . p
        +------+------+------+------+             nel +--------+--------+--------+--------+
        -> logits [16 tokens, 8 queries]               -> output [16 channels, 8 queries]

A contraction may run in any order, so bytes 0 and 1 of a word are one operand register, bytes 2 and 3 the other, and no
code is ever shuffled. Queries are the eight columns of `mma.m16n8k16` (heads that share keys, times new tokens; more
than eight take further programs). Logits leave the first product transposed to what the second needs: `movmatrix` turns
an 8 x 8 tile in one instruction, and the rows of a key tile are picked so that it lands on the lane holding those
tokens' value codes. Float16 probabilities are kept as 2^15 p, less where value scales are large, which is one more term
of the softmax's reference.

One warp is one program and walks over its share of a sequence's blocks; `cp.async` fetches the next block's keys while
this block's values are in work and the other way round. A second small kernel joins the shares.

The limit (H100, 2 bits, groups of 32, H = 128). A block is 10.5 KiB, so copy bandwidth, 2.76 TB/s, grants each of the
528 processor quarters one every 2.06 us. It takes about 1400 issued instructions (512 AND, 128 PRMT, 144 MMA): 0.8 us.
Memory is the limit, as long as enough of it is in flight: eight to twelve warps a processor, hence the cap at 168
registers. In `ncu` the first kernel reaches 77 % of the memory's peak at 40 % of the issue slots and 23 % of the tensor
cores; what stalls is waiting for copies. With fp8 metadata and three-bit keys the issue slots come nearer: 5 to 7
instructions make a pair of scales, a third bit costs one more LOP3 an operand.

Small problems (one sequence of 32768 tokens: 17.6 us of kernels) end up at the host: a trace shows 30 us before each
launch of the first kernel and 10 before the second, so a chain of nothing but such calls runs at the host's pace. In a
decode step the host runs ahead while the model's products keep the device busy.
"""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.packed_decode.layout import PackedTensor
from pallas_kernels.partial import Partial

_KINDS = {"float16": 0, "bfloat16": 1, "float8_e4m3fn": 2}
REGISTERS = 168  # twelve warps a processor; a handful of spills


def decline(query: Float[Array, "B T N H"], keys: PackedTensor, values: PackedTensor, scale: float) -> str | None:
    """Why these arguments cannot run here; None when they can."""
    h = query.shape[-1]
    if h not in (64, 128):
        return f"head size {h}: 64 and 128 run"
    if keys.bits not in (2, 3, 4, 8) or values.bits not in (2, 4, 8):
        return f"{keys.bits}-bit keys and {values.bits}-bit values: keys of 2, 3, 4, 8 and values of 2, 4, 8 bits run"
    if keys.tokens_last or not values.tokens_last:
        return "keys must have channels last and values tokens last"
    if keys.group_axis != "tokens" or keys.group_size not in (16, 32, 64, 128):
        return f"keys in groups of {keys.group_size} {keys.group_axis}: 16, 32, 64 or 128 tokens run"
    if values.group_axis != "channels" or values.group_size not in (16, 32, 64, 128) or values.group_size > h:
        return f"values in groups of {values.group_size} {values.group_axis}: 16, 32, 64 ... H channels run"
    for x in (keys, values):
        if x.scale.dtype.name not in _KINDS or x.zero.dtype != x.scale.dtype:
            return f"scale {x.scale.dtype} and zero {x.zero.dtype}: float16, bfloat16 and float8_e4m3fn run"
    if keys.capacity == 0:
        return "a segment without blocks"
    if scale <= 0:
        return f"scale {scale} is not positive"
    return None


def _bytes(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint8) if x.dtype == jnp.float8_e4m3fn else x


def constants(keys: PackedTensor, values: PackedTensor) -> dict:
    """The kernel's compile-time numbers: one program per quantisation format, whatever the sizes."""
    return dict(
        KBITS=keys.bits,
        KGROUP=keys.group_size,
        KKIND=_KINDS[keys.scale.dtype.name],
        VBITS=values.bits,
        VGROUP=values.group_size,
        VKIND=_KINDS[values.scale.dtype.name],
        H=keys.head_size,
        REGISTERS=REGISTERS,
    )


def attend(
    query: Float[Array, "B T N H"],
    keys: PackedTensor,
    values: PackedTensor,
    lengths: Int[Array, "B K"],
    *,
    scale: float,
    splits: int,
) -> Partial:
    """The two launches: `splits` programs a head and eight query rows, then their merge."""
    import jax_triton

    from pallas_kernels.packed_decode import _triton_kernels as kernels

    b, t, n, h = query.shape
    heads, blocks = keys.codes.shape[1:3]
    group = n // heads
    rows = t * group
    lengths = lengths.astype(jnp.int32)
    part, stats = jax_triton.triton_call(
        query,
        keys.codes,
        _bytes(keys.scale),
        _bytes(keys.zero),
        values.codes,
        _bytes(values.scale),
        _bytes(values.zero),
        lengths,
        np.float32(scale),
        *(-size for size in (blocks, heads, group, rows, splits)),
        kernel=kernels.decode_kernel,
        out_shape=[
            jax.ShapeDtypeStruct((b * heads, splits, rows, h), jnp.float32),
            jax.ShapeDtypeStruct((b * heads, splits, rows, 2), jnp.float32),
        ],
        grid=(-(-rows // 8), splits, b * heads),
        num_warps=1,
        **constants(keys, values),
    )
    padded = 1 << (splits - 1).bit_length()
    width = min(h, max(32, 1024 // padded))
    output, maximum, total = jax_triton.triton_call(
        part,
        stats,
        lengths,
        *(-size for size in (heads, group, rows, splits)),
        kernel=kernels.merge_kernel,
        out_shape=[
            jax.ShapeDtypeStruct((b, t, n, h), jnp.float32),
            jax.ShapeDtypeStruct((b, t, n), jnp.float32),
            jax.ShapeDtypeStruct((b, t, n), jnp.float32),
        ],
        grid=(b * heads * rows, h // width),
        num_warps=min(max(padded * width // 1024, 1), 8),
        PADDED=padded,
        H=h,
        WIDTH=width,
    )
    return Partial(output, maximum, total)


def choose_splits(work: int, blocks: int, processors: int) -> int:
    """Shares of a sequence, for `work` pairs of a head and a row tile.

    One wave of programs, about eight a processor: more cost merging and start-up, fewer leave memory idle. Measured.
    """
    splits = 8 * processors // work
    if splits * work < 6 * processors and (splits + 1) * work <= 12 * processors:
        splits += 1
    return max(1, min(splits, blocks, 256))


def packed_decode_attention(
    query: Float[Array, "B T N H"],
    keys: PackedTensor,
    values: PackedTensor,
    lengths: Int[Array, "B K"],
    *,
    scale: float,
) -> Partial:
    reason = decline(query, keys, values, scale)
    if reason is None and jax.default_backend() != "gpu":
        reason = f"needs a CUDA GPU, this is {jax.default_backend()}"
    if reason is None and importlib.util.find_spec("jax_triton") is None:
        reason = "needs the package jax-triton"
    if reason is not None:
        raise NotImplementedError(reason)
    heads, blocks = keys.codes.shape[1:3]
    rows = query.shape[1] * (query.shape[2] // heads)
    processors = getattr(jax.devices()[0], "core_count", 132)
    splits = choose_splits(query.shape[0] * heads * -(-rows // 8), blocks, processors)
    return attend(query, keys, values, lengths, scale=scale, splits=splits)
