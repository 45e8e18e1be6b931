"""The three products of a block of 128 tokens in the Triton decode kernel, one lane per element of a [32] tensor.

Keys in groups of tokens, keys in groups of channels, and values; the layouts stand in `triton.py`.
"""
# Triton builds tuples by `+` alone.
# ruff: noqa: RUF005

import triton
import triton.language as tl

from pallas_kernels.packed_decode._triton_instructions import (
    copy16,
    half_as_float,
    load1,
    load2,
    load4,
    masked_mma,
    mma,
    multiply2,
    spread,
    subtract2,
    twice_masked_mma,
)
from pallas_kernels.packed_decode._triton_metadata import (
    bytes_of,
    metadata8,
    token_metadata,
)


@triton.jit
def row_of(g, w: tl.constexpr, b: tl.constexpr, NARROW: tl.constexpr):
    """Byte row of a run of 32 that is row g + 8 b of the w-th tile of 16.

    Chosen so that, after `transpose8`, lane t holds the tokens whose value codes it loads: bytes 8t .. 8t + 7 of a run,
    or, NARROW, bytes 4t .. 4t + 3 of either half, which keeps a tile inside a group of 16 tokens.
    """
    if NARROW:
        return 16 * w + 4 * (g // 2) + 2 * b + g % 2
    else:
        return 8 * (g // 2) + 4 * w + 2 * b + g % 2


@triton.jit
def key_chunk(row, chunk, H: tl.constexpr):
    """Where 16 bytes of a row of key codes lie in shared memory.

    A quarter warp reads 64 bytes of an even row and of the next: with rows of 128 bytes the odd ones have their halves
    swapped, so that the two miss each other's banks.
    """
    if H == 128:
        return row * 128 + 16 * (chunk ^ (4 * (row % 2)))
    else:
        return row * 64 + 16 * chunk


@triton.jit
def fetch_key_codes(to, source, valid, lane, BITS: tl.constexpr, H: tl.constexpr):
    for i in tl.static_range(BITS * H // 32):
        chunk = 32 * i + lane
        copy16(to + key_chunk(chunk // (H // 16), chunk % (H // 16), H), source + 16 * chunk, valid)


@triton.jit
def fetch(to, source, valid, lane, BYTES: tl.constexpr):
    """Starts the copy of BYTES bytes."""
    for i in tl.static_range((BYTES + 511) // 512):
        use = valid
        if BYTES % 512 != 0 and i == BYTES // 512:
            use = tl.where(lane < BYTES % 512 // 16, valid, 0)
        copy16(to + 512 * i + 16 * lane, source + 512 * i + 16 * lane, use)


@triton.constexpr_function
def ones(count, first):
    """A word whose halves have `count` ones from bit `first` on."""
    return ((1 << count) - 1) * 0x10001 << first


@triton.constexpr_function
def plane_unit(bits, run):
    """What the products with the codes of a run of 32 tokens, float16 subnormals in their plane, lack."""
    return 2.0 ** (24 - bits * (2 * run // bits))


@triton.constexpr_function
def plane_mask(bits, plane, nested):
    """Where both halves of a word have the codes of a plane, or, nested, of all planes up to it."""
    return ones(bits * (plane + 1), 0) if nested else ones(bits, bits * plane)


@triton.jit
def rows_of_codes(x, y):
    """Left operand of an `mma` from words of rows g and g + 8, the codes of all planes in it."""
    low = spread(x)
    high = spread(y)
    return low[0], high[0], low[1], high[1]


@triton.jit
def third_bits(x, y, g, W: tl.constexpr, NARROW: tl.constexpr):
    """`rows_of_codes` of the one-bit part of three-bit codes: bit 2 plane + (row >= 16) moves to 2 plane + 2."""
    up = 2 - row_of(g, W, 0, NARROW) // 16
    down = 2 - row_of(g, W, 1, NARROW) // 16
    e = rows_of_codes(x, y)
    return e[0] << up, e[1] << down, e[2] << up, e[3] << down


@triton.jit
def key_tiles(
    d,
    words,
    high,
    s,
    g,
    K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    NARROW: tl.constexpr,
    NESTED: tl.constexpr,
):
    """d plus the products of a block's eight tiles over 16 channels, the K-th words of the lanes' rows.

    The codes are float16 subnormals where they lie: a plane's are cut out by its mask. NESTED a tile also has all
    planes below its own, and the top one needs no mask.
    """
    PART: tl.constexpr = 2 if BITS == 3 else BITS
    UNITS: tl.constexpr = PART // 2
    codes = ()
    for i in tl.static_range(2 * UNITS):
        codes = codes + (rows_of_codes(words[2 * i][K], words[2 * i + 1][K]),)
    thirds = ()
    if BITS == 3:
        for w in tl.static_range(2):
            thirds = thirds + (third_bits(high[2 * w][K], high[2 * w + 1][K], g, w, NARROW),)
    after = ()
    for tile in tl.static_range(8):
        a = codes[2 * (tile // 2 % UNITS) + tile % 2]
        b = s[16 * tile // GROUP]
        if BITS == 3:
            e = thirds[tile % 2]
            x = twice_masked_mma(
                a, e, b[0], b[1], d[tile], ones(2, tile // 2 * 2), ones(1, tile // 2 * 2 + 2)
            )  # fmt: skip
            after = after + (x,)
        else:
            after = after + (masked_mma(a, b[0], b[1], d[tile], plane_mask(PART, tile // 2 // UNITS, NESTED)),)
    return after


@triton.jit
def key_words(codes, part, g, t, BITS: tl.constexpr, H: tl.constexpr, NARROW: tl.constexpr):
    """The lane's codes of channels 64 part + 16 t .. + 15: four rows of each run of 32 bytes; third bits apart."""
    UNITS: tl.constexpr = (2 if BITS == 3 else BITS) // 2  # runs of 32 bytes
    words = ()
    high = ()
    for u in tl.static_range(UNITS):
        for w in tl.static_range(2):
            for b in tl.static_range(2):
                row = row_of(g, w, b, NARROW)
                words = words + (load4(codes + key_chunk(row + 32 * u, 4 * part + t, H)),)
                if BITS == 3:
                    high = high + (load4(codes + key_chunk(32 + row % 16, 4 * part + t, H)),)
    return words, high


@triton.jit
def key_products(
    q,
    codes,
    scale,
    zero,
    g,
    t,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    H: tl.constexpr,
    NARROW: tl.constexpr,
    TWIN: tl.constexpr,
):
    """Products of the queries with the codes times scales, and with the zero points, of one block.

    TWIN a query meets the scales of its half of the block alone, and tiles are nested, but of three bits.

    Returns:
        d: eight tiles [16 tokens, 8 queries], tile 2 i + w of the i-th run of 32 tokens; times 2^-24 4^plane.
        z: tile [groups spread over 8 rows, 8 queries].
    """
    GROUPS: tl.constexpr = 128 // GROUP
    COVERED: tl.constexpr = 128 if TWIN else GROUP
    BYTES: tl.constexpr = bytes_of(KIND)
    nil = tl.zeros([32], tl.float32)
    none = tl.zeros([32], tl.int32)
    d = ()
    for _ in tl.static_range(8):
        d = d + ((nil, nil, nil, nil),)
    z = (nil, nil, nil, nil)
    own_group = g * GROUPS // 8
    for h in tl.static_range(H // 64):
        words, high = key_words(codes, h, g, t, BITS, H, NARROW)
        for half in tl.static_range(2):
            channel = 64 * h + 16 * t + 8 * half
            zeros = metadata8(zero + (own_group * H + channel) * BYTES, KIND)
            scales = ()
            if TWIN:
                scales = (metadata8(scale + (g // 4 * (GROUPS - 1) * H + channel) * BYTES, KIND),)
            else:
                for i in tl.static_range(GROUPS):
                    scales = scales + (metadata8(scale + (i * H + channel) * BYTES, KIND),)
            for c in tl.static_range(2):
                q0 = q[8 * h + 4 * half + 2 * c]
                q1 = q[8 * h + 4 * half + 2 * c + 1]
                z = mma(zeros[2 * c], none, zeros[2 * c + 1], none, q0, q1, z)
                s = ()
                for i in tl.static_range(128 // COVERED):
                    s = s + ((multiply2(q0, scales[i][2 * c]), multiply2(q1, scales[i][2 * c + 1])),)
                d = key_tiles(d, words, high, s, g, 2 * half + c, BITS, COVERED, NARROW, TWIN and BITS != 3)
    return d, z


@triton.jit
def channel_key_products(
    q,
    codes,
    scale,
    zero,
    g,
    t,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    H: tl.constexpr,
):
    """Queries times keys whose groups lie over the channels of a token: eight tiles [16 tokens, 8 queries].

    A group's products with the codes are finished before its scale, one a token, meets them. Where groups are smaller
    than the 64 channels a product covers, the others' queries are zero in it.
    """
    PART: tl.constexpr = 2 if BITS == 3 else BITS
    BYTES: tl.constexpr = bytes_of(KIND)
    nil = tl.zeros([32], tl.float32)
    none = tl.zeros([32], tl.int32)
    one = tl.full([32], 0x3C003C00, tl.int32)
    shift = 16 * (g % 2)
    x = ()
    for _ in tl.static_range(8):
        x = x + ((nil, nil, nil, nil),)
    for group in tl.static_range(H // GROUP):
        d = ()
        for _ in tl.static_range(8):
            d = d + ((nil, nil, nil, nil),)
        z = (nil, nil, nil, nil)
        for part in tl.static_range((GROUP + 63) // 64):
            words, high = key_words(codes, GROUP * group // 64 + part, g, t, BITS, H, False)
            for k in tl.static_range(4):
                q0 = q[8 * (GROUP * group // 64 + part) + 2 * k]
                q1 = q[8 * (GROUP * group // 64 + part) + 2 * k + 1]
                if GROUP < 64:
                    own = t // (GROUP // 16) == group % (64 // GROUP)
                    q0 = tl.where(own, q0, 0)
                    q1 = tl.where(own, q1, 0)
                z = mma(one, none, one, none, q0, q1, z)
                d = key_tiles(d, words, high, ((q0, q1),), g, k, BITS, 128, False, False)
        scaled = ()
        for run in tl.static_range(4):
            first = (128 * group + 32 * run + 8 * (g // 2)) * BYTES
            scales = metadata8(scale + first, KIND)
            zeros = metadata8(zero + first, KIND)
            for w in tl.static_range(2):
                tile = ()
                for b in tl.static_range(2):
                    by = half_as_float(scales[2 * w + b], shift) * ((1 << (24 - PART * (run // (PART // 2)))) * 1.0)
                    plus = half_as_float(zeros[2 * w + b], shift)
                    for i in tl.static_range(2):
                        more = d[2 * run + w][2 * b + i] * by + z[i] * plus
                        tile = tile + (x[2 * run + w][2 * b + i] + more,)
                scaled = scaled + (tile,)
        x = scaled
    return x


@triton.jit
def plane_probabilities(p, g, BITS: tl.constexpr, TWIN: tl.constexpr):
    """Probabilities for the codes of each run of 32 tokens where they lie: 2^-(BITS plane) of them.

    TWIN a query's are zero in the runs of the other half.
    """
    scaled = ()
    for run in tl.static_range(4):
        by = tl.full([32], (15 - BITS * (2 * run // BITS)) * 1024 * 0x10001, tl.int32)
        if TWIN:
            by = tl.where(g // 4 == run // 2, by, 0)
        for i in tl.static_range(4):
            x = p[4 * (run % 2 if TWIN else run) + i]
            if TWIN or 2 * run >= BITS:
                x = multiply2(x, by)
            scaled = scaled + (x,)
    return scaled


@triton.jit
def value_products(
    acc,
    p,
    codes,
    scale,
    g,
    t,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    H: tl.constexpr,
    NARROW: tl.constexpr,
    TWIN: tl.constexpr,
):
    """Adds (probability times scale) . codes of one block to the tiles [16 channels, 8 queries], times 2^-24.

    NESTED a word's codes are multiplied a plane and all below it at a time, by what the next plane's factor lacks: all
    planes together need no mask. In the smallest groups those differences would cost more than masks.
    """
    NESTED: tl.constexpr = GROUP > 16
    UNITS: tl.constexpr = BITS // 2
    PLANES: tl.constexpr = 8 // BITS
    P: tl.constexpr = 16 * BITS
    BYTES: tl.constexpr = bytes_of(KIND)
    TOGETHER: tl.constexpr = min(GROUP // 16, 4)  # independent accumulators in flight
    y = plane_probabilities(p, g, BITS, TWIN)
    done = ()
    for group in tl.static_range(H // GROUP):
        x = ()
        for run in tl.static_range(2 if TWIN else 4):
            first = 128 * group + 32 * run
            if TWIN:
                first += 64 * (g // 4)
            x = x + token_metadata(scale + first * BYTES, t, NARROW, KIND)
        s = ()
        for i in tl.static_range(16):
            s = s + (multiply2(y[i], x[i % 8 if TWIN else i]),)
        own = ()
        for i in tl.static_range(16):
            own = own + (subtract2(s[i], s[i + 4 * UNITS]) if NESTED and i < 16 - 4 * UNITS else s[i],)
        for first in tl.static_range(GROUP // 16 // TOGETHER):
            part = ()
            for i in tl.static_range(TOGETHER):
                part = part + (acc[(GROUP // 16) * group + TOGETHER * first + i],)
            for u in tl.static_range(UNITS):
                words = ()
                for i in tl.static_range(TOGETHER):
                    for b in tl.static_range(2):
                        channel = 16 * ((GROUP // 16) * group + TOGETHER * first + i) + 8 * b + g
                        address = codes + channel * P + 32 * u
                        if NARROW:
                            words = words + ((load1(address + 4 * t), load1(address + 4 * t + 16)),)
                        else:
                            words = words + (load2(address + 8 * t),)
                for w in tl.static_range(2):
                    rows = ()
                    for i in tl.static_range(TOGETHER):
                        rows = rows + (rows_of_codes(words[2 * i][w], words[2 * i + 1][w]),)
                    for plane in tl.static_range(PLANES):
                        b0 = own[4 * (plane * UNITS + u) + 2 * w]
                        b1 = own[4 * (plane * UNITS + u) + 2 * w + 1]
                        after = ()
                        for i in tl.static_range(TOGETHER):
                            after = after + (masked_mma(rows[i], b0, b1, part[i], plane_mask(BITS, plane, NESTED)),)
                        part = after
            done = done + part
    return done
