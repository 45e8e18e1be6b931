"""Two-pass attention on Hopper in Pallas Mosaic GPU.

Why two passes. A flash attention kernel never holds a finished probability: while it walks over the keys, the maximum
and the sum of a row still change, so it cannot add up what each key received. Pass 1 is therefore an ordinary flash
forward that also writes the log-sum-exp of every row in float32; pass 2 computes the logits once more, and this time
every probability is final: p = exp(logit - lse). Between the passes lies one array, the log-sum-exp as the caller gets
it: [B, T, N], natural. The producer of pass 2 reads a column of it, 4 bytes in every N * 4 (4 KiB of L2 lines beside 32
KiB of rows), turns it to base 2 and lays it into shared memory, a step or more before it is needed.

Layout. One block of threads is `warpgroups` consumers and one producer that starts TMA copies:

    pass 1  one (sequence, query head, tile of rows)        pass 2  one (sequence, query head(s), tile of keys)

            keys ->  0   1   2   3                                  keys ->  0   1   2   3
    rows     0       x                                      rows     0       x
             1       x   x                                           1       x   x
    tile ->  2       x   x   x                                       2       x   x   x
             3       x   x   x   x                                   3       x   x   x   x
            the tile stays, keys and values stream by                            ^ the tile stays, rows stream by

Two blocks of pass 1 are a pair (a cluster) that meets the same keys: two heads of a group, or two tiles of rows where
heads are no pairs. Each TMA copy brings half of a tile from L2 and writes it into both, so that L2 reads half as much.
Time is the same where the tensor cores wait for exponentials; under a power limit it is 2 to 4 % less, for moving bytes
is power (both passes, S = 32768, chains of 0.25 s: 0.96 of single blocks; 131072: 0.98; 8192: 1.00). The same for pass
2, two tiles of keys that meet the same rows, costs 1 to 3 % at S = 8192 and gains nothing beyond.

In pass 2 a warpgroup multiplies [keys, H] by [H, rows], so that a column sum of the softmax is a sum along the lanes'
own registers: no atomics, one owner per key, and the same bits on every run.

Schedule. One block of threads fills one of 132 processors, and tiles differ: 2 to 64 steps in pass 2 at S = 8192. The
heavy ones (last rows in pass 1, first keys in pass 2) start before any lighter one, and the light ones fill the end.
Head after head instead, the last head's heavy tiles start when nothing is left to run beside them. Measured on an H100
at S = 8192, against cuDNN's flash alone: 1.45 head after head, 1.37 by weight (heads 32/8 of 128; pass 2 627 and 551
us), 1.40 and 1.32 (heads 32/32), 1.61 and 1.48 (heads 32/8 of 64). All heads at once, though, stream more than L2
holds: at S = 32768 and heads 32/32 the queries of pass 2 are 256 MiB, read again by every wave of tiles. So heads go in
cohorts that fit L2, as long as a cohort has blocks enough to come out even (`_cohort`): there pass 2 went from 521 to
593 TFLOP/s, and ragged batches from 1.12 to 1.05 times the time of the work in them.

Limit. Causal flash is 2 * T * S * H multiply-adds per query head over the lower triangle (two products), pass 2 one
more: 1.5 times flash alone is the arithmetic of exact column sums. At H = 128 a 128 x 128 tile of pass 2 keeps the
tensor cores of an SM busy for 1024 cycles (4096 FLOP per cycle) and its special function unit for 1024 too (16
exponentials per cycle), so pass 2 lives on overlapping the two: four consumers of 64 keys, each free to run ahead, do
that better than two of 128. At H = 64 the exponentials alone are the limit. In pass 1 a consumer starts Q K^T of a step
together with P V of the step before and computes its softmax meanwhile; the consumers take turns on the tensor cores.
Of a large matrix product's rate (790 TFLOP/s, measured) pass 1 reaches 0.67 at S = 8192 and 0.76 at S = 32768, pass 2
0.72 and 0.77, cuDNN's flash 0.63 and 0.72 (`minikv bench prefill`). At S = 8192 what is missing is products and
exponentials waiting for each other. All of it runs at the card's power limit (690 to 699 of 700 W, and the driver says
so at every reading): the clock falls to 1,700 MHz at S = 8192 and to 1,550 beyond, for cuDNN's kernel to 1,320, and
time is energy.

Edges. TMA fills what lies outside an array with zeros and drops stores there, in whole groups of 8 rows; if T or S is
no multiple of 8, the wrapper copies query, key and value into padded arrays. Log-sum-exps and scores leave by stores
from registers, which have no bounds: `_store` keeps them. Padding may hold NaN: logits outside are replaced, never
multiplied, and the one block of values in which a sequence ends is read from a cleaned copy, [B, keys, K, H].
"""

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import mosaic
from pallas_kernels.two_pass_attention import common

