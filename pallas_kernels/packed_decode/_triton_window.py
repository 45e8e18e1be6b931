"""Device code for the dense window behind a packed segment: one warp takes some of its tokens, in the packed kernel's
launch.

A window is a hundred rows beside tens of thousands of packed ones, microseconds of latency and nothing to read: as a
launch of its own it costs more than its work, and beside warps that stream codes it costs nothing.

    logits = keys [16 tokens, H] . queries [H, 8]: a row's 16 bytes are two operand words of either of two products, in
        keys and queries alike, for a contraction may run in any order.
    output = values^T [16 channels, 16 tokens] . probabilities [16 tokens, 8]: a lane reads 16 bytes of four rows, and
        the lower and upper halves of two rows' words are two channels of a pair of tokens.
"""
# Triton builds tuples by `+` alone.
# ruff: noqa: RUF005

import triton
import triton.language as tl

from pallas_kernels.packed_decode._triton_instructions import (
    column_max,
    column_sum,
    mma,
    pair,
    read4,
    transpose8,
    write,
)


@triton.jit
def read_row(pointer, row, lane_part, valid, CHUNK: tl.constexpr, H: tl.constexpr):
    """16 bytes of each of H / CHUNK chunks of a row of 16-bit numbers, as words; the lane's are the `lane_part`-th."""
    words = ()
    for chunk in tl.static_range(H // CHUNK):
        address = pointer.to(tl.int64) + 2 * (row * H + CHUNK * chunk + 8 * lane_part)
        x = read4(address, valid)
        words = words + (x[0], x[1], x[2], x[3])
    return words


@triton.jit
def window_logits(q, low, high, BFLOAT16: tl.constexpr, H: tl.constexpr):
    """Logits of 16 tokens for eight queries: rows g and g + 8, each for the queries 2t and 2t + 1."""
    nil = tl.zeros([32], tl.float32)
    d = (nil, nil, nil, nil)
    for i in tl.static_range(H // 16):
        d = mma(low[2 * i], high[2 * i], low[2 * i + 1], high[2 * i + 1], q[2 * i], q[2 * i + 1], d, BFLOAT16)
    return d


@triton.jit
def window_values(acc, fade, p, rows, BFLOAT16: tl.constexpr, H: tl.constexpr):
    """acc faded, plus the values of 16 tokens: `rows` are the lane's words of the tokens 2t, 2t + 1, 2t + 8, 2t + 9."""
    done = ()
    for i in tl.static_range(H // 16):
        x = acc[i]
        x = (x[0] * fade[0], x[1] * fade[1], x[2] * fade[0], x[3] * fade[1])
        a0 = (rows[0][i] & 0xFFFF) | (rows[1][i] << 16)
        a1 = ((rows[0][i] >> 16) & 0xFFFF) | (rows[1][i] & -65536)
        a2 = (rows[2][i] & 0xFFFF) | (rows[3][i] << 16)
        a3 = ((rows[2][i] >> 16) & 0xFFFF) | (rows[3][i] & -65536)
        done = done + (mma(a0, a1, a2, a3, p[0], p[1], x, BFLOAT16),)
    return done


@triton.jit
def window_share(
    q,
    k,
    v,
    position,
    start,
    first,
    last,
    softmax_scale,
    first_row,
    rows,
    out,
    stats,
    place,
    BFLOAT16: tl.constexpr,
    H: tl.constexpr,
):
    """Attention of the eight queries from `first_row` on over the tokens first ... last - 1 of a head's window.

    `position` is row g's place among the queries, `start` the window's first row in k and v, `place` the share's first
    row in `out` and `stats`. Writes what `decode_kernel` does; nothing beyond `last` is read.
    """
    lane = tl.arange(0, 32)
    g = lane // 4
    t = lane % 4
    factor = softmax_scale * 1.4426950408889634
    nil = tl.zeros([32], tl.float32)
    low = tl.full([32], -float("inf"), tl.float32)
    acc = ()
    for _ in tl.static_range(H // 16):
        acc = acc + ((nil, nil, nil, nil),)
    total = (nil, nil)
    maximum = (low, low)
    queries = read_row(q, position, t, first_row + g < rows, 32, H)
    for at in range(first, last, 16):
        keys = ()
        for b in tl.static_range(2):
            token = at + g + 8 * b
            keys = keys + (read_row(k, start + token, t, token < last, 32, H),)
        values = ()
        for b in tl.static_range(4):
            token = at + 2 * t + b % 2 + 8 * (b // 2)
            values = values + (read_row(v, start + token, g, token < last, 64, H),)
        d = window_logits(queries, keys[0], keys[1], BFLOAT16, H)
        x = ()
        for b in tl.static_range(2):
            seen = at + g + 8 * b < last
            for i in tl.static_range(2):
                x = x + (tl.where(seen, d[2 * b + i] * factor, -float("inf")),)
        new = (
            tl.maximum(maximum[0], column_max(tl.maximum(x[0], x[2]), lane)),
            tl.maximum(maximum[1], column_max(tl.maximum(x[1], x[3]), lane)),
        )
        fade = (tl.exp2(maximum[0] - new[0]), tl.exp2(maximum[1] - new[1]))
        e = (tl.exp2(x[0] - new[0]), tl.exp2(x[1] - new[1]), tl.exp2(x[2] - new[0]), tl.exp2(x[3] - new[1]))
        p = (transpose8(pair(e[0], e[1], BFLOAT16)), transpose8(pair(e[2], e[3], BFLOAT16)))
        total = (total[0] * fade[0] + e[0] + e[2], total[1] * fade[1] + e[1] + e[3])
        acc = window_values(acc, fade, p, values, BFLOAT16, H)
        maximum = new

    for i in tl.static_range(2):
        query = first_row + 2 * t + i
        at = out + (place + query).to(tl.int64) * H + 8 * g
        for tile in tl.static_range(H // 16):
            for b in tl.static_range(2):
                write(at + 64 * (tile // 4) + 2 * (tile % 4) + b, acc[tile][2 * b + i], query < rows)
        sum = column_sum(total[i], lane)
        write(stats + (place + query) * 2, maximum[i], (query < rows) & (g == 0))
        write(stats + (place + query) * 2 + 1, sum, (query < rows) & (g == 0))
