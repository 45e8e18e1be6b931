"""Device code of the Triton two-pass attention; the reason for it and the pictures stand in `triton.py`.

Sizes and scalars arrive negated: jax-triton compiles one more program for every argument that happens to be 1, and a
negative number never is. `extent` holds four numbers a sequence: query length, key length, offset, first counted row.
A row's position is its index plus the offset; a window of W means that a row sees the last W columns up to its own.
"""

import math

import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def load_block(
    base,
    first,
    length,
    stride,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    INSIDE: tl.constexpr,
):
    """Rows first ... first + SIZE - 1 of a [length, H] matrix as [SIZE, WIDTH]; what lies outside is 0, never read."""
    row = tl.arange(0, SIZE)
    column = tl.arange(0, WIDTH)
    at = base + first.to(tl.int64) * stride + row[:, None] * stride + column[None, :]
    if INSIDE and H == WIDTH:
        return tl.load(at)
    elif INSIDE:
        return tl.load(at, mask=(column < H)[None, :], other=0.0)
    elif H == WIDTH:
        return tl.load(at, mask=(row < length - first)[:, None], other=0.0)
    else:
        return tl.load(at, mask=(row < length - first)[:, None] & (column < H)[None, :], other=0.0)


@triton.jit
def blocks_of(x, SIZE: tl.constexpr):
    """ceil(max(x, 0) / SIZE)."""
    return (tl.maximum(x, 0) + (SIZE - 1)) // SIZE


@triton.jit
def whole_blocks_of(x, SIZE: tl.constexpr):
    return tl.maximum(x, 0) // SIZE