# Registers per thread of (a consumer, the producer) by number of consumers: 65536 in all, in steps of 8.
_REGISTERS = {1: (240, 40), 2: (232, 40), 3: (160, 32), 4: (112, 32)}


@dataclasses.dataclass(frozen=True)
class ForwardBlocks:
    """Tile sizes of pass 1: `warpgroups` consumers of `rows` query rows each, against `keys` keys per step."""

    warpgroups: int = 2
    rows: int = 64
    keys: int = 128
    stages: int = 2


@dataclasses.dataclass(frozen=True)
class ScoreBlocks:
    """Tile sizes of pass 2: `warpgroups` consumers of `keys` keys each, against `rows` query rows per step.

    With `whole_group` a tile of keys is loaded once for all query heads of its group, and nothing is left to add up
    after the kernel; the wrapper turns it on once that leaves enough blocks of threads to fill the GPU evenly.
    `rows` is a multiple of 64, the rows over which a warpgroup spreads a vector.
    """

    warpgroups: int = 4
    keys: int = 64
    rows: int = 128
    stages: int = 2
    whole_group: bool = False


# By head size, measured on an H100. What was tried and lost, each against its neighbour of the same run, H = 128.
# Pass 2 at S = 32768, the shipped tiles 619 TFLOP/s: two consumers of 128 keys 508, three of 64 keys 592, keys held in
# registers 431, two products in flight per consumer 566 at best; sums over lanes in every step cost 4 %; one eighth of
# the exponentials as a polynomial costs 5 % at S = 8192, a quarter 13 %. Pass 1: 64 keys per step 561 against 650,
# query rows held in registers 577 against 618, three stages 548 against 608 at S = 8192.
# Later, at S = 8192. Pass 2 with two stages takes 545 us: log-sum-exps read during the product 588, products in turns
# 564, 64 rows and four stages 759, 132 blocks of threads that take tiles in turn 535 (S = 32768: 7861 against 7355).
# Three stages 536 (heads 32/32: 561 against 574, S = 32768: 7470 against 7635); at H = 64 five stages 433 against 434
# with four (5631 against 5823). Pass 1, 1003 us: sums of probabilities by lane 1035, 132 blocks of threads 1033 (15293
# against 14913).
# Later still, pass 2 of a whole group at S = 8192 and 32768, on a card that spreads 5 to 10 %: 563 and 7940 us; keys in
# registers and 64 rows per step 580 and 8063, 128 rows 690 and 9628; products with the rows on the left, two consumers
# of 128 keys, 640 and 9237. Both passes with three consumers against 192 rows take 1.10 and 1.04 times those with four
# against 128, with two against 256 rows 1.08 and 1.07 times.
_BLOCKS = {
    64: (ForwardBlocks(3, 64, 128), ScoreBlocks(stages=5)),
    96: (ForwardBlocks(), ScoreBlocks(stages=3)),
    128: (ForwardBlocks(), ScoreBlocks(stages=3)),
    256: (ForwardBlocks(2, 64, 64), ScoreBlocks(2, 64, 128)),
}


# Bytes that tiles may stream from L2 at a time, of an H100's 50 MB; blocks of threads that fill the GPU evenly, four on
# each processor. 16 MiB, or 128 or 256 blocks, take the same time to 0.5 % at S = 8192 and 32768, heads 32/8 and 32/32.
_STREAMED = 32 << 20
_EVEN = 512


