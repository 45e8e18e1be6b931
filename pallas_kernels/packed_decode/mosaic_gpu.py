"""Packed decode attention on Hopper in Pallas Mosaic GPU: the formulation of `triton.py` on `wgmma`.

What is the same: a masked word *is* a float16, the subnormal code * 4^plane * 2^-24; scales and zero points are folded
into the small operand, and the power of two is taken back in float32. What differs: one warpgroup, not one warp, walks
over a share of a sequence, the tensor core takes codes from registers and queries and probabilities from shared memory,
and TMA brings whole tiles.

How a warpgroup sees a unit of four blocks (512 tokens, 2 bits, P = 32). Words are pairs of bytes: two channels of a
key, two tokens of a value. A tile of logits has one parity of bytes, so that the tokens of a value's low (or high)
bytes are 16 rows of one tile:

    keys: 2 parities x 4 planes                          values: 4 blocks x 2 halves of the head

      rows 16 b + c: token 32 plane + 2 c + parity         channels     words 0 .. 15 of block b: tokens
      of block b                                           64           32 plane + 2 c, and + 1 in the high byte
      +----------------+                                   +--------+
      | block 0        |   . [64 words, 16]                |        |   . [16 tokens, 16]
      | block 1        |   low bytes, then high            |        |   rows 16 b .. 16 b + 15 of the
      | block 2        |   bytes, then zero points         |        |   tile (plane, parity)
      | block 3        |                                   |        |
      +----------------+ -> logits [64, 16]                +--------+ -> output [64, 16]

A scale belongs to a block and a channel, but the right operand is one for all 64 rows. So its 16 columns are 4 blocks x
4 query rows, each block's columns scaled by its own scales, and of a tile of logits only the four columns of a row's
own block count; the others become probability 0. Sixteen is the least that Mosaic lays out for `wgmma` anyway. Each
column keeps a maximum and a sum of its own, and the columns of a query row are joined with the shares of the sequence,
in XLA.

The limit (H100, groups of 32 tokens, one group of values a token). A unit is 42 KiB, and a processor's share of the
copy bandwidth (2.76 TB/s) brings it in 3600 cycles. Counted, not measured: a code costs half an AND, and 1/16 of a
shift for the high bytes; with 4 x 64 x 16 scaled queries and as many zero points, a thread's 64 exponentials, sums and
stores of probabilities a unit takes about 1700 instructions a warp. The tensor core multiplies 160 tiles of 64 x 16 x
16, 1280 cycles at its full rate. Memory is the limit as long as waits overlap: a program has one buffer for keys and
one for values, which it refills as soon as a unit's are read, two programs or three share a processor, and two tiles
of logits are multiplied at a time.

Measured there (`minikv bench decode`): 8 x 32k tokens in 197 us, a third of the copy bandwidth and 1.8 times as fast as
cuDNN over bfloat16, and 44 us for one sequence; Triton's kernel takes 68 and 16. What it waits for has not been
profiled. A unit of 512 tokens is too coarse a share of one sequence, and compiling takes five times as long. So
`triton` goes first.

More than four query rows of a head take further programs, which unpack the same codes again.
"""

import dataclasses
import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm
from jaxtyping import Array, Float, Int

from pallas_kernels import mosaic
from pallas_kernels.packed_decode.layout import BLOCK, PackedTensor
from pallas_kernels.partial import Partial