@triton.jit
def clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def sees(position, column, key_length, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    seen = column < key_length
    if CAUSAL:
        seen = seen & (column <= position)
    if WINDOW:
        seen = seen & (column > position - window)
    return seen


@triton.jit
def attend(
    output,
    maximum,
    total,
    q,
    k_base,
    v_base,
    position,
    first,
    last,
    key_length,
    kv_stride,
    factor,
    window,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The online softmax over blocks first ... last - 1 of the keys; logits are base 2."""
    for step in range(first, last):
        start = step * KEYS
        k = load_block(k_base, start, key_length, kv_stride, H, WIDTH, KEYS, not MASKED)
        logits = tl.dot(q, tl.trans(k))
        if MASKED:
            column = start + tl.arange(0, KEYS)
            seen = sees(position[:, None], column[None, :], key_length, window, CAUSAL, WINDOW)
            logits = tl.where(seen, logits, float("-inf"))
        new = tl.maximum(maximum, tl.max(logits, 1) * factor)
        shift = new
        if MASKED:
            shift = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(logits * factor - shift[:, None])
        shrink = tl.exp2(maximum - shift)
        total = total * shrink + tl.sum(p, 1)
        output = output * shrink[:, None]
        v = load_block(v_base, start, key_length, kv_stride, H, WIDTH, KEYS, not MASKED)
        output = tl.dot(p.to(v.dtype), v, output)
        maximum = new
    return output, maximum, total


@triton.jit
def forward_kernel(
    query,
    key,
    value,
    extent,
    factor,
    rows_padded,
    keys_padded,
    heads,
    kv_heads,
    window,
    out,
    lse,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Pass 1, one (query head, tile of rows, sequence): out [B, T, N, H] and the log-sum-exp [B, T, N]."""
    factor, window = -factor, -window
    rows_padded, keys_padded, heads, kv_heads = -rows_padded, -keys_padded, -heads, -kv_heads
    head, sequence = tl.program_id(0), tl.program_id(2)
    first_row = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS  # the heavy tiles start first
    query_length = tl.load(extent + sequence * 4)
    key_length = tl.load(extent + sequence * 4 + 1)
    offset = tl.load(extent + sequence * 4 + 2)
    stride, kv_stride = heads * H, kv_heads * H
    q_offset = sequence.to(tl.int64) * rows_padded * stride + head * H
    kv_offset = sequence.to(tl.int64) * keys_padded * kv_stride + head // (heads // kv_heads) * H
    k_base, v_base = key + kv_offset, value + kv_offset

    # Steps, in order: masked by the window, unmasked, masked (diagonal and end of the keys).
    end, unmasked = key_length, key_length
    if CAUSAL:
        end = tl.minimum(end, offset + tl.minimum(first_row + ROWS, query_length))
        unmasked = tl.minimum(unmasked, offset + first_row + 1)
    end = tl.where(first_row < query_length, end, 0)
    first, full, last = 0, 0, blocks_of(end, KEYS)
    if WINDOW:
        first = tl.minimum(whole_blocks_of(offset + first_row - window + 1, KEYS), last)
        full = clamp(blocks_of(offset + first_row + ROWS - window, KEYS), first, last)
    middle = clamp(whole_blocks_of(unmasked, KEYS), full, last)

    q = load_block(query + q_offset, first_row, query_length, stride, H, WIDTH, ROWS, False)
    row = first_row + tl.arange(0, ROWS)
    output = tl.zeros([ROWS, WIDTH], tl.float32)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if WINDOW:
        output, maximum, total = attend(
            output, maximum, total, q, k_base, v_base, row + offset, first, full, key_length, kv_stride, factor,
            window, H, WIDTH, KEYS, CAUSAL, WINDOW, True,
        )  # fmt: skip
    output, maximum, total = attend(
        output, maximum, total, q, k_base, v_base, row + offset, full, middle, key_length, kv_stride, factor,
        window, H, WIDTH, KEYS, CAUSAL, WINDOW, False,
    )  # fmt: skip
    output, maximum, total = attend(
        output, maximum, total, q, k_base, v_base, row + offset, middle, last, key_length, kv_stride, factor,
        window, H, WIDTH, KEYS, CAUSAL, WINDOW, True,
    )  # fmt: skip

    seen = (row < query_length) & (total > 0)
    filled = tl.where(seen, total, 1.0)
    output = tl.where(seen[:, None], output / filled[:, None], 0.0)
    exists = row < rows_padded
    column = tl.arange(0, WIDTH)
    at = q_offset + row.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(out + at, output.to(out.dtype.element_ty), mask=exists[:, None] & (column < H)[None, :])
    at = (sequence.to(tl.int64) * rows_padded + row) * heads + head
    tl.store(lse + at, tl.where(seen, (maximum + tl.log2(filled)) / LOG2E, float("-inf")), mask=exists)


@triton.jit
def receive(
    sums,
    k,
    q_base,
    lse_base,
    column,
    first_row,
    first,
    last,
    query_length,
    key_length,
    offset,
    heads,
    stride,
    factor,
    window,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds what every key receives from blocks first ... last - 1 of the rows."""
    for step in range(first, last):
        start = first_row + step * ROWS
        q = load_block(q_base, start, query_length, stride, H, WIDTH, ROWS, not MASKED)
        row = start + tl.arange(0, ROWS)
        if MASKED:
            lse = tl.load(lse_base + row.to(tl.int64) * heads, mask=row < query_length, other=float("-inf"))
        else:
            lse = tl.load(lse_base + row.to(tl.int64) * heads)
        # Base 2, and +inf on rows that saw nothing: they give 0.
        lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
        p = tl.exp2(tl.dot(k, tl.trans(q)) * factor - lse[None, :])
        if MASKED:
            seen = sees((row + offset)[None, :], column[:, None], key_length, window, CAUSAL, WINDOW)
            p = tl.where(seen, p, 0.0)
        sums += tl.sum(p, 1)
    return sums


@triton.jit
def scores_kernel(
    query,
    key,
    lse,
    extent,
    factor,
    rows_padded,
    keys_padded,
    heads,
    kv_heads,
    together,
    window,
    out,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Pass 2, one (`together` query heads of a group, tile of keys, sequence): out [B, N / together, S]."""
    factor, window, together = -factor, -window, -together
    rows_padded, keys_padded, heads, kv_heads = -rows_padded, -keys_padded, -heads, -kv_heads
    head, base, sequence = tl.program_id(0), tl.program_id(1) * KEYS, tl.program_id(2)
    query_length = tl.load(extent + sequence * 4)
    key_length = tl.load(extent + sequence * 4 + 1)
    offset = tl.load(extent + sequence * 4 + 2)
    first_row = tl.load(extent + sequence * 4 + 3)
    stride, kv_stride = heads * H, kv_heads * H
    kv_head = head * together // (heads // kv_heads)
    k_base = key + sequence.to(tl.int64) * keys_padded * kv_stride + kv_head * H

    # Steps, in order: masked (diagonal), unmasked, masked (far end of the window and the last rows).
    end, unmasked = query_length, query_length
    if CAUSAL:
        first_row = tl.maximum(first_row, base - offset)
    if WINDOW:
        end = tl.minimum(end, base + KEYS - 1 + window - offset)
        unmasked = tl.minimum(end, base + window - offset)
    last = tl.where(base < key_length, blocks_of(end - first_row, ROWS), 0)
    diagonal = 0
    if CAUSAL:
        diagonal = tl.minimum(blocks_of(base + (KEYS - 1) - offset - first_row, ROWS), last)
    full = clamp(whole_blocks_of(unmasked - first_row, ROWS), diagonal, last)

    k = load_block(k_base, base, key_length, kv_stride, H, WIDTH, KEYS, False)
    column = base + tl.arange(0, KEYS)
    sums = tl.zeros([KEYS], tl.float32)
    for g in range(0, together):
        q_head = head * together + g
        q_base = query + sequence.to(tl.int64) * rows_padded * stride + q_head * H
        lse_base = lse + sequence.to(tl.int64) * rows_padded * heads + q_head
        if CAUSAL:
            sums = receive(
                sums, k, q_base, lse_base, column, first_row, 0, diagonal, query_length, key_length, offset, heads,
                stride, factor, window, H, WIDTH, ROWS, CAUSAL, WINDOW, True,
            )  # fmt: skip
        sums = receive(
            sums, k, q_base, lse_base, column, first_row, diagonal, full, query_length, key_length, offset, heads,
            stride, factor, window, H, WIDTH, ROWS, CAUSAL, WINDOW, False,
        )  # fmt: skip
        sums = receive(
            sums, k, q_base, lse_base, column, first_row, full, last, query_length, key_length, offset, heads,
            stride, factor, window, H, WIDTH, ROWS, CAUSAL, WINDOW, True,
        )  # fmt: skip
    at = (sequence.to(tl.int64) * (heads // together) + head) * keys_padded + column
    tl.store(out + at, tl.where(column < key_length, sums, 0.0), mask=column < keys_padded)
