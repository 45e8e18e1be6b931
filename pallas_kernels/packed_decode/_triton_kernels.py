"""Device code of the Triton decode kernel: one warp, one lane per element of a [32] tensor.

The reason for this file, the pictures and the arithmetic of its limit stand in `triton.py`. Every tensor here has shape
[32] and means one 32-bit register of a warp; tuples of them are register fragments. Lane = 4 g + t throughout, the
naming of the PTX manual for `mma.m16n8k16`.
"""
# Triton builds tuples by `+` alone.
# ruff: noqa: RUF005

import triton
import triton.language as tl

from pallas_kernels.packed_decode._triton_instructions import (
    close_group,
    column_max,
    limit_registers,
    mma,
    pair,
    read,
    ring,
    shuffle,
    transpose8,
    wait_group,
    warp_barrier,
    write,
)
from pallas_kernels.packed_decode._triton_metadata import (
    bytes_of,
    clear_metadata,
    scale_exponent,
    token_metadata,
)
from pallas_kernels.packed_decode._triton_products import (
    channel_key_products,
    fetch,
    fetch_key_codes,
    key_products,
    plane_unit,
    row_of,
    value_products,
)
from pallas_kernels.packed_decode._triton_window import window_share


@triton.jit
def tile_logits(
    d,
    z,
    factor,
    t,
    TILE: tl.constexpr,
    PART: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Logits of one tile, base 2: rows g and g + 8, each for the queries 2t and 2t + 1."""
    W: tl.constexpr = TILE % 2
    RUN: tl.constexpr = TILE // 2
    GROUPS: tl.constexpr = 128 // GROUP
    logits = ()
    for b in tl.static_range(2):
        for i in tl.static_range(2):
            zero = z[i]
            if GROUPS > 1:
                zero = shuffle(zero, t + 4 * (((32 * RUN + 16 * W) // GROUP) * 8 // GROUPS))
            logits = logits + (d[2 * b + i] * (factor[i] * plane_unit(PART, RUN)) + zero * factor[i],)
    return logits


@triton.jit
def own_tile(d, low, TILE: tl.constexpr, BITS: tl.constexpr):
    """The plane of tile TILE where `low`, else of the tile half a block on; tiles are nested, but of three bits."""
    BACK: tl.constexpr = 2 * (BITS // 2)  # tiles from a plane to the next
    own = ()
    for i in tl.static_range(4):
        x = d[TILE][i]
        y = d[TILE + 4][i]
        if BITS != 3:
            if TILE >= BACK:
                x = x - d[TILE - BACK][i]
            y = y - d[TILE + 4 - BACK][i]
        own = own + (tl.where(low, x, y),)
    return own


@triton.jit
def twin_logits(d, z, factor, t, BITS: tl.constexpr):
    """Logits in base 2 of four tiles, those of a query's half of the block: tile 2 j + w of its j-th run of 32."""
    PART: tl.constexpr = 2 if BITS == 3 else BITS
    low = t < 2
    logits = ()
    for run in tl.static_range(2):
        unit = tl.where(low, plane_unit(PART, run), plane_unit(PART, run + 2))
        by = (factor[0] * unit, factor[1] * unit)
        for w in tl.static_range(2):
            x = own_tile(d, low, 2 * run + w, BITS)
            for b in tl.static_range(2):
                for i in tl.static_range(2):
                    logits = logits + (x[2 * b + i] * by[i] + z[i] * factor[i],)
    return logits


@triton.jit
def fetch_keys(
    memory, codes, scale, zero, block, valid, lane,
    BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """Starts the copies of a block's keys; one group."""
    CODES: tl.constexpr = 16 * BITS * H
    METADATA: tl.constexpr = 128 * H // GROUP * bytes_of(KIND)
    block = block.to(tl.int64)
    fetch_key_codes(memory, codes + block * CODES, valid, lane, BITS, H)
    fetch(memory + CODES, scale + block * METADATA, valid, lane, METADATA)
    fetch(memory + (CODES + METADATA), zero + block * METADATA, valid, lane, METADATA)
    close_group(lane)


@triton.jit
def fetch_values(
    memory, codes, scale, zero, block, valid, lane,
    BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """Starts the copies of a block's values; one group."""
    CODES: tl.constexpr = 16 * BITS * H
    METADATA: tl.constexpr = (H // GROUP) * 128 * bytes_of(KIND)
    block = block.to(tl.int64)
    fetch(memory, codes + block * CODES, valid, lane, CODES)
    fetch(memory + CODES, scale + block * METADATA, valid, lane, METADATA)
    fetch(memory + (CODES + METADATA), zero + block * METADATA, valid, lane, METADATA)
    close_group(lane)


@triton.jit
def hide_logits(logits, left, g, NARROW: tl.constexpr):
    """-inf for the tokens from `left` on, of as many tiles as there are."""
    hidden = ()
    for tile in tl.static_range(len(logits) // 4):
        for b in tl.static_range(2):
            seen = 32 * (tile // 2) + row_of(g, tile % 2, b, NARROW) < left
            for i in tl.static_range(2):
                hidden = hidden + (tl.where(seen, logits[4 * tile + 2 * b + i], -float("inf")),)
    return hidden


@triton.jit
def store_logits(logits, to, rows, row_size, left, g, NARROW: tl.constexpr):
    """The logits of the first `left` tokens, for the lane's two queries."""
    for tile in tl.static_range(len(logits) // 4):
        for b in tl.static_range(2):
            token = 32 * (tile // 2) + row_of(g, tile % 2, b, NARROW)
            for i in tl.static_range(2):
                write(to + i * row_size + token, logits[4 * tile + 2 * b + i], (token < left) & (i < rows))


@triton.jit
def attend_block(
    state,
    q,
    factor,
    memory,
    sources,
    block,
    last,
    left,
    lane,
    row_logits,
    row_count,
    row_size,
    KBITS: tl.constexpr,
    KGROUP: tl.constexpr,
    KAXIS: tl.constexpr,
    KKIND: tl.constexpr,
    VBITS: tl.constexpr,
    VGROUP: tl.constexpr,
    VKIND: tl.constexpr,
    H: tl.constexpr,
    LOGITS: tl.constexpr,
    TWIN: tl.constexpr,
):
    """One block of 128 tokens, of which the first `left` count; starts the copies of the next block.

    `row_logits` is where the first of the lane's two queries has its logits, if `row_count` is above 0.
    """
    acc, sums, reference, maximum = state
    g = lane // 4
    t = lane % 4
    NARROW: tl.constexpr = KGROUP == 16 and KAXIS == 0
    KPART: tl.constexpr = 2 if KBITS == 3 else KBITS
    VGROUPS: tl.constexpr = H // VGROUP
    VBYTES: tl.constexpr = bytes_of(VKIND)
    KCODES: tl.constexpr = 16 * KBITS * H
    KMETADATA: tl.constexpr = 128 * H // KGROUP * bytes_of(KKIND)
    VCODES: tl.constexpr = 16 * VBITS * H
    more = tl.where(lane + block + 1 < lane + last, 1, 0)
    values = memory + (KCODES + 2 * KMETADATA)
    vs = values + VCODES
    vz = vs + VGROUPS * 128 * VBYTES

    wait_group(lane)
    scale = memory + KCODES
    zero = scale + KMETADATA
    # Logits in base 2; columns 2t and 2t + 1 are the lane's two queries.
    logits = ()
    if KAXIS == 0:
        d, z = key_products(q, memory, scale, zero, g, t, KBITS, KGROUP, KKIND, H, NARROW, TWIN)
        if TWIN:
            # Zero points of the halves stand in rows 0 and 4.
            z = (shuffle(z[0], 16 * (t // 2) + t), shuffle(z[1], 16 * (t // 2) + t))
            logits = twin_logits(d, z, factor, t, KBITS)
        else:
            for tile in tl.static_range(8):
                logits = logits + tile_logits(d[tile], z, factor, t, tile, KPART, KGROUP)
    else:
        x = channel_key_products(q, memory, scale, zero, g, t, KBITS, KGROUP, KKIND, H)
        for tile in tl.static_range(8):
            for i in tl.static_range(4):
                logits = logits + (x[tile][i] * factor[i % 2],)
    warp_barrier(lane)
    fetch_keys(memory, sources[0], sources[1], sources[2], block + 1, more, lane, KBITS, KGROUP, KKIND, H)
    wait_group(lane)

    ahead = 64 * (t // 2) if TWIN else 0  # tokens of the block before the lane's first
    if left < 128:
        logits = hide_logits(logits, left - ahead, g, NARROW)
        clear_metadata(vs, left, lane, VGROUPS, VKIND)
        clear_metadata(vz, left, lane, VGROUPS, VKIND)
        warp_barrier(lane)
    if LOGITS:
        store_logits(logits, row_logits + (128 * block + ahead), row_count, row_size, left - ahead, g, NARROW)
    top = (logits[0], logits[1])
    for i in tl.static_range(1, len(logits) // 2):
        top = (tl.maximum(top[0], logits[2 * i]), tl.maximum(top[1], logits[2 * i + 1]))
    top = (column_max(top[0], lane), column_max(top[1], lane))
    maximum = (tl.maximum(maximum[0], top[0]), tl.maximum(maximum[1], top[1]))

    # Probabilities are kept as 2^15 p where value scales allow it, for float16's sake.
    lift = scale_exponent(vs, lane, VGROUPS, VKIND) - 15.0
    new = (tl.maximum(reference[0], top[0] + lift), tl.maximum(reference[1], top[1] + lift))
    fade = (tl.exp2(reference[0] - new[0]), tl.exp2(reference[1] - new[1]))
    faded = ()
    for i in tl.static_range(H // 16):
        x = acc[i]
        faded = faded + ((x[0] * fade[0], x[1] * fade[1], x[2] * fade[0], x[3] * fade[1]),)
    sums = (sums[0] * fade[0], sums[1] * fade[1], sums[2] * fade[0], sums[3] * fade[1])

    p = ()
    for i in tl.static_range(len(logits) // 2):
        p = p + (transpose8(pair(tl.exp2(logits[2 * i] - new[0]), tl.exp2(logits[2 * i + 1] - new[1]))),)

    # Rows 0..7: probability . zero points, TWIN in rows 0..3 of the lower half; rows 8..15: their sum.
    one = tl.full([32], 0x3C003C00, tl.int32)
    first = 64 * (g // 4) + 128 * (g % 4 * VGROUPS // 4) if TWIN else 128 * (g * VGROUPS // 8)
    for run in tl.static_range(len(logits) // 8):
        zeros = token_metadata(vz + (first + 32 * run) * VBYTES, t, NARROW, VKIND)
        sums = mma(zeros[0], one, zeros[1], one, p[4 * run], p[4 * run + 1], sums)
        sums = mma(zeros[2], one, zeros[3], one, p[4 * run + 2], p[4 * run + 3], sums)

    acc = value_products(faded, p, values, vs, g, t, VBITS, VGROUP, VKIND, H, NARROW, TWIN)
    warp_barrier(lane)
    fetch_values(values, sources[3], sources[4], sources[5], block + 1, more, lane, VBITS, VGROUP, VKIND, H)
    return acc, sums, new, maximum


@triton.jit
def load_queries(q, row, t, valid, H: tl.constexpr):
    """The warp's eight queries as the right operand of key products, and the power of two they were divided by.

    Returns:
        pairs: register 8 h + 2 k + i holds channels 64 h + 16 t + 4 k + 2 i and the next.
        power: 2^e with all of row g's numbers below it, in lane (g, t).
    """
    x = ()
    largest = tl.zeros([32], tl.float32)
    for i in tl.static_range(H // 4):
        y = read(q + row + 64 * (i // 16) + 16 * t + i % 16, valid).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(y))
        x = x + (y,)
    lane = tl.arange(0, 32)
    largest = tl.maximum(largest, shuffle(largest, lane ^ 1))
    largest = tl.maximum(largest, shuffle(largest, lane ^ 2))
    exponent = tl.minimum(tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) & 255, 1), 252)
    down = ((253 - exponent) << 23).to(tl.float32, bitcast=True)
    power = ((exponent + 1) << 23).to(tl.float32, bitcast=True)
    pairs = ()
    for i in tl.static_range(H // 8):
        pairs = pairs + (pair(x[2 * i] * down, x[2 * i + 1] * down),)
    return pairs, power


@triton.jit
def packed_share(
    q,
    sources,
    position,
    length,
    first,
    last,
    softmax_scale,
    first_row,
    rows,
    out,
    stats,
    logits,
    place,
    row_size,
    KBITS: tl.constexpr,
    KGROUP: tl.constexpr,
    KAXIS: tl.constexpr,
    KKIND: tl.constexpr,
    VBITS: tl.constexpr,
    VGROUP: tl.constexpr,
    VKIND: tl.constexpr,
    H: tl.constexpr,
    LOGITS: tl.constexpr,
    TWIN: tl.constexpr,
):
    """Attention of the eight queries from `first_row` on over the blocks first ... last - 1 of a head.

    TWIN there are four at most, and columns 4 ... 7 are the same again: the first four attend to the lower halves of
    the blocks, the others to the upper ones, and both are merged at the end.

    `sources` are byte addresses of the head's key codes, scales and zero points, then of its values'; `position` is
    column g's place among the queries, `logits` where the head has those of its first row, `place` the share's first
    row in `out` and `stats`.
    """
    lane = tl.arange(0, 32)
    g = lane // 4
    t = lane % 4
    nil = tl.zeros([32], tl.float32)
    low = tl.full([32], -float("inf"), tl.float32)
    acc = ()
    for _ in tl.static_range(H // 16):
        acc = acc + ((nil, nil, nil, nil),)
    sums = (nil, nil, nil, nil)
    # An upper half may have seen nothing yet: differences from this stay numbers.
    least = tl.full([32], -3e38, tl.float32)
    reference = (least, least) if TWIN else (low, low)
    maximum = (low, low)
    COLUMNS: tl.constexpr = 4 if TWIN else 8

    if first < last:
        KBLOCK: tl.constexpr = 16 * KBITS * H
        VBLOCK: tl.constexpr = 16 * VBITS * H
        KMETA: tl.constexpr = 128 * H // KGROUP * bytes_of(KKIND)
        VMETA: tl.constexpr = (H // VGROUP) * 128 * bytes_of(VKIND)
        memory = ring(lane, KBLOCK + 2 * KMETA + VBLOCK + 2 * VMETA)
        yes = tl.full([32], 1, tl.int32)
        values = memory + (KBLOCK + 2 * KMETA)
        fetch_keys(memory, sources[0], sources[1], sources[2], first, yes, lane, KBITS, KGROUP, KKIND, H)
        fetch_values(values, sources[3], sources[4], sources[5], first, yes, lane, VBITS, VGROUP, VKIND, H)
        pairs, power = load_queries(q, position * H, t, first_row + g % COLUMNS < rows, H)
        # power of row 2t and 2t + 1 sits in lanes 8t and 8t + 4
        factor = (
            shuffle(power, 8 * t) * (softmax_scale * 1.4426950408889634),
            shuffle(power, 8 * t + 4) * (softmax_scale * 1.4426950408889634),
        )
        query = first_row + 2 * t % COLUMNS
        row_logits = logits + query.to(tl.int64) * row_size
        for block in range(first, last):
            acc, sums, reference, maximum = attend_block(
                (acc, sums, reference, maximum), pairs, factor, memory, sources, block, last,
                length - 128 * block, lane, row_logits, rows - query, row_size,
                KBITS, KGROUP, KAXIS, KKIND, VBITS, VGROUP, VKIND, H, LOGITS, TWIN,
            )  # fmt: skip
        twin = lane ^ 2
        if TWIN:
            maximum = (
                tl.maximum(maximum[0], shuffle(maximum[0], twin)),
                tl.maximum(maximum[1], shuffle(maximum[1], twin)),
            )
        to_maximum = (tl.exp2(reference[0] - maximum[0]), tl.exp2(reference[1] - maximum[1]))
        VGROUPS: tl.constexpr = H // VGROUP
        for i in tl.static_range(2):
            query = first_row + 2 * t % COLUMNS + i
            base = (place + query).to(tl.int64) * H
            for tile in tl.static_range(H // 16):
                zero = sums[i]
                if TWIN:
                    zero = shuffle(zero, t + 16 * (t // 2) + 4 * ((16 * tile // VGROUP) * 4 // VGROUPS))
                elif VGROUPS > 1:
                    zero = shuffle(zero, t + 4 * ((16 * tile // VGROUP) * 8 // VGROUPS))
                for b in tl.static_range(2):
                    x = (acc[tile][2 * b + i] * 16777216.0 + zero) * to_maximum[i]
                    if TWIN:
                        x += shuffle(x, twin)
                    write(out + base + 16 * tile + 8 * b + g, x, (query < rows) & (2 * t < COLUMNS))
        total = (sums[2] * to_maximum[0], sums[3] * to_maximum[1])
        if TWIN:
            total = (total[0] + shuffle(total[0], twin), total[1] + shuffle(total[1], twin))
        sums = (sums[0], sums[1], total[0], total[1])
    else:
        for i in tl.static_range(H // 4):
            empty_row = first_row + i // (H // 32)
            nowhere = (place + empty_row).to(tl.int64) * H + 32 * (i % (H // 32))
            write(out + nowhere + lane, nil, empty_row < rows)

    for i in tl.static_range(2):
        query = first_row + 2 * t + i
        write(stats + (place + query) * 2, maximum[i], (query < rows) & (g == 0) & (2 * t < COLUMNS))
        write(stats + (place + query) * 2 + 1, sums[2 + i], (query < rows) & (g == 0) & (2 * t < COLUMNS))


@triton.jit
def decode_kernel(
    q,
    kc,
    ks,
    kz,
    vc,
    vs,
    vz,
    lengths,
    wq,
    wk,
    wv,
    wlengths,
    softmax_scale,
    capacity,
    heads,
    group,
    rows,
    splits,
    window,
    wsplits,
    all_heads,
    out,
    stats,
    logits,
    KBITS: tl.constexpr,
    KGROUP: tl.constexpr,
    KAXIS: tl.constexpr,
    KKIND: tl.constexpr,
    VBITS: tl.constexpr,
    VGROUP: tl.constexpr,
    VKIND: tl.constexpr,
    H: tl.constexpr,
    REGISTERS: tl.constexpr,
    PER_HEAD: tl.constexpr,
    LOGITS: tl.constexpr,
    WINDOW: tl.constexpr,
    TWIN: tl.constexpr,
):
    """Grid (row tiles, B K shares). The first `splits` shares of a sequence are even ones of its blocks.

    With WINDOW (1 float16, 2 bfloat16) `wsplits` shares of a window wk, wv [B, K, window, H] of `wlengths` [B] tokens
    follow, which the queries wq meet. Writes, per share and query row: unnormalised output [B K, shares, rows, H] and
    (max in base 2, sum) [B K, shares, rows, 2]; with LOGITS the logits in base 2 of the packed tokens held,
    [B K, rows, 128 capacity]. A share without tokens writes zeros, (-inf, 0) and no logits.

    The eight sizes arrive negated: for an argument of 1 jax-triton would compile a program of its own.
    """
    limit_registers(REGISTERS)
    capacity, heads, group, rows = -capacity, -heads, -group, -rows
    splits, window, wsplits, all_heads = -splits, -window, -wsplits, -all_heads
    first_row = 8 * tl.program_id(0)
    # Programs over codes come before any over a window: only by themselves do they spread evenly over processors.
    index = tl.program_id(1)
    packed = all_heads * splits
    head = tl.where(index < packed, index // splits, (index - packed) // tl.maximum(wsplits, 1))
    share = tl.where(index < packed, index % splits, splits + (index - packed) % tl.maximum(wsplits, 1))
    batch = head // heads
    row = first_row + tl.arange(0, 32) // 4 % (4 if TWIN else 8)
    position = ((batch * (rows // group) + row // group) * heads + head % heads) * group + row % group
    place = (head * (splits + wsplits) + share) * rows
    if share < splits:
        length = tl.load(lengths + (head if PER_HEAD else batch))
        blocks = (length + 127) // 128
        # Shares differ by a block at most: rounded up alike, a block too many would be one in each.
        first = share * (blocks // splits) + tl.minimum(share, blocks % splits)
        last = first + blocks // splits + tl.where(share < blocks % splits, 1, 0)
        start = head.to(tl.int64) * capacity
        KMETA: tl.constexpr = 128 * H // KGROUP * bytes_of(KKIND)
        VMETA: tl.constexpr = (H // VGROUP) * 128 * bytes_of(VKIND)
        sources = (
            kc.to(tl.int64) + start * (16 * KBITS * H),
            ks.to(tl.int64) + start * KMETA,
            kz.to(tl.int64) + start * KMETA,
            vc.to(tl.int64) + start * (16 * VBITS * H),
            vs.to(tl.int64) + start * VMETA,
            vz.to(tl.int64) + start * VMETA,
        )
        row_size = 128 * capacity
        packed_share(
            q, sources, position, length, first, last, softmax_scale, first_row, rows, out, stats,
            logits + (head * rows).to(tl.int64) * row_size, place, row_size,
            KBITS, KGROUP, KAXIS, KKIND, VBITS, VGROUP, VKIND, H, LOGITS, TWIN,
        )  # fmt: skip
    elif WINDOW > 0:
        share -= splits
        held = tl.load(wlengths + batch)
        tiles = (held + 15) // 16
        first = 16 * (share * (tiles // wsplits) + tl.minimum(share, tiles % wsplits))
        last = tl.minimum(first + 16 * (tiles // wsplits + tl.where(share < tiles % wsplits, 1, 0)), held)
        start = head.to(tl.int64) * window
        window_share(
            wq, wk, wv, position, start, first, last, softmax_scale, first_row, rows, out, stats, place, WINDOW == 2, H
        )