_UNIT = 4  # blocks
_SLOTS = 4  # query rows of a program
_COLUMNS = _UNIT * _SLOTS
_PLANES = 4
_HEAD = 128
_WORDS = _HEAD // 2
_TALL = (64, _COLUMNS)
_PROCESSORS = 132


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a program runs.

    Attributes:
        stages: units of keys, and of values, that are loaded or on their way.
        programs: how many a processor gets, by which sequences are split.
        in_flight: tiles of logits that are multiplied at a time.
    """

    stages: int = 1
    programs: int = 4
    in_flight: int = 2


def decline(query: Float[Array, "B T N H"], keys: PackedTensor, values: PackedTensor, scale: float) -> str | None:
    """Why these arguments cannot run; None when they can."""
    if values.head_size != _HEAD:
        return f"head size {values.head_size}: {_HEAD} runs"
    if keys.head_size != _HEAD:
        return f"keys of {keys.head_size} channels beside values of {_HEAD}: they run as wide as values"
    if keys.bits != 2 or values.bits != 2:
        return f"{keys.bits}-bit keys and {values.bits}-bit values: 2 bits run"
    if keys.tokens_last or not values.tokens_last:
        return "keys must have channels last and values tokens last"
    if keys.group_axis != "tokens" or keys.group_size not in (32, 64, 128):
        return f"keys in groups of {keys.group_size} {keys.group_axis}: 32, 64 and 128 tokens run"
    if values.group_axis != "channels" or values.group_size not in (64, 128):
        return f"values in groups of {values.group_size} {values.group_axis}: 64 and 128 channels run"
    for x in (keys, values):
        if x.scale.dtype not in (jnp.float16, jnp.bfloat16) or x.zero.dtype != x.scale.dtype:
            return f"scale {x.scale.dtype} and zero {x.zero.dtype}: float16 and bfloat16 run"
    if 0 in query.shape or keys.capacity == 0:
        return "needs at least one query and one block"
    if not scale > 0:
        return f"scale {scale} is not positive"
    return None


def _wide(x, shape: tuple[int, int], axis: int) -> jax.Array:
    return lax.broadcast_in_dim(x, shape, [axis])


def _words(x: Array, dtype, shape: tuple[int, ...]) -> Array:
    """The same bytes as wider integers, of the given shape."""
    size = jnp.dtype(dtype).itemsize // x.dtype.itemsize
    return lax.bitcast_convert_type(x.reshape(*x.shape[:-1], -1, size), dtype).reshape(shape)


def _number(word: jax.Array, high: bool, metadata) -> jax.Array:
    """The lower or upper half of a 32-bit word: float16 from float16, float32 from bfloat16."""
    if metadata == jnp.bfloat16:
        bits = word & jnp.uint32(0xFFFF0000) if high else lax.shift_left(word, jnp.uint32(16))
        return lax.bitcast_convert_type(bits, jnp.float32)
    half = lax.shift_right_logical(word, jnp.uint32(16)) if high else word & jnp.uint32(0xFFFF)
    return lax.bitcast_convert_type(half.astype(jnp.uint16), jnp.float16)


def _codes(words: jax.Array, plane: int) -> jax.Array:
    """Low bytes' codes of a plane as float16: code * 4^plane * 2^-24."""
    return lax.bitcast_convert_type(words & jnp.uint16(3 << (2 * plane)), jnp.float16)


def _high_bytes(words: jax.Array, interpret) -> jax.Array:
    """Words whose low bytes are the given words' high bytes; what is above them differs.

    A shift of two 16-bit numbers takes five instructions, of the 32-bit register that holds them one.
    """
    if interpret:
        return lax.shift_right_logical(words, jnp.uint16(8))

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA,),
        return_type=plgpu.ShapeDtypeStruct(words.shape, words.dtype, layout=plgpu.Layout.WGMMA),
    )
    def shifted(_, array):
        registers = array.registers.copy()
        pair, word = registers.flat[0].type, ir.IntegerType.get_signless(32)
        for i, register in enumerate(array.registers.flat):
            x = arith.shrui(llvm.bitcast(word, register), arith.constant(word, 8))
            registers.flat[i] = llvm.bitcast(pair, x)
        return type(array)(_registers=registers, _layout=array.layout, _is_signed=array.is_signed)

    return shifted(words)