def _cohort(heads: int, streamed: int, blocks: int) -> int:
    """How many of B x heads are in work at a time: as many as stay in L2, enough to fill the GPU; a divisor of them.

    `streamed` are the bytes that each head's tiles read over and over, `blocks` its blocks of threads.
    """
    divisors = [n for n in range(1, heads + 1) if heads % n == 0 and (n * blocks >= _EVEN or n == heads)]
    return max((n for n in divisors if n * streamed <= _STREAMED), default=divisors[0])


def _head_of(heads: int, cohort: int, index):
    """Sequence and head of the `index`-th of this block's cohort."""
    index = lax.axis_index("cohorts") * cohort + index
    return lax.div(index, mosaic.integer(heads)), lax.rem(index, mosaic.integer(heads))


def _swizzled(head_size: int):
    return mosaic.swizzled(64 if head_size % 64 == 0 else 32)


def _whole_blocks_of(x, size: int) -> jax.Array:
    return lax.div(jnp.maximum(mosaic.integer(x), 0), mosaic.integer(size))


def _zeros(shape: tuple[int, int]) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def _row_constant(rows: int, x, dtype=jnp.float32) -> jax.Array:
    return plgpu.layout_cast(jnp.full((rows,), x, dtype), mosaic.ROW_LAYOUT)


def _rows_from(first, rows: int) -> jax.Array:
    """first, first + 1 ..., one a row."""
    return plgpu.broadcasted_iota(jnp.int32, (rows,), 0, layout=mosaic.ROW_LAYOUT) + first


