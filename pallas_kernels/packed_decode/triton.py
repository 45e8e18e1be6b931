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

Masks are what a block costs most, so there are fewer than planes. With M_k for the codes of planes 0 ... k, which takes
one AND, or none for all of them, codes of plane k are (M_k - M_k-1) / 4^k. For values that difference moves to the
small operand, for keys (below) to the logits.

A contraction may run in any order, so bytes 0 and 1 of a word are one operand register, bytes 2 and 3 the other, and no
code is ever shuffled. Queries are the eight columns of `mma.m16n8k16` (heads that share keys, times new tokens; more
than eight take further programs). Logits leave the first product transposed to what the second needs: `movmatrix` turns
an 8 x 8 tile in one instruction, and the rows of a key tile are picked so that it lands on the lane holding those
tokens' value codes. Float16 probabilities are kept as 2^15 p, less where value scales are large, which is one more term
of the softmax's reference.

Up to four query rows (a token of most models) would leave half of the columns empty. Where scales cover half a block or
more, columns 4 ... 7 are the same queries again ("twins"): columns 0 ... 3 take the scales and later the tokens of a
block's lower half, the others those of its upper half. Both halves of the products come out of one instruction, a lane
has half as many logits, scales and exponentials to look after, and the two are two shares of a softmax, merged once at
the end.

One warp is one program and walks over its share of a sequence's blocks; `cp.async` fetches the next block's keys while
this block's values are in work and the other way round. A second small kernel joins the shares.

The limit (H100, 2 bits, groups of 32, H = 128). A block is 10.5 KiB, so copy bandwidth, 2.76 TB/s, grants each of the
528 processor quarters one every 2.06 us. It takes about 1400 issued instructions (512 AND, 128 PRMT, 144 MMA): 0.8 us.
Memory is the limit, as long as enough of it is in flight: eight to ten warps a processor, hence the cap at 200
registers (168, with a handful of spills, costs 1 to 3 %, and 10 % with four bits). In `ncu` the kernel reaches 77 % of
the memory's peak at 40 % of the issue slots and 23 % of the tensor cores; what stalls is waiting for copies. With
three-bit keys the issue slots come nearer: a third bit costs one more LOP3 an operand, and only values can be nested.
Float8 metadata are one instruction a pair from Ada on, and about 7 before. On an H200, whose memory is a third faster,
instructions are the limit of small formats: two bits with float8 metadata in groups of 64, four rows, took 58.8 us a
layer in a step of 8 x 32768 tokens, 1460 instructions a block, and take 45.7 since twins and nested masks, 1140 a
block, where copying as many bytes takes 42 (`minikv bench e2e`, `examples/results/e2e-h200.json`; instructions counted
in the machine code). More warps of fewer registers and other numbers of shares were slower.

A dense segment is an ordinary flash decode: `mma` over tiles of 64 tokens, four stages of `cp.async`, as many shares as
fill the processors, and cuDNN's time or up to a tenth more. A call joins the shares of up to two segments in one more
launch. The dense window behind a packed segment has no launch of its own: some more warps of the packed one take 32 of
its tokens each (`_triton_window.py`), in time that memory has anyway, where a launch takes 4 us. Small problems (one
sequence of 32768 tokens: 15.5 us, the join included) live on launches that do not wait for the host: see
`triton_call.py`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import triton_call
from pallas_kernels.hadamard import rotate_back
from pallas_kernels.packed_decode.layout import BLOCK, PackedTensor
from pallas_kernels.partial import Partial, merge_partials

KINDS = {"float16": 0, "bfloat16": 1, "float8_e4m3fn": 2}  # of metadata; float8 is 3 on a chip that does not know it
WINDOW = 512  # rows up to which a dense segment goes into a packed one's launch
DENSE_TOKENS = 64  # of one step of the dense kernel; half as many where a row is a kilobyte
REGISTERS = 200  # ten warps a processor


