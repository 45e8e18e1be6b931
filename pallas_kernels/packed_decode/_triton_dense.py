"""Device code for dense segments: a tile of query rows walks over keys and values in their own dtype.

The reason for this file and its limit stand in `triton.py`.
"""

import triton
import triton.language as tl

from pallas_kernels._triton_hadamard import rotate


@triton.jit
def of_rows(rows, channel, KEY: tl.constexpr, KEYS: tl.constexpr):
    """Which numbers of these rows of keys there are."""
    there = rows[:, None]
    if KEY < KEYS:
        there = there & (channel < KEY)[None, :]
    return there


@triton.jit
def dense_kernel(
    q,
    k,
    v,
    lengths,
    longest,
    softmax_scale,
    capacity,
    heads,
    group,
    rows,
    splits,
    out,
    stats,
    logits,
    H: tl.constexpr,
    KEY: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
    PER_QUERY: tl.constexpr,
    LOGITS: tl.constexpr,
):
    """Grid (tiles of ROWS rows, splits, B K). Split i of a sequence takes the i-th of even shares of its tokens.

    Writes, per split and query row: unnormalised output [B K, splits, rows, H] and (max in base 2, sum)
    [B K, splits, rows, 2]; with LOGITS the logits in base 2 of the tokens held, [B K, rows, capacity]. A split without
    tokens writes zeros, (-inf, 0) and no logits. The sizes arrive negated, as in `decode_kernel`. Keys have KEY
    channels, of which KEYS is the next power of two; what they have fewer than values is never loaded.
    """
    capacity, heads, group, rows, splits = -capacity, -heads, -group, -rows, -splits
    row = ROWS * tl.program_id(0) + tl.arange(0, ROWS)
    split = tl.program_id(1)
    head = tl.program_id(2)
    channel = tl.arange(0, H)
    token = tl.arange(0, TOKENS)
    real = row < rows
    batch = head // heads
    query = batch * (rows // group) + row // group
    position = (query * heads + head % heads) * group + row % group
    if PER_QUERY:
        visible = tl.load(lengths + query * heads + head % heads, mask=real, other=0)
        held = tl.load(longest + head)
    else:
        held = tl.load(longest + batch)
        visible = tl.where(real, held, 0)
    tiles = (held + TOKENS - 1) // TOKENS
    first = (split * (tiles // splits) + tl.minimum(split, tiles % splits)) * TOKENS
    last = first + (tiles // splits + tl.where(split < tiles % splits, 1, 0)) * TOKENS
    last = tl.minimum(last, held)
    start = head.to(tl.int64) * capacity
    key_channel = tl.arange(0, KEYS)
    queries = tl.load(
        q + position[:, None] * KEY + key_channel[None, :], mask=of_rows(real, key_channel, KEY, KEYS), other=0.0
    )
    queries = queries.to(k.dtype.element_ty)
    factor = softmax_scale * 1.4426950408889634

    acc = tl.zeros([ROWS, H], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    maximum = tl.full([ROWS], -float("inf"), tl.float32)
    for at in tl.range(first, last, TOKENS):
        index = at + token
        inside = index < last
        place = start + index[:, None]
        keys = tl.load(k + place * KEY + key_channel[None, :], mask=of_rows(inside, key_channel, KEY, KEYS), other=0.0)
        x = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * factor
        x = tl.where(index[None, :] < tl.minimum(visible, last)[:, None], x, -float("inf"))
        if LOGITS:
            to = (head * rows + row)[:, None].to(tl.int64) * capacity + index[None, :]
            tl.store(logits + to, x, mask=real[:, None] & inside[None, :])
        new = tl.maximum(maximum, tl.max(x, 1))
        shift = tl.where(new == -float("inf"), 0.0, new)
        p = tl.exp2(x - shift[:, None])
        fade = tl.exp2(maximum - shift)
        total = total * fade + tl.sum(p, 1)
        values = tl.load(v + place * H + channel[None, :], mask=inside[:, None], other=0.0)
        acc = tl.dot(p.to(values.dtype), values, acc * fade[:, None], input_precision=PRECISION)
        maximum = new

    part = (head * splits + split) * rows + row
    tl.store(out + part[:, None].to(tl.int64) * H + channel[None, :], acc, mask=real[:, None])
    tl.store(stats + part * 2, maximum, mask=real)
    tl.store(stats + part * 2 + 1, total, mask=real)


@triton.jit
def merge_kernel(
    part,
    stats,
    other_part,
    other_stats,
    unit,
    balance,
    heads,
    group,
    rows,
    splits,
    other_splits,
    out,
    first,
    second,
    PADDED: tl.constexpr,
    OTHER: tl.constexpr,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ROTATE: tl.constexpr,
    BALANCED: tl.constexpr,
):
    """Grid (B K rows, H / WIDTH): joins the splits of one query row, WIDTH channels a program, all loads at once.

    Joins those of another segment with them if OTHER > 0. Writes, with NORMALIZE, the softmax's output and its natural
    log-sum-exp (`second` is unused), else an unnormalised output, its maximum and its sum. With ROTATE the program has
    all channels of its row, and the output is rotated, in units of its head and, if BALANCED, divided by channels' own.
    """
    heads, group, rows, splits, other_splits = -heads, -group, -rows, -splits, -other_splits
    index = tl.program_id(0)
    head = index // rows
    row = index % rows
    channel = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    # Asked for first: it comes from far away, as what a step reads once does.
    scale = tl.load(unit + head).to(tl.float32) if ROTATE else 1.0
    if BALANCED:
        by = tl.load(balance + head * H + channel).to(tl.float32)
    every = tl.arange(0, PADDED)
    at = (head * splits + every) * rows + row
    x = tl.load(part + at.to(tl.int64)[:, None] * H + channel[None, :], mask=(every < splits)[:, None], other=0.0)
    maxima = tl.load(stats + at * 2, mask=every < splits, other=-float("inf"))
    totals = tl.load(stats + at * 2 + 1, mask=every < splits, other=0.0)
    top = tl.max(maxima, 0)
    if OTHER > 0:
        every = tl.arange(0, OTHER)
        at = (head * other_splits + every) * rows + row
        held = every < other_splits
        y = tl.load(other_part + at.to(tl.int64)[:, None] * H + channel[None, :], mask=held[:, None], other=0.0)
        other_maxima = tl.load(other_stats + at * 2, mask=held, other=-float("inf"))
        other_totals = tl.load(other_stats + at * 2 + 1, mask=held, other=0.0)
        top = tl.maximum(top, tl.max(other_maxima, 0))
    shift = tl.where(top == -float("inf"), 0.0, top)
    weight = tl.exp2(maxima - shift)
    result = tl.sum(x * weight[:, None], 0)
    total = tl.sum(totals * weight, 0)
    if OTHER > 0:
        weight = tl.exp2(other_maxima - shift)
        result += tl.sum(y * weight[:, None], 0)
        total += tl.sum(other_totals * weight, 0)
    position = ((head // heads * (rows // group) + row // group) * heads + head % heads) * group + row % group
    to = out + position.to(tl.int64) * H + channel
    if NORMALIZE:
        filled = tl.where(total > 0, total, 1.0)
        result *= scale / filled
        if ROTATE:
            result = tl.reshape(rotate(tl.reshape(result, [1, H]), 1, H), [H])
        if BALANCED:
            result /= by
        tl.store(to, result.to(out.dtype.element_ty))
        if tl.program_id(1) == 0:
            tl.store(
                first + position, tl.where(total > 0, (shift + tl.log2(filled)) * 0.6931471805599453, -float("inf"))
            )
    else:
        tl.store(to, result)
        if tl.program_id(1) == 0:
            tl.store(first + position, top * 0.6931471805599453)
            tl.store(second + position, total)