# Lowering takes seconds: calls outside of a program share theirs.
@functools.partial(jax.jit, static_argnames=("splits", "blocks", "interpret"))
def _attend(query, factor, keys: PackedTensor, values: PackedTensor, lengths, *, splits: int, blocks: Blocks,
            interpret=None):  # fmt: skip
    """The shares of every sequence.

    Args:
        query: float16 [B K tiles, 2 masks, 2 parities, 64 words, 8], channels 2 w + parity of query row (column % 4);
            columns 4 .. 7 of mask 0 and columns 0 .. 3 of mask 1 are zero.
        factor: float32 [B K tiles, 16] from sums to logits in base 2, without the 4^-plane.
        lengths: int32 [B K].

    Returns:
        Unnormalised outputs float32 [B K tiles, splits, 2, 64, 16] and maxima in base 2 and sums [B K tiles, splits, 2,
        16]; column 4 b + r is query row r over the blocks 4 i + b.
    """
    b, heads, capacity = keys.codes.shape[:3]
    programs = query.shape[0]
    tiles = programs // (b * heads)
    groups, spans = values.head_size // values.group_size, BLOCK // keys.group_size
    stages = blocks.stages
    all_blocks = b * heads * capacity

    kc = _words(keys.codes, jnp.uint16, (all_blocks * 16, 2 * _WORDS))
    ks, kz = (_words(x, jnp.uint32, (all_blocks * spans, _WORDS)) for x in (keys.scale, keys.zero))
    vc = _words(values.codes, jnp.uint16, (all_blocks * _HEAD, 16))
    vs, vz = (_words(x, jnp.uint32, (all_blocks, groups, BLOCK // 2)) for x in (values.scale, values.zero))

    def kernel(*refs):
        inputs, (out_ref, stats_ref), scratch = refs[:9], refs[9:11], refs[11:]
        q_ref, factor_ref, kc_ref, ks_ref, kz_ref, vc_ref, vs_ref, vz_ref, lengths_ref = inputs
        (q_smem, factor_smem, kc_smem, ks_smem, kz_smem, vc_smem, vs_smem, vz_smem, right, stats_smem,
         a_smem, b_smem, q_bar, k_bar, v_bar) = scratch  # fmt: skip
        program, split = lax.axis_index("programs"), lax.axis_index("splits")
        head = lax.div(program, mosaic.integer(tiles))
        length = lengths_ref[head]
        units = mosaic.blocks_of(length, _UNIT * BLOCK)
        share = mosaic.blocks_of(units, splits)
        first = jnp.minimum(split * share, units)
        last = jnp.minimum(first + share, units)

        def fetch_keys(unit):
            slot, block = mosaic.slot_of(unit - first, stages), head * capacity + unit * _UNIT
            for parity in range(2):
                at = pl.ds(block * 16, _UNIT * 16), pl.ds(parity * _WORDS, _WORDS)
                plgpu.copy_gmem_to_smem(kc_ref.at[at], kc_smem.at[slot, parity], k_bar.at[slot])
            for ref, smem in ((ks_ref, ks_smem), (kz_ref, kz_smem)):
                at = pl.ds(block * spans, _UNIT * spans)
                plgpu.copy_gmem_to_smem(ref.at[at], smem.at[slot], k_bar.at[slot])

        def fetch_values(unit):
            slot, block = mosaic.slot_of(unit - first, stages), head * capacity + unit * _UNIT
            for i in range(_UNIT):
                at = pl.ds((block + i) * _HEAD, _HEAD)
                plgpu.copy_gmem_to_smem(vc_ref.at[at], vc_smem.at[slot, i], v_bar.at[slot])
            for ref, smem in ((vs_ref, vs_smem), (vz_ref, vz_smem)):
                for plane in range(_PLANES):
                    for group in range(groups):
                        at = pl.ds(block, _UNIT), group, pl.ds(16 * plane, 16)
                        to = smem.at[slot, plane * groups + group]
                        plgpu.copy_gmem_to_smem(ref.at[at], to, v_bar.at[slot])

        @pl.when(first < last)
        def _():
            for i in range(stages):

                @pl.when(first + i < last)
                def _(i=i):
                    fetch_keys(first + i)
                    fetch_values(first + i)

        plgpu.copy_gmem_to_smem(q_ref.at[program], q_smem, q_bar)
        plgpu.copy_gmem_to_smem(factor_ref.at[program], factor_smem, q_bar)
        plgpu.barrier_wait(q_bar)

        def nil():
            return plgpu.layout_cast(jnp.zeros(_TALL, jnp.float32), plgpu.Layout.WGMMA)

        def first_token(row):
            """Of plane 0 and the low bytes, within the unit."""
            return lax.div(row, mosaic.integer(16)) * BLOCK + lax.rem(row, mosaic.integer(16)) * 2

        row = plgpu.broadcasted_iota(jnp.int32, _TALL, 0, layout=plgpu.Layout.WGMMA)
        column = plgpu.broadcasted_iota(jnp.int32, _TALL, 1, layout=plgpu.Layout.WGMMA)
        own = lax.div(row, mosaic.integer(16)) == lax.div(column, mosaic.integer(_SLOTS))
        token = first_token(row)
        row_token = first_token(plgpu.broadcasted_iota(jnp.int32, (64,), 0, layout=mosaic.ROW_LAYOUT))

        def times(accumulator, a, b, i=0):
            """accumulator += a b, with a in registers; the interpreter cannot multiply those."""
            if not interpret:
                return plgpu.wgmma(accumulator, a, b)
            smem = a_smem if a.shape[1] == _WORDS else b_smem
            smem.at[i][...] = a
            plgpu.commit_smem()
            return plgpu.wgmma(accumulator, smem.at[i], b)

        def fold(slot, left):
            """Right operands of key products: per span of tokens, scaled queries of both parities and zero points."""
            q = [[plgpu.load(q_smem.at[mask, parity], layout=plgpu.Layout.WGMMA, optimized=False)
                  for parity in range(2)] for mask in range(2)]  # fmt: skip

            def halves(smem, span, block):
                word = plgpu.load(smem.at[slot, block * spans + span], layout=mosaic.ROW_LAYOUT)
                # Beyond the length it may hold NaN.
                held = block * BLOCK + span * keys.group_size < left
                word = word & jnp.where(held, jnp.uint32(0xFFFFFFFF), jnp.uint32(0))
                numbers = (_number(word, high, keys.scale.dtype).astype(jnp.float16) for high in (False, True))
                return tuple(_wide(x, (_WORDS, 8), 0) for x in numbers)

            def one_span(span, _):
                scaled, zeros = ([], []), []
                for half in range(2):
                    scale, zero = (
                        [halves(smem, span, 2 * half + mask) for mask in range(2)] for smem in (ks_smem, kz_smem)
                    )
                    for parity in range(2):
                        scaled[parity].append(q[0][parity] * scale[0][parity] + q[1][parity] * scale[1][parity])
                    parts = [q[mask][parity] * zero[mask][parity] for mask in range(2) for parity in range(2)]
                    zeros.append((parts[0] + parts[1]) + (parts[2] + parts[3]))
                for i, pieces in enumerate((*scaled, zeros)):
                    right.at[3 * span + i][...] = lax.concatenate(pieces, 1)

            lax.fori_loop(0, spans, one_span, None)

        def logits(slot, unit, left):
            """Sums of the 4 planes of both parities, in units of 4^plane 2^-24."""

            def start(accumulator, low, high, plane):
                one = jnp.full((64, _WORDS), 4.0**plane * 2.0**-24, jnp.float16)
                one = plgpu.layout_cast(one, plgpu.Layout.WGMMA)
                for i, a in enumerate((_codes(low, plane), _codes(high, plane), one)):
                    times(accumulator, a, right.at[3 * (plane * 32 // keys.group_size) + i], i)

            def alone(*args):
                def run(accumulator):
                    start(accumulator, *args)
                    return accumulator[...]

                return pl.run_scoped(run, plgpu.ACC(_TALL, jnp.float32))

            def run(*accumulators):
                """Starts every tile; the products of `in_flight` tiles run at a time, three to a tile."""
                sums, running = {}, []

                def finish_oldest():
                    tile, accumulator = running.pop(0)
                    sums[tile] = mosaic.loaded(accumulator, 3 * len(running))

                for parity in range(2):
                    low = plgpu.load(kc_smem.at[slot, parity], layout=plgpu.Layout.WGMMA)
                    high = _high_bytes(low, interpret)
                    if parity == 1:
                        plgpu.commit_smem()
                        pl.when(unit + stages < last)(lambda: fetch_keys(unit + stages))
                    for plane in range(_PLANES):
                        if interpret:  # it cannot store to an accumulator
                            sums[plane, parity] = alone(low, high, plane)
                            continue
                        if len(running) == len(accumulators):
                            finish_oldest()
                        accumulator = accumulators[(parity * _PLANES + plane) % len(accumulators)]
                        accumulator[...] = nil()
                        start(accumulator, low, high, plane)
                        running.append(((plane, parity), accumulator))
                while running:
                    finish_oldest()
                tiles = [(plane, parity) for plane in range(_PLANES) for parity in range(2)]
                return [
                    jnp.where(token < left - (32 * plane + parity), sums[plane, parity], -jnp.inf)
                    for plane, parity in tiles
                ]

            sums = pl.run_scoped(run, *(plgpu.ACC(_TALL, jnp.float32) for _ in range(blocks.in_flight)))
            return [sums[2 * plane : 2 * plane + 2] for plane in range(_PLANES)]

        def metadata(smem, slot, left, plane, group):
            """Value scales or zero points of a plane's two tiles, float32 [64]. Beyond the length they may be NaN."""
            of_blocks = smem.at[slot, plane * groups + group]
            if not interpret:  # it cannot reshape a reference
                of_blocks = of_blocks.reshape(64)
            word = plgpu.load(of_blocks, layout=None if interpret else mosaic.ROW_LAYOUT).reshape(64)
            numbers = (_number(word, parity == 1, values.scale.dtype).astype(jnp.float32) for parity in range(2))
            return [jnp.where(row_token < left - (32 * plane + parity), x, 0.0) for parity, x in enumerate(numbers)]

        def weigh(outputs, slot):
            """Adds probability . value to the outputs of both halves of the head."""

            def products(accumulators, block):
                for half in range(2):
                    words = plgpu.load(vc_smem.at[slot, block, pl.ds(64 * half, 64)], layout=plgpu.Layout.WGMMA)
                    for parity, w in enumerate((words, _high_bytes(words, interpret))):
                        for plane in range(_PLANES):
                            tile = (2 * plane + parity) * groups + half * groups // 2
                            p = right.at[tile, pl.ds(16 * block, 16)]
                            times(accumulators[half], _codes(w, plane), p, (half * 2 + parity) * _PLANES + plane)

            def run(*accumulators):
                if not interpret:  # it cannot store to an accumulator
                    for accumulator, x in zip(accumulators, outputs):
                        accumulator[...] = x

                def one_block(block, _):
                    products(accumulators, block)
                    plgpu.wgmma_wait(0)  # frees the registers of the block's codes

                lax.fori_loop(0, _UNIT, one_block, None)
                return tuple(x[...] for x in accumulators)

            got = pl.run_scoped(run, *(plgpu.ACC(_TALL, jnp.float32) for _ in outputs))
            return tuple(x + y for x, y in zip(outputs, got)) if interpret else got

        def step(unit, state):
            outputs, total, zeros, maximum = state
            left = length - unit * (_UNIT * BLOCK)
            slot = mosaic.slot_of(unit - first, stages)
            plgpu.barrier_wait(k_bar.at[slot])
            fold(slot, left)
            plgpu.commit_smem()
            sums = logits(slot, unit, left)
            base = plgpu.load(factor_smem, layout=mosaic.COLUMN_LAYOUT)
            by_plane = [_wide(base * 0.25**plane, _TALL, 1) for plane in range(_PLANES)]
            tops = [jnp.maximum(*sums[i]) * by_plane[i] for i in range(_PLANES)]
            top = jnp.maximum(jnp.maximum(tops[0], tops[1]), jnp.maximum(tops[2], tops[3]))
            new = jnp.maximum(maximum, jnp.where(own, top, -jnp.inf).max(axis=0))
            shift = jnp.where(new == -jnp.inf, 0.0, new)
            fade = _wide(jnp.exp2(maximum - shift), _TALL, 1)
            reference = jnp.where(own, _wide(shift, _TALL, 1), jnp.inf)  # other blocks' columns: exp2(-inf)
            total = total * fade
            zeros = [x * fade for x in zeros]
            plgpu.barrier_wait(v_bar.at[slot])
            for plane in range(_PLANES):
                p = [jnp.exp2(x * by_plane[plane] - reference) for x in sums[plane]]
                total = total + p[0] + p[1]
                for group in range(groups):
                    scale, zero = (metadata(smem, slot, left, plane, group) for smem in (vs_smem, vz_smem))
                    for parity in range(2):
                        zeros[group] = zeros[group] + p[parity] * _wide(zero[parity], _TALL, 0)
                        weight = p[parity] * _wide(scale[parity] * 0.25**plane, _TALL, 0)
                        right.at[(2 * plane + parity) * groups + group][...] = weight.astype(jnp.float16)
            plgpu.commit_smem()
            outputs = weigh(tuple(x * fade for x in outputs), slot)
            plgpu.commit_smem()
            pl.when(unit + stages < last)(lambda: fetch_values(unit + stages))
            return outputs, total, tuple(zeros), new

        lowest = plgpu.layout_cast(jnp.full((_COLUMNS,), -jnp.inf, jnp.float32), mosaic.COLUMN_LAYOUT)
        state = (nil(), nil()), nil(), tuple(nil() for _ in range(groups)), lowest
        outputs, total, zeros, maximum = lax.fori_loop(first, last, step, state)
        zeros = [x.sum(axis=0) for x in zeros]
        for half in range(2):
            zero = _wide(zeros[half * groups // 2], _TALL, 1)
            out_ref.at[program, split, half][...] = outputs[half] * 2.0**24 + zero
        stats_smem.at[0][...] = maximum
        stats_smem.at[1][...] = total.sum(axis=0)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(stats_smem, stats_ref.at[program, split])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    halves = functools.partial(plgpu.SMEM, dtype=jnp.float16)
    words = functools.partial(plgpu.SMEM, dtype=jnp.uint32)
    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((programs, splits, 2, *_TALL), jnp.float32),
            jax.ShapeDtypeStruct((programs, splits, 2, _COLUMNS), jnp.float32),
        ),
        scratch_types=[
            halves((2, 2, _WORDS, 8)),
            plgpu.SMEM((_COLUMNS,), jnp.float32),
            plgpu.SMEM((stages, 2, 64, _WORDS), jnp.uint16, transforms=mosaic.swizzled(64)),
            words((stages, _UNIT * spans, _WORDS)),
            words((stages, _UNIT * spans, _WORDS)),
            plgpu.SMEM((stages, _UNIT, _HEAD, 16), jnp.uint16, transforms=mosaic.swizzled(16)),
            words((stages, _PLANES * groups, _UNIT, 16)),
            words((stages, _PLANES * groups, _UNIT, 16)),
            halves((max(3 * spans, 2 * _PLANES * groups), *_TALL), transforms=mosaic.swizzled(16)),
            plgpu.SMEM((2, _COLUMNS), jnp.float32),
            halves((3, 64, _WORDS), transforms=mosaic.swizzled(64)) if interpret else None,
            halves((16, 64, 16), transforms=mosaic.swizzled(16)) if interpret else None,
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=4, num_barriers=stages),
            plgpu.Barrier(num_arrivals=_UNIT + 2 * _PLANES * groups, num_barriers=stages),
        ],
        grid=(splits, programs),
        grid_names=("splits", "programs"),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=2048),
        interpret=interpret,
    )(query, factor, kc, ks, kz, vc, vs, vz, lengths)


def _normalised(query: Float[Array, "B T N H"], heads: int, scale: float) -> tuple[jax.Array, jax.Array]:
    """Queries and factors as `_attend` takes them. A row's largest number is brought below 1, for float16's sake."""
    b, t, n, h = query.shape
    rows = t * (n // heads)
    tiles = -(-rows // _SLOTS)
    x = query.astype(jnp.float32).reshape(b, t, heads, n // heads, h)
    x = jnp.swapaxes(x, 1, 2).reshape(b * heads, rows, h)
    x = jnp.pad(x, ((0, 0), (0, tiles * _SLOTS - rows), (0, 0))).reshape(-1, _SLOTS, h)
    _, exponent = jnp.frexp(jnp.abs(x).max(axis=-1))
    exponent = jnp.clip(exponent, -100, 100)
    x = jnp.swapaxes((x * jnp.exp2(-exponent.astype(jnp.float32))[..., None]).astype(jnp.float16), 1, 2)
    parities = jnp.stack([x[:, 0::2], x[:, 1::2]], axis=1)
    nothing = jnp.zeros_like(parities)
    masks = [jnp.concatenate(pair, axis=-1) for pair in ((parities, nothing), (nothing, parities))]
    factor = jnp.exp2(exponent.astype(jnp.float32) + 24) * (scale * math.log2(math.e))
    return jnp.stack(masks, axis=1), jnp.tile(factor, (1, _UNIT))


def _join(outputs: jax.Array, stats: jax.Array, query: Float[Array, "B T N H"], heads: int) -> Partial:
    """The shares and block columns of each query row as one."""
    b, t, n, h = query.shape
    programs, splits = outputs.shape[:2]
    stats = stats.reshape(programs, splits, 2, _UNIT, _SLOTS)
    maximum = stats[:, :, 0].max(axis=(1, 2))
    reference = jnp.where(jnp.isneginf(maximum), 0.0, maximum)
    weight = jnp.exp2(stats[:, :, 0] - reference[:, None, None])
    total = (weight * stats[:, :, 1]).sum(axis=(1, 2))
    outputs = outputs.reshape(programs, splits, h, _UNIT, _SLOTS)
    output = (outputs * weight[:, :, None]).sum(axis=(1, 3))

    def rows(x):
        """[B K tiles, slots, ...] -> [B, T, N, ...]."""
        x = x.reshape(b, heads, -1, *x.shape[2:])[:, :, : t * (n // heads)]
        return jnp.swapaxes(x.reshape(b, heads, t, n // heads, *x.shape[3:]), 1, 2).reshape(b, t, n, *x.shape[3:])

    return Partial(rows(jnp.swapaxes(output, 1, 2)), rows(maximum * math.log(2)), rows(total))


def _choose_splits(programs: int, capacity: int, wanted: int) -> int:
    """Shares of a sequence that make about `wanted` programs a processor."""
    return max(1, min(wanted * _PROCESSORS // programs, -(-capacity // _UNIT), 256))


@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7))
def _packed(query, keys, values, lengths, scale, splits, blocks, interpret) -> Partial:
    heads = keys.codes.shape[1]
    right, factor = _normalised(query, heads, scale)
    shares = _attend(right, factor, keys, values, lengths, splits=splits, blocks=blocks, interpret=interpret)
    return _join(*shares, query, heads)


def packed_decode_attention(
    query: Float[Array, "B T N H"],
    keys: PackedTensor,
    values: PackedTensor,
    lengths: Int[Array, "B"] | Int[Array, "B K"],
    *,
    scale: float,
    return_logits: bool,
    splits: int | None = None,
    blocks: Blocks = Blocks(),
    interpret=None,
) -> Partial:
    """`api.packed_decode_attention` on Hopper. None for splits means what suits the device."""
    if not interpret:
        mosaic.decline_where_they_cannot_run()
    reason = "returns no logits" if return_logits else decline(query, keys, values, scale)
    if reason is not None:
        raise NotImplementedError(reason)
    heads, capacity = keys.codes.shape[1:3]
    rows = query.shape[1] * (query.shape[2] // heads)
    if splits is None:
        splits = _choose_splits(query.shape[0] * heads * -(-rows // _SLOTS), capacity, blocks.programs)
    lengths = jnp.broadcast_to(lengths.reshape(len(lengths), -1), (len(lengths), heads))
    lengths = lengths.astype(jnp.int32).reshape(-1)
    return _packed(query, keys, values, lengths, float(scale), splits, blocks, interpret)