def decline_format(keys: PackedTensor, values: PackedTensor) -> str | None:
    """Why no Triton kernel, be it of decoding or of appending, can run on this storage; None when they can."""
    h = values.head_size
    if h not in (64, 128):
        return f"head size {h}: 64 and 128 run"
    if keys.head_size != h:
        return f"keys of {keys.head_size} channels beside values of {h}: they run as wide as values"
    if keys.bits not in (2, 3, 4, 8) or values.bits not in (2, 4, 8):
        return f"{keys.bits}-bit keys and {values.bits}-bit values: keys of 2, 3, 4, 8 and values of 2, 4, 8 bits run"
    if keys.tokens_last or not values.tokens_last:
        return "keys must have channels last and values tokens last"
    largest = 128 if keys.group_axis == "tokens" else h
    if keys.group_size not in (16, 32, 64, 128) or keys.group_size > largest:
        return f"keys in groups of {keys.group_size} {keys.group_axis}: 16, 32, 64, 128 tokens or 16 ... H channels run"
    if values.group_axis != "channels" or values.group_size not in (16, 32, 64, 128) or values.group_size > h:
        return f"values in groups of {values.group_size} {values.group_axis}: 16, 32, 64 ... H channels run"
    for x in (keys, values):
        if x.scale.dtype.name not in KINDS or x.zero.dtype != x.scale.dtype:
            return f"scale {x.scale.dtype} and zero {x.zero.dtype}: float16, bfloat16 and float8_e4m3fn run"
    return None


def decline(keys: PackedTensor, values: PackedTensor, scale: float) -> str | None:
    """Why these arguments cannot run here; None when they can."""
    if keys.capacity == 0:
        return "a segment without blocks"
    if scale <= 0:
        return f"scale {scale} is not positive"
    return decline_format(keys, values)


def decline_dense(key: Float[Array, "B K S C"], value: Float[Array, "B K S H"]) -> str | None:
    """As `decline`, for dense keys."""
    width, head_size = key.shape[-1], value.shape[-1]
    if head_size not in (64, 128, 256):
        return f"head size {head_size}: 64, 128 and 256 run"
    if width % 8 or width > head_size:
        return f"keys of {width} channels: a multiple of 8 runs, up to the values' {head_size}"
    if key.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"keys of {key.dtype}: bfloat16, float16 and float32 run"
    if key.shape[2] == 0:
        return "a segment without rows"
    return None


def knows_float8() -> bool:
    """Whether the chip has instructions for float8_e4m3fn, and Triton for the chip."""
    return float(getattr(jax.devices()[0], "compute_capability", "0.0")) >= 8.9


def kinds(float8: bool) -> dict[str, int]:
    """`KINDS`, as the kernels know them, of a chip with or without float8_e4m3fn."""
    return KINDS if float8 else KINDS | {"float8_e4m3fn": 3}


def _bytes(x: Array) -> Array:
    """Metadata as the kernel may be given them; XLA copies to make bytes."""
    if x.dtype != jnp.float8_e4m3fn or knows_float8():
        return x
    return jax.lax.bitcast_convert_type(x, jnp.uint8)


def constants(keys: PackedTensor, values: PackedTensor, rows: int, float8: bool) -> dict:
    """The kernel's compile-time numbers: two programs per quantisation format, whatever the sizes.

    Args:
        rows: query rows of a key/value head; up to four meet the two halves of a block side by side (TWIN).
        float8: whether the chip knows float8_e4m3fn.
    """
    kind = kinds(float8)
    halves = keys.group_axis == "tokens" and min(keys.group_size, values.group_size) >= 64
    return dict(
        KBITS=keys.bits,
        KGROUP=keys.group_size,
        KAXIS=int(keys.group_axis == "channels"),
        KKIND=kind[keys.scale.dtype.name],
        VBITS=values.bits,
        VGROUP=values.group_size,
        VKIND=kind[values.scale.dtype.name],
        H=keys.head_size,
        REGISTERS=REGISTERS,
        TWIN=rows <= 4 and halves and max(keys.bits, values.bits) <= 4,
    )


class Shares(NamedTuple):
    """What the shares of one segment answer, in base 2, before their merge.

    Attributes:
        part: float32 [B K, splits, rows, H], unnormalised outputs; rows are the T G queries of a key/value head.
        stats: float32 [B K, splits, rows, 2], maxima and sums.
        logits: float32 [B K, rows, capacity] where asked for; rubbish beyond the tokens held.
    """

    part: Float[Array, "BK splits rows H"]
    stats: Float[Array, "BK splits rows 2"]
    logits: Float[Array, "BK rows S"]