def _lane_sums(x: jax.Array) -> jax.Array:
    """[M, N] -> [M, 8]: sums that stay within a lane's registers; the sum over the 8 is left to the end."""
    pieces = [lax.slice(x, (0, i), (x.shape[0], i + 8)) for i in range(0, x.shape[1], 8)]
    while len(pieces) > 1:
        pieces = [a + b for a, b in zip(pieces[::2], pieces[1::2])] + pieces[len(pieces) // 2 * 2 :]
    return pieces[0]


def _index(shape: tuple[int, int], axis: int) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def _store(place, start, end: int, x: jax.Array, smem) -> None:
    """place(start + i) = x[i] where start + i < end, from registers.

    A store to global memory has no bounds. Nor has a copy of an unswizzled vector: it is no TMA box, and what lies
    beyond a row of the array goes to the next one. So the last elements, where fewer than x holds, go one by one.
    """
    size = x.shape[0]

    @pl.when(start + size <= end)
    def _():
        mosaic.store(place(pl.ds(start, size)), x)

    @pl.when((start < end) & (start + size > end))
    def _():
        smem[...] = x

        @pl.loop(0, end - start)
        def _(i):
            place(start + i)[...] = smem[i]


def _forward(
    query, key, value, last_values, extent, *, scale: float, is_causal: bool, blocks: ForwardBlocks, interpret=None
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Pass 1. extent [B * 4]: query length, key length, offset, first counted row of each sequence.

    Of a sequence whose key length is no multiple of `blocks.keys` the last values are read from `last_values`
    [B, keys, K, H], zero beyond the length; None if every length is S.
    Returns the output [B, T, N, H], padding rows 0, and the log-sum-exp [B, T, N], -inf on rows that saw nothing.
    """
    batch, t, heads, size = query.shape
    group = heads // key.shape[2]
    wgs, rows, keys, stages = blocks.warpgroups, blocks.rows, blocks.keys, blocks.stages
    tile = wgs * rows
    tiles = -(-t // tile)
    tall = (rows, keys)
    turns = wgs > 1
    factor = scale * common.LOG2E
    key_bytes = 2 * key.shape[1] * size * key.dtype.itemsize
    cohort = _cohort(batch * key.shape[2], key_bytes, group * tiles) * group
    # Two heads of a group meet the same keys, and so do, all but the last ones, two tiles of rows of one head.
    head_pairs = group % 2 == 0
    wide = tile if head_pairs else 2 * tile
    wide_tiles = -(-t // wide)

    def kernel(q_ref, k_ref, v_ref, last_v_ref, extent_ref, out_ref, lse_ref, *scratch):
        q_smem, k_smem, v_smem, lse_smem, p_smem, *barriers = scratch
        q_bar, k_bar, v_bar, k_free, v_free, turn = barriers
        head, wide_row = lax.axis_index("heads"), (wide_tiles - 1 - lax.axis_index("tiles")) * wide
        if head_pairs:
            head, first_row = head * 2 + lax.axis_index("pair"), wide_row
        else:
            first_row = wide_row + lax.axis_index("pair") * tile
        (b, h), wg = _head_of(heads, cohort, head), lax.axis_index("wg")
        query_length, key_length, offset = (extent_ref[b * 4 + i] for i in range(3))
        end = key_length
        if is_causal:
            end = jnp.minimum(end, offset + jnp.minimum(wide_row + wide, query_length))
        end = jnp.where(wide_row < query_length, end, 0)
        steps = jnp.maximum(mosaic.blocks_of(end, keys), 1)  # a tile of padding takes one step whose result is dropped

        def consume():
            plgpu.set_max_registers(_REGISTERS[wgs][0], action="increase")
            base = first_row + wg * rows
            plgpu.copy_gmem_to_smem(q_ref.at[b, pl.ds(base, rows), h], q_smem.at[wg], q_bar.at[wg])
            plgpu.barrier_wait(q_bar.at[wg])
            unmasked = _whole_blocks_of(key_length, keys)
            if is_causal:
                unmasked = jnp.minimum(unmasked, _whole_blocks_of(offset + base + 1, keys))

            # Of each row, the first key that it does not see: one comparison an element. With one a bound, comparing is
            # a third of what a masked step takes.
            end_of_row = _row_constant(rows, key_length, jnp.int32)
            if is_causal:
                end_of_row = jnp.minimum(end_of_row, _rows_from(base + offset + 1, rows))

            def softmax(s, maximum, total, step, masked):
                if masked:
                    seen = _index(tall, 1) < lax.broadcast_in_dim(end_of_row - step * keys, tall, [0])
                    s = jnp.where(seen, s, -jnp.inf)
                new = jnp.maximum(maximum, s.max(axis=1) * factor)
                shift = jnp.where(new == -jnp.inf, 0.0, new) if masked else new
                shrink = jnp.exp2(maximum - shift)
                p = jnp.exp2(s * factor - lax.broadcast_in_dim(shift, tall, [0]))
                return p, new, total * shrink + p.sum(axis=1), shrink

            def logits(s_acc, step):
                slot = mosaic.slot_of(step, stages)
                plgpu.barrier_wait(k_bar.at[slot])
                if turns:
                    plgpu.barrier_wait(turn.at[wg])
                plgpu.wgmma(s_acc, q_smem.at[wg], k_smem.at[slot].transpose((1, 0)))

            def weigh(o_acc, p, step):
                slot = mosaic.slot_of(step, stages)
                plgpu.barrier_wait(v_bar.at[slot])
                if p_smem is None:
                    plgpu.wgmma(o_acc, p, v_smem.at[slot])
                else:  # the interpreter cannot multiply registers
                    p_smem.at[wg][...] = p
                    plgpu.commit_smem()
                    plgpu.wgmma(o_acc, p_smem.at[wg], v_smem.at[slot])

            def pass_turn():
                if turns:
                    plgpu.barrier_arrive(turn.at[lax.rem(wg + 1, mosaic.integer(wgs))])

            def advance(s_acc, o_acc, state, step, masked, earlier=0.0):
                """Q K^T of this step and P V of the last one run while the softmax waits for the first only."""
                maximum, total, p = state
                logits(s_acc, step)
                weigh(o_acc, p, step - 1)
                pass_turn()
                s = mosaic.loaded(s_acc, 1)
                plgpu.barrier_arrive(k_free.at[mosaic.slot_of(step, stages)])
                p, maximum, total, shrink = softmax(s, maximum, total, step, masked)
                out = mosaic.loaded(o_acc, 0)
                if interpret:
                    out = out + earlier
                plgpu.barrier_arrive(v_free.at[mosaic.slot_of(step - 1, stages)])
                out = out * lax.broadcast_in_dim(shrink, out.shape, [0])
                return out, (maximum, total, p.astype(query.dtype))

            def begin(s_acc):
                logits(s_acc, 0)
                pass_turn()
                s = mosaic.loaded(s_acc, 0)
                plgpu.barrier_arrive(k_free.at[0])
                p, maximum, total, _ = softmax(s, _row_constant(rows, -jnp.inf), zero, 0, True)
                return maximum, total, p.astype(query.dtype)

            def finish(o_acc, p):
                weigh(o_acc, p, steps - 1)
                out = mosaic.loaded(o_acc, 0)
                plgpu.barrier_arrive(v_free.at[mosaic.slot_of(steps - 1, stages)])
                return out

            zero = _row_constant(rows, 0.0)
            middle = jnp.clip(unmasked, 1, steps)
            tall_acc, out_acc = (plgpu.WGMMAAccumulatorRef(x, jnp.float32) for x in (tall, (rows, size)))

            def walk(s_acc, o_acc):
                def body(step, state, masked):
                    s_acc[...] = _zeros(tall)
                    out, state = advance(s_acc, o_acc, state, step, masked)
                    o_acc[...] = out
                    return state

                state = begin(s_acc)
                state = lax.fori_loop(1, middle, functools.partial(body, masked=False), state)
                maximum, total, p = lax.fori_loop(middle, steps, functools.partial(body, masked=True), state)
                return finish(o_acc, p), maximum, total

            def walk_interpreted():
                """`walk` for the interpreter, which cannot store to an accumulator: the output is a value."""

                def body(step, carry, masked):
                    earlier, state = carry

                    def scoped(s_acc, o_acc):
                        return advance(s_acc, o_acc, state, step, masked, earlier)

                    return pl.run_scoped(scoped, tall_acc, out_acc)

                carry = _zeros((rows, size)), pl.run_scoped(begin, tall_acc)
                carry = lax.fori_loop(1, middle, functools.partial(body, masked=False), carry)
                out, (maximum, total, p) = lax.fori_loop(middle, steps, functools.partial(body, masked=True), carry)
                return out + pl.run_scoped(lambda o_acc: finish(o_acc, p), out_acc), maximum, total

            if turns:
                pl.when(wg == wgs - 1)(lambda: plgpu.barrier_arrive(turn.at[0]))
            out, maximum, total = walk_interpreted() if interpret else pl.run_scoped(walk, tall_acc, out_acc)
            if turns:
                pl.when(wg == 0)(lambda: plgpu.barrier_wait(turn.at[0]))
            row = plgpu.broadcasted_iota(jnp.int32, (rows, size), 0, layout=plgpu.Layout.WGMMA) + base
            filled = jnp.where(total > 0, total, 1.0)
            out = out * lax.broadcast_in_dim(1.0 / filled, out.shape, [0])
            q_smem.at[wg][...] = jnp.where(row < query_length, out, 0.0).astype(query.dtype)
            seen = (_rows_from(base, rows) < query_length) & (total > 0)
            lse = jnp.where(seen, (maximum + jnp.log2(filled)) / common.LOG2E, -jnp.inf)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem.at[wg], out_ref.at[b, pl.ds(base, rows), h])
            _store(lambda at: lse_ref.at[b, at, h], base, t, lse, lse_smem.at[wg])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def produce():
            plgpu.set_max_registers(_REGISTERS[wgs][1], action="decrease")
            kv_head = lax.div(h, mosaic.integer(group))

            def load(step, wait):
                slot = mosaic.slot_of(step, stages)
                at = b, pl.ds(step * keys, keys), kv_head
                if wait:
                    plgpu.barrier_wait(k_free.at[slot])
                plgpu.copy_gmem_to_smem(k_ref.at[at], k_smem.at[slot], k_bar.at[slot], collective_axes="pair")
                if wait:
                    plgpu.barrier_wait(v_free.at[slot])

                def load_values(ref):
                    plgpu.copy_gmem_to_smem(ref, v_smem.at[slot], v_bar.at[slot], collective_axes="pair")

                if last_v_ref is None:
                    load_values(v_ref.at[at])
                else:
                    whole = (step + 1) * keys <= key_length
                    pl.when(whole)(lambda: load_values(v_ref.at[at]))
                    pl.when(~whole)(lambda: load_values(last_v_ref.at[b, :, kv_head]))

            filled = jnp.minimum(steps, stages)
            pl.loop(0, filled)(lambda step: load(step, wait=False))
            pl.loop(filled, steps)(lambda step: load(step, wait=True))

            @pl.loop(steps - filled, steps)
            def _(step):
                plgpu.barrier_wait(k_free.at[mosaic.slot_of(step, stages)])
                plgpu.barrier_wait(v_free.at[mosaic.slot_of(step, stages)])

        pl.when(wg < wgs)(consume)
        pl.when(wg == wgs)(produce)

    swizzled = functools.partial(plgpu.SMEM, dtype=query.dtype, transforms=_swizzled(size))
    # A copy that fills both blocks' slots waits for the consumers of both.
    all_free = functools.partial(plgpu.ClusterBarrier, collective_axes=("pair",))
    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((batch, t, heads), jnp.float32),
        ),
        scratch_types=[
            swizzled((wgs, rows, size)),
            swizzled((stages, keys, size)),
            swizzled((stages, keys, size)),
            plgpu.SMEM((wgs, rows), jnp.float32),
            plgpu.SMEM((wgs, rows, keys), query.dtype, transforms=_swizzled(keys)) if interpret else None,
            plgpu.Barrier(num_barriers=wgs),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            all_free(num_arrivals=wgs, num_barriers=stages),
            all_free(num_arrivals=wgs, num_barriers=stages),
            plgpu.Barrier(num_barriers=wgs),
        ],
        grid=(batch * heads // cohort, wide_tiles, cohort // 2 if head_pairs else cohort),  # the last varies fastest
        grid_names=("cohorts", "tiles", "heads"),
        cluster=(2,),
        cluster_names=("pair",),
        num_threads=wgs + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=interpret,
    )(query, key, value, last_values, extent)


def _column_sums(
    query, key, lse, extent, *, scale: float, is_causal: bool, blocks: ScoreBlocks, interpret=None
) -> Float[Array, "B K S"]:
    """Pass 2. lse [B, P, N] from `_forward`, P >= `blocks.rows`; extent [B * 4] as there."""
    batch, _, heads, size = query.shape
    _, s, kv_heads, _ = key.shape
    group = heads // kv_heads
    wgs, keys, rows, stages = blocks.warpgroups, blocks.keys, blocks.rows, blocks.stages
    together = group if blocks.whole_group else 1
    tile = wgs * keys
    tiles = -(-s // tile)
    tall = (keys, rows)
    factor = scale * common.LOG2E
    query_bytes = query.shape[1] * size * query.dtype.itemsize
    cohort = _cohort(batch * heads // together, query_bytes, tiles)

    def kernel(q_ref, k_ref, lse_ref, extent_ref, out_ref, k_smem, q_smem, lse_smem, out_smem, *barriers):
        k_bar, q_bar, lse_bar, free = barriers
        (b, h), wg = _head_of(heads // together, cohort, lax.axis_index("heads")), lax.axis_index("wg")
        tile_base = lax.axis_index("tiles") * tile
        query_length, key_length, offset, counted = (extent_ref[b * 4 + i] for i in range(4))
        first_row = jnp.maximum(counted, tile_base - offset) if is_causal else counted
        first_row = lax.div(first_row, mosaic.integer(8)) * 8  # TMA starts at whole groups of 8 rows
        steps = jnp.where(tile_base < key_length, mosaic.blocks_of(query_length - first_row, rows), 0)

        def consume():
            plgpu.set_max_registers(_REGISTERS[wgs][0], action="increase")
            base = tile_base + wg * keys
            kv_head = h if blocks.whole_group else lax.div(h, mosaic.integer(group))
            plgpu.copy_gmem_to_smem(k_ref.at[b, pl.ds(base, keys), kv_head], k_smem.at[wg], k_bar.at[wg])
            plgpu.barrier_wait(k_bar.at[wg])
            # Steps, in order: nothing visible, masked, unmasked, masked (the last rows).
            unseen = jnp.zeros((), jnp.int32)
            diagonal = jnp.where(first_row < counted, 1, 0)
            if is_causal:
                unseen = jnp.minimum(_whole_blocks_of(base - offset - first_row, rows), steps)
                diagonal = jnp.maximum(diagonal, mosaic.blocks_of(base + (keys - 1) - offset - first_row, rows))
            diagonal = jnp.clip(diagonal, unseen, steps)
            last = jnp.clip(_whole_blocks_of(query_length - first_row, rows), diagonal, steps)

            # Of each key, the first counted row that sees it.
            start_of_key = _row_constant(keys, counted, jnp.int32)
            if is_causal:
                start_of_key = jnp.maximum(start_of_key, _rows_from(base - offset, keys))

            def head(g, sums):
                start = g * steps

                def skip(step, _):
                    slot = mosaic.slot_of(start + step, stages)
                    plgpu.barrier_wait(q_bar.at[slot])
                    plgpu.barrier_wait(lse_bar.at[slot])
                    plgpu.barrier_arrive(free.at[slot])

                def body(step, sums, masked):
                    slot = mosaic.slot_of(start + step, stages)
                    plgpu.barrier_wait(q_bar.at[slot])

                    def product(accumulator):
                        plgpu.wgmma(accumulator, k_smem.at[wg], q_smem.at[slot].transpose((1, 0)))
                        return mosaic.loaded(accumulator, 0)

                    logits = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef(tall, jnp.float32))
                    plgpu.barrier_wait(lse_bar.at[slot])
                    lse = plgpu.load(lse_smem.at[slot, pl.ds(rows, rows)], layout=mosaic.COLUMN_LAYOUT)
                    plgpu.barrier_arrive(free.at[slot])
                    x = logits * factor - lax.broadcast_in_dim(lse, tall, [1])
                    if not masked:
                        return sums + _lane_sums(jnp.exp2(x))
                    row, origin = _index(tall, 1), first_row + step * rows
                    seen = row >= lax.broadcast_in_dim(start_of_key - origin, tall, [0])
                    seen &= row < query_length - origin
                    return sums + _lane_sums(jnp.where(seen, jnp.exp2(x), 0.0))

                masked, unmasked = (functools.partial(body, masked=x) for x in (True, False))
                lax.fori_loop(0, unseen, skip, None)
                sums = lax.fori_loop(unseen, diagonal, masked, sums)
                sums = lax.fori_loop(diagonal, last, unmasked, sums)
                return lax.fori_loop(last, steps, masked, sums)

            sums = lax.fori_loop(0, together, head, _zeros((keys, 8))).sum(axis=1)
            # A key of padding may have been NaN: what it received is dropped, not multiplied by zero.
            sums = jnp.where(_rows_from(base, keys) < key_length, sums, 0.0)
            _store(lambda at: out_ref.at[b, h, at], base, s, sums, out_smem.at[wg])

        def produce():
            plgpu.set_max_registers(_REGISTERS[wgs][1], action="decrease")
            total = steps * together

            def load(i, wait):
                slot = mosaic.slot_of(i, stages)
                if wait:
                    plgpu.barrier_wait(free.at[slot])
                g = lax.div(i, jnp.maximum(steps, 1)) if together > 1 else 0
                row = first_row + (i - g * steps) * rows
                q_head = h * together + g
                plgpu.copy_gmem_to_smem(q_ref.at[b, pl.ds(row, rows), q_head], q_smem.at[slot], q_bar.at[slot])
                # A load from global memory has no bounds: at the end it starts earlier, and so does its place.
                inside = jnp.minimum(row, lse_ref.shape[1] - rows)
                at = lse_ref.at[b, pl.ds(inside, rows), q_head]
                lse = plgpu.load(at, layout=mosaic.ROW_LAYOUT, optimized=False)
                # Base 2, and +inf on rows that saw nothing, so that exp2(logit - lse) is 0 there.
                lse_smem[slot, pl.ds(rows - (row - inside), rows)] = jnp.where(
                    lse == -jnp.inf, jnp.inf, lse * common.LOG2E
                )
                plgpu.barrier_arrive(lse_bar.at[slot])

            filled = jnp.minimum(total, stages)
            pl.loop(0, filled)(lambda i: load(i, wait=False))
            pl.loop(filled, total)(lambda i: load(i, wait=True))

            @pl.loop(total - filled, total)
            def _(i):
                plgpu.barrier_wait(free.at[mosaic.slot_of(i, stages)])

        pl.when(wg < wgs)(consume)
        pl.when(wg == wgs)(produce)

    swizzled = functools.partial(plgpu.SMEM, dtype=query.dtype, transforms=_swizzled(size))
    sums = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((batch, heads // together, s), jnp.float32),
        scratch_types=[
            swizzled((wgs, keys, size)),
            swizzled((stages, rows, size)),
            plgpu.SMEM((stages, 2 * rows), jnp.float32),
            plgpu.SMEM((wgs, keys), jnp.float32),
            plgpu.Barrier(num_barriers=wgs),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=wgs, num_barriers=stages),
        ],
        grid=(batch * heads // together // cohort, tiles, cohort),
        grid_names=("cohorts", "tiles", "heads"),
        num_threads=wgs + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=interpret,
    )(query, key, lse, extent)
    return sums.reshape(batch, kv_heads, group // together, s).sum(axis=2)


def _decline_what_it_cannot_run(query, key, value, scale, sliding_window, interpret):
    if not interpret:
        mosaic.decline_where_they_cannot_run()
    if sliding_window is not None:
        raise NotImplementedError("has no sliding window")
    common.decline_what_no_kernel_takes(query, key, value, scale)


def two_pass_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    query_lengths: Int[Array, "B"] | None,
    key_value_lengths: Int[Array, "B"] | None,
    query_offset: Int[Array, "B"] | None,
    *,
    scale: float,
    is_causal: bool,
    sliding_window: int | None,
    score_rows: common.ScoreRows,
    blocks: tuple[ForwardBlocks, ScoreBlocks] | None = None,
    interpret=None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B K S"], Float[Array, "B T N"]]:
    """`api.two_pass_attention` on Hopper. None for lengths means full, for the offset 0, for blocks the table's."""
    _decline_what_it_cannot_run(query, key, value, scale, sliding_window, interpret)
    if blocks is None:
        blocks = _BLOCKS[query.shape[3]]
    return _two_passes(
        query, key, value, query_lengths, key_value_lengths, query_offset, float(scale), is_causal, score_rows, blocks,
        interpret,
    )  # fmt: skip


def _last_values(value, lengths, size: int) -> Float[Array, "B size K H"]:
    """The block of `size` values in which each sequence ends, zero beyond its length.

    A probability of 0 times a NaN of padding would be NaN. Only this block mixes values and padding, so only this block
    is copied: blocks before it are whole, and none behind it is read.
    """
    index = (lengths // size * size)[:, None] + jnp.arange(size)
    block = jnp.take_along_axis(value, index[:, :, None, None], axis=1, mode="clip")
    return jnp.where((index < lengths[:, None])[:, :, None, None], block, 0)


@functools.partial(jax.jit, static_argnums=(6, 7, 8, 9, 10))
def _two_passes(
    query, key, value, query_lengths, key_value_lengths, query_offset, scale, is_causal, score_rows, blocks, interpret
):
    b, t, _, _ = query.shape
    s, kv_heads = key.shape[1:3]

    extent = common.extents(query, key, query_lengths, key_value_lengths, query_offset, score_rows)
    last_values = None if key_value_lengths is None else _last_values(value, key_value_lengths, blocks[0].keys)
    query, key, value = (jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, 0), (0, 0))) for x in (query, key, value))

    run = functools.partial(dict, scale=scale, is_causal=is_causal, interpret=interpret)
    output, lse = _forward(query, key, value, last_values, extent, **run(blocks=blocks[0]))
    if score_rows == 0:
        return output[:, :t], jnp.zeros((b, kv_heads, s), jnp.float32), lse[:, :t]
    whole_group = blocks[1].whole_group or common.takes_whole_group(score_rows, b * kv_heads * s)
    score_blocks = dataclasses.replace(blocks[1], whole_group=whole_group)
    tall_lse = jnp.pad(lse, ((0, 0), (0, max(score_blocks.rows - lse.shape[1], 0)), (0, 0)))
    scores = _column_sums(query, key, tall_lse, extent, **run(blocks=score_blocks))
    return output[:, :t], scores[..., :s], lse[:, :t]