def _launch(kernel, *args, heads: int, rows: int, head_size: int, capacity: int, tile: int, splits: int,
            return_logits: bool, flat: bool = False, **options) -> Shares:  # fmt: skip
    """Runs a kernel over (row tiles, splits, B K); sizes behind `args` arrive negated, see `decode_kernel`."""
    logits = (heads, rows, capacity) if return_logits else (1,)
    shapes = (heads, splits, rows, head_size), (heads, splits, rows, 2), logits
    return Shares(
        *triton_call.call(
            *args,
            kernel=kernel,
            out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
            grid=(-(-rows // tile), splits * heads) if flat else (-(-rows // tile), splits, heads),
            LOGITS=return_logits,
            **options,
        )
    )


class Window(NamedTuple):
    """A dense segment of a few rows that a packed segment's launch takes along."""

    query: Float[Array, "B T N H"]
    key: Float[Array, "B K S H"]
    value: Float[Array, "B K S H"]
    lengths: Int[Array, "B"]


def attend_packed(
    query: Float[Array, "B T N H"],
    keys: PackedTensor,
    values: PackedTensor,
    lengths: Int[Array, "B"] | Int[Array, "B K"],
    *,
    scale: float,
    splits: int,
    return_logits: bool = False,
    window: Window | None = None,
    window_splits: int = 0,
) -> Shares:
    """`splits` programs for each key/value head and eight query rows, and `window_splits` for the window."""
    from pallas_kernels.packed_decode import _triton_kernels as kernels

    b, t, n, h = query.shape
    heads, blocks = keys.codes.shape[1:3]
    rows = t * (n // heads)
    lengths = lengths.astype(jnp.int32)
    # Without a window the kernel is given, and leaves alone, what lies at hand.
    dense = (query, query, query, lengths) if window is None else (*window[:3], window.lengths.astype(jnp.int32))
    kind = 0 if window is None else {"float16": 1, "bfloat16": 2}[window.key.dtype.name]
    rows_of_window = 0 if window is None else window.key.shape[2]
    return _launch(
        kernels.decode_kernel,
        query,
        keys.codes,
        _bytes(keys.scale),
        _bytes(keys.zero),
        values.codes,
        _bytes(values.scale),
        _bytes(values.zero),
        lengths,
        *dense,
        np.float32(scale),
        *(-size for size in (blocks, heads, n // heads, rows, splits, rows_of_window, window_splits, b * heads)),
        heads=b * heads,
        rows=rows,
        head_size=h,
        capacity=blocks * BLOCK,
        tile=8,
        splits=splits + window_splits,
        return_logits=return_logits,
        flat=True,
        num_warps=1,
        PER_HEAD=lengths.ndim == 2,
        WINDOW=kind,
        **constants(keys, values, rows, knows_float8()),
    )


def attend_dense(
    query: Float[Array, "B T N C"],
    key: Float[Array, "B K S C"],
    value: Float[Array, "B K S H"],
    lengths: Int[Array, "..."],
    *,
    scale: float,
    splits: int,
    return_logits: bool = False,
    tokens: int,
) -> Shares:
    """`splits` programs for each key/value head and 16 query rows."""
    from pallas_kernels.packed_decode import _triton_dense as kernels

    b, t, n, width = query.shape
    heads, capacity, h = value.shape[1:]
    rows = t * (n // heads)
    lengths = longest = lengths.astype(jnp.int32)
    if lengths.ndim > 1:
        lengths = jnp.broadcast_to(lengths.reshape(b, t, -1), (b, t, heads))
        longest = lengths.max(axis=1)
    # Keys and values of a step, in shared memory once for every stage but one.
    step_bytes = tokens * (width + h) * key.dtype.itemsize
    return _launch(
        kernels.dense_kernel,
        query,
        key,
        value,
        lengths,
        longest,
        np.float32(scale),
        *(-size for size in (capacity, heads, n // heads, rows, splits)),
        heads=b * heads,
        rows=rows,
        head_size=h,
        capacity=capacity,
        tile=16,
        splits=splits,
        return_logits=return_logits,
        num_warps=4,
        num_stages=max(2, min(4, (128 << 10) // step_bytes)),
        H=h,
        KEY=width,
        KEYS=max(_power_of_two(width), 16),
        ROWS=16,
        TOKENS=tokens,
        PER_QUERY=lengths.ndim > 1,
        PRECISION="ieee" if key.dtype == jnp.float32 else "tf32",
    )


def _power_of_two(x: int) -> int:
    """The smallest that is not below x."""
    return 1 << (x - 1).bit_length()


def _merge(
    query: Float[Array, "B T N C"],
    heads: int,
    first: Shares,
    second: Shares | None,
    normalize: bool,
    unit: Float[Array, "B K"] | None = None,
    balance: Float[Array, "B K H"] | None = None,
):
    """One launch: with `normalize` output (query's dtype) and log-sum-exp, else the arrays of a `Partial`. With `unit`
    the output is rotated, and times it; with `balance` then divided by that."""
    from pallas_kernels.packed_decode import _triton_dense as kernels

    b, t, n, _ = query.shape
    h = first.part.shape[-1]
    rows = t * (n // heads)
    other = first if second is None else second
    splits, other_splits = (x.part.shape[1] for x in (first, other))
    padded, joined = _power_of_two(splits), 0 if second is None else _power_of_two(other_splits)
    # A rotation needs all channels; else programs of a few keep more loads in flight.
    width = h if unit is not None else min(h, max(32, 1024 // max(padded, joined)))
    shapes = [((b, t, n, h), query.dtype if normalize else jnp.float32), ((b, t, n), jnp.float32)]
    shapes.append(((1,) if normalize else (b, t, n), jnp.float32))
    return triton_call.call(
        first.part,
        first.stats,
        other.part,
        other.stats,
        *(first.stats if x is None else x for x in (unit, balance)),
        *(-size for size in (heads, n // heads, rows, splits, other_splits)),
        kernel=kernels.merge_kernel,
        out_shape=[jax.ShapeDtypeStruct(*x) for x in shapes],
        grid=(b * heads * rows, h // width),
        # As few as have registers for all: what takes time is waiting for one another.
        num_warps=min(max((padded + joined) * width // 4096, 1), 8),
        PADDED=padded,
        OTHER=joined,
        H=h,
        WIDTH=width,
        NORMALIZE=normalize,
        ROTATE=unit is not None,
        BALANCED=balance is not None,
    )


def _natural(shares: Shares, query: Float[Array, "B T N H"], heads: int) -> Float[Array, "B T N S"]:
    """Logits as the caller knows them."""
    b, t, n, _ = query.shape
    x = shares.logits.reshape(b, heads, t, n // heads, -1)
    return jnp.swapaxes(x, 1, 2).reshape(b, t, n, -1) * math.log(2)


def choose_splits(work: int, blocks: int, processors: int) -> int:
    """Shares of a sequence, for `work` pairs of a head and a row tile.

    One wave of programs, about eight a processor: more cost merging and start-up, fewer leave memory idle. Measured.
    """
    splits = 8 * processors // work
    if splits * work < 6 * processors and (splits + 1) * work <= 12 * processors:
        splits += 1
    return max(1, min(splits, blocks, 256))


def choose_dense_splits(work: int, tiles: int, processors: int) -> int:
    """As `choose_splits`, for programs of four warps: two run on a processor, and as many follow."""
    return max(1, min(-(-4 * processors // work), tiles, 256))


def choose_window_splits(work: int, splits: int, tokens: int, processors: int) -> int:
    """Programs for a window of `tokens` beside `splits` packed ones: what else the processors hold, 32 tokens each.

    A few less, if with those all shares were just too many for a power of two, which the join makes of them.
    """
    most = max(1, min((10 * processors - splits * work) // work, -(-tokens // 32)))
    room = _power_of_two(splits) - splits
    return room if most <= 2 * room < 2 * most else most


def _processors() -> int:
    return getattr(jax.devices()[0], "core_count", 132)


def _shares(query, keys, values, lengths, scale: float, return_logits: bool, window: Window | None = None) -> Shares:
    """One segment, packed (perhaps with its window) or dense, by as many programs as suit it."""
    b, t, n, _ = query.shape
    if isinstance(keys, PackedTensor):
        heads, blocks = keys.codes.shape[1:3]
        work = b * heads * -(-t * (n // heads) // 8)
        splits = choose_splits(work, blocks, _processors())
        beside = 0 if window is None else choose_window_splits(work, splits, window.key.shape[2], _processors())
        return attend_packed(
            query, keys, values, lengths, scale=scale, splits=splits, return_logits=return_logits, window=window,
            window_splits=beside,
        )  # fmt: skip
    heads, capacity = keys.shape[1:3]
    tokens = DENSE_TOKENS if keys.shape[-1] * keys.dtype.itemsize < 1024 else DENSE_TOKENS // 2
    splits = choose_dense_splits(b * heads * -(-t * (n // heads) // 16), -(-capacity // tokens), _processors())
    return attend_dense(
        query, keys, values, lengths, scale=scale, splits=splits, return_logits=return_logits, tokens=tokens
    )


def _as_window(part: Sequence) -> Window | None:
    """The segment, if it may go into a packed one's launch: a few rows in the queries' 16 bits, seen by all queries."""
    query, keys, values, lengths = part
    if isinstance(keys, PackedTensor) or lengths.ndim > 1 or keys.shape[2] > WINDOW:
        return None
    if keys.dtype != query.dtype or keys.dtype not in (jnp.bfloat16, jnp.float16) or keys.shape != values.shape:
        return None
    return Window(query, keys, values, lengths)


def _require(reason: str | None) -> None:
    reason = reason or triton_call.decline()
    if reason is not None:
        raise NotImplementedError(reason)


def _partial(query, keys, values, lengths, scale: float, return_logits: bool):
    heads = (keys.codes if isinstance(keys, PackedTensor) else keys).shape[1]
    shares = _shares(query, keys, values, lengths, scale, return_logits)
    partial = Partial(*_merge(query, heads, shares, None, normalize=False))
    return (partial, _natural(shares, query, heads)) if return_logits else partial


def packed_decode_attention(query, keys, values, lengths, *, scale: float, return_logits: bool):
    """`api.packed_decode_attention` in two launches."""
    _require(decline(keys, values, scale))
    return _partial(query, keys, values, lengths, scale, return_logits)


def dense_decode_attention(query, key, value, lengths, *, scale: float, return_logits: bool):
    """`api.dense_decode_attention` in two launches."""
    _require(decline_dense(key, value))
    return _partial(query, key, value, lengths, scale, return_logits)


def decode_attention(
    parts: Sequence,
    *,
    scale: float,
    return_logits: bool,
    rotated: Float[Array, "B K"] | None,
    balanced: Float[Array, "B K H"] | None,
):
    """`api.decode_attention` over one or two segments, and perhaps a window behind: a launch for each segment, the
    window in that of the codes before it, and one that joins their shares. More segments, as two with float32 windows,
    are joined by XLA."""
    behind = _as_window(parts[-1]) if len(parts) > 1 and isinstance(parts[-2][1], PackedTensor) else None
    segments = parts if behind is None else parts[:-1]
    for _, keys, values, _ in parts:
        packed = isinstance(keys, PackedTensor)
        _require(decline(keys, values, scale) if packed else decline_dense(keys, values))
    query, keys = parts[0][:2]
    if len(segments) > 2:
        found = [_partial(*part, scale, return_logits and i == 0) for i, part in enumerate(parts)]
        first, *logits = found[0] if return_logits else (found[0],)
        output, lse = merge_partials([first, *found[1:]])
        output = output.astype(query.dtype)
        return output if rotated is None else rotate_back(output, rotated, balanced), lse, *logits
    heads = (keys.codes if isinstance(keys, PackedTensor) else keys).shape[1]
    windows = [None] * (len(segments) - 1) + [behind]
    shares = [
        _shares(*segment, scale, return_logits and i == 0, window)
        for i, (segment, window) in enumerate(zip(segments, windows))
    ]
    second = shares[1] if len(shares) == 2 else None
    output, lse, _ = _merge(query, heads, shares[0], second, normalize=True, unit=rotated, balance=balanced)
    return (output, lse, _natural(shares[0], query, heads)) if return_logits else (output, lse)
