"""Device code of the Triton append kernels; the reason for them stands in `triton.py`.

Formats are compile-time numbers: BITS, GROUP, KIND (of metadata: 0 float16, 1 bfloat16, 2 float8_e4m3fn, 3 the same
on a chip without instructions for it), H (head size). A run is COUNT consecutive rows of a dense array that become
tokens `start` and on of a packed segment.
"""
# Triton builds tuples by `+` alone.
# ruff: noqa: RUF005

import triton
import triton.language as tl

from pallas_kernels._triton_hadamard import rotate

# ---------------------------------------------------------------------------------------------------------------------
# Numbers.
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def round_even(x):
    """Nearest whole number, ties to even, of numbers below 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def to_stored(x, KIND: tl.constexpr, TOWARDS: tl.constexpr):
    """float32 as the metadata's dtype: the nearest (TOWARDS 0), or the next one down (-1) or up (1).

    Directions need the bits at hand (of float8_e4m3fn: bias 7, smallest step 2^-9), and so do chips before Ada and
    Hopper. float8_e4m3fn comes as uint8.
    """
    if KIND == 0:
        return x.to(tl.float16)
    elif KIND == 2 and TOWARDS == 0:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        word = x.to(tl.int32, bitcast=True)
        bits = word & 0x7FFFFFFF
        DROP: tl.constexpr = 16 if KIND == 1 else 20
        if TOWARDS == 0:
            code = (bits + (1 << (DROP - 1)) - 1 + ((bits >> DROP) & 1)) >> DROP
        else:
            away = tl.where(word < 0, -1, 1) == TOWARDS
            code = (bits >> DROP) + (away & ((bits & ((1 << DROP) - 1)) != 0)).to(tl.int32)
        if KIND == 1:
            code = tl.where(x == x, code << 16, 0x7FC00000) | (word & -0x80000000)
            return code.to(tl.float32, bitcast=True).to(tl.bfloat16)
        else:
            steps = bits.to(tl.float32, bitcast=True) * 512.0
            small = round_even(steps) if TOWARDS == 0 else tl.floor(steps)
            if TOWARDS != 0:
                small = tl.where(away & (small < steps), small + 1.0, small)
            code = tl.where(steps < 8.0, small.to(tl.int32), code - 960)
            code = tl.where(x == x, code, 0x7F)
            return (code | ((word >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def from_stored(x, KIND: tl.constexpr):
    if KIND == 2:
        return x.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    elif KIND == 3:
        code = x.to(tl.int32)
        normal = (((code & 0x7F) + 960) << 20).to(tl.float32, bitcast=True)
        small = (code & 7).to(tl.float32) * 0.001953125
        magnitude = tl.where((code & 0x78) == 0, small, normal)
        magnitude = tl.where((code & 0x7F) == 0x7F, float("nan"), magnitude)
        return tl.where((code & 0x80) == 0, magnitude, -magnitude)
    else:
        return x.to(tl.float32)


@triton.jit
def as_bytes(pointer):
    """A pointer to float8 as one to bytes."""
    if pointer.dtype.element_ty == tl.float8e4nv:
        return pointer.to(tl.pointer_type(tl.uint8), bitcast=True)
    else:
        return pointer


@triton.jit
def divide(x, by, over):
    """x / by as IEEE 754 rounds it, given 1 / by to a digit or two, of ordinary numbers; without a branch.

    The remainder is exact, and so what corrects y is off by 2^-20 of a last digit. That rounds as the quotient does if
    the quotient keeps clear of the middle between two numbers, by 2^-14 of a digit where `by` has at most 11 bits.
    """
    y = x * over
    return tl.fma(tl.fma(-by, y, x), over, y)


@triton.jit
def held(x, AXIS: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr):
    """x with NaN in the groups whose minimum or scale the metadata cannot hold: a clamp would be silent."""
    LEVELS: tl.constexpr = (1 << BITS) - 1
    LIMIT: tl.constexpr = 65504.0 if KIND == 0 else (3.3895313892515355e38 if KIND == 1 else 448.0)
    low = tl.min(x, AXIS, keep_dims=True)
    too_large = (tl.abs(low) > LIMIT) | ((tl.max(x, AXIS, keep_dims=True) - low) / LEVELS > LIMIT)
    return tl.where(too_large, float("nan"), x)


@triton.jit
def grid_within(low, high, BITS: tl.constexpr, KIND: tl.constexpr, DOWN: tl.constexpr, UP: tl.constexpr):
    """Scale and minimum, as stored, rounded UP and DOWN, of groups whose range is [low, high]."""
    LEVELS: tl.constexpr = (1 << BITS) - 1
    LIMIT: tl.constexpr = 65504.0 if KIND == 0 else (3.3895313892515355e38 if KIND == 1 else 448.0)
    clipped = tl.minimum(tl.maximum(low, -LIMIT), LIMIT)
    zero = to_stored(tl.where(low == low, clipped, low), KIND, DOWN)
    lowest = low if KIND == 0 else from_stored(zero, KIND)
    span = tl.maximum(high - lowest, 0.0)
    if KIND == 1:
        step = tl.div_rn(span, tl.full(span.shape, LEVELS, tl.float32))
    else:
        step = divide(tl.minimum(span, LEVELS * LIMIT), LEVELS * 1.0, 1.0 / LEVELS)
    scale = to_stored(tl.minimum(step, LIMIT), KIND, UP)
    return scale, zero


@triton.jit
def codes_on(x, scale, zero, AXIS: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr):
    """Codes as float32, and the numbers that they stand for."""
    LEVELS: tl.constexpr = (1 << BITS) - 1
    step = tl.expand_dims(from_stored(scale, KIND), AXIS)
    least = tl.expand_dims(from_stored(zero, KIND), AXIS)
    above = tl.minimum(tl.maximum(x - least, 0.0), step * LEVELS)
    by = tl.where(step > 0, step, 1.0)
    # Scales of bfloat16 may be so small that they have no reciprocal.
    codes = tl.div_rn(above, tl.broadcast_to(by, above.shape)) if KIND == 1 else divide(above, by, 1.0 / by)
    codes = round_even(codes)
    return codes, codes * step + least


@triton.jit
def squared_error(x, scale, zero, AXIS: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr):
    restored = codes_on(x, scale, zero, AXIS, BITS, KIND)[1]
    return tl.sum((restored - x) * (restored - x), AXIS)


@triton.jit
def better_of(
    x, best, low, high,
    AXIS: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, DOWN: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """The (scale, minimum, squared error) of each group that has the smaller error; equal: the one given."""
    scale, zero = grid_within(low, high, BITS, KIND, DOWN, UP)
    error = squared_error(x, scale, zero, AXIS, BITS, KIND)
    better = error < best[2]
    return tl.where(better, scale, best[0]), tl.where(better, zero, best[1]), tl.where(better, error, best[2])


@triton.jit
def encode(x, AXIS: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, CLIP: tl.constexpr):
    """Codes, scale and minimum of groups along AXIS: the best of the whole range, of it shrunk by each factor in CLIP,
    and, where metadata is shorter than float16, of the whole range rounded outwards."""
    low = tl.min(x, AXIS)
    high = tl.max(x, AXIS)
    # Minimum and maximum pass NaN over; a group that holds one must come back as NaN.
    broken = tl.max((x != x).to(tl.int32), AXIS)
    low = tl.where(broken > 0, float("nan"), low)
    scale, zero = grid_within(low, high, BITS, KIND, 0, 0)
    if len(CLIP) > 0 or KIND != 0:
        error = squared_error(x, scale, zero, AXIS, BITS, KIND)
        middle = (low + high) / 2
        half = (high - low) / 2
        # One body for all factors: each copy of it costs the compiler a second.
        for i in range(len(CLIP)):
            factor = 1.0
            for j in tl.static_range(len(CLIP)):
                factor = tl.where(i == j, CLIP[j], factor)
            shrunk = half * factor
            scale, zero, error = better_of(
                x, (scale, zero, error), middle - shrunk, middle + shrunk, AXIS, BITS, KIND, 0, 0
            )  # fmt: skip
        if KIND != 0:
            scale, zero, error = better_of(x, (scale, zero, error), low, high, AXIS, BITS, KIND, -1, 1)
    return codes_on(x, scale, zero, AXIS, BITS, KIND)[0].to(tl.uint8), scale, zero


# ---------------------------------------------------------------------------------------------------------------------
# A run of rows: codes to scratch memory, scales and minima to their places.
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def load_rows(rows, token, channel, COUNT: tl.constexpr, H: tl.constexpr):
    """float32 [tokens, channels] of a run."""
    here = (token < COUNT)[:, None]
    return tl.load(rows + token[:, None] * H + channel[None, :], mask=here, other=0.0).to(tl.float32)


@triton.jit
def encode_keys(
    rows, factor, scratch, scale, zero, start,
    COUNT: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, H: tl.constexpr,
    CLIP: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """Groups of GROUP tokens of one channel; `start` is a multiple of it. Scratch is [COUNT, H]."""
    WIDTH: tl.constexpr = min(H, 4096 // GROUP)
    for i in range(COUNT // GROUP):
        group = start // GROUP + i
        for j in range(H // WIDTH):
            channel = j * WIDTH + tl.arange(0, WIDTH)
            token = i * GROUP + tl.arange(0, GROUP)
            x = load_rows(rows, token, channel, COUNT, H)
            if FACTOR:
                x = x * tl.load(factor + channel)[None, :]
            codes, s, z = encode(held(x, 0, BITS, KIND), 0, BITS, KIND, CLIP)
            tl.store(scratch + token[:, None] * H + channel[None, :], codes)
            tl.store(scale + group * H + channel, s)
            tl.store(zero + group * H + channel, z)


@triton.jit
def unfold(coupling, to, KIND: tl.constexpr, H: tl.constexpr):
    """The folded triangle (`quantize.fold`) as float32 [H, H]; up to the diagonal its numbers have no meaning."""
    row = tl.arange(0, H // 2)[:, None]
    channel = tl.arange(0, H)[None, :]
    # Line i holds row i and, from its end, row H - 1 - i: row H / 2 + `row` that of line H / 2 - 1 - `row`.
    first = tl.load(coupling + row * H + channel)
    second = tl.load(coupling + (H // 2 - row) * H - 1 - channel)
    tl.store(to + row * H + channel, from_stored(first, KIND))
    tl.store(to + (H // 2 + row) * H + channel, from_stored(second, KIND))


@triton.jit
def encode_keys_with_feedback(
    rows, factor, coupling, scratch, scale, zero, start,
    COUNT: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, H: tl.constexpr,
    CLIP: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """`encode_keys`, channel after channel: what a channel's rounding leaves is added to the channels after it, as
    `coupling` [H, H] has it.

    Scales of a run of channels are chosen together, from where its numbers would be if rounding them cost nothing more
    (`quantize.encode_with_feedback`).

    All is [runs, tokens, channels of a run], also where one run or token is meant: then a warp has the same tokens, and
    a lane the same channel, throughout, and what is a sum over channels is a few shuffles.
    """
    RUN: tl.constexpr = 8  # as there
    RUNS: tl.constexpr = H // RUN
    lane = tl.arange(0, RUN)[None, None, :]
    every = tl.arange(0, RUNS)[:, None, None]
    for i in range(COUNT // GROUP):
        group = start // GROUP + i
        token = i * GROUP + tl.arange(0, GROUP)[None, :, None]
        added = tl.zeros([RUNS, GROUP, RUN], tl.float32)
        for run in range(RUNS):
            channel = run * RUN + lane
            x = tl.load(rows + token * H + channel).to(tl.float32)
            if FACTOR:
                x = x * tl.load(factor + channel)
            x = held(x, 1, BITS, KIND)
            near = ()
            for j in tl.static_range(RUN - 1):
                near = near + (tl.load(coupling + (run * RUN + j) * H + channel),)
            wanted = x + tl.sum(tl.where(every == run, added, 0.0), 0, keep_dims=True)
            ahead = wanted
            for j in tl.static_range(RUN - 1):
                moved = tl.sum(tl.where(lane == j, ahead - x, 0.0), 2, keep_dims=True)
                ahead -= tl.where(lane > j, moved * near[j], 0.0)
            _, s, z = encode(ahead, 1, BITS, KIND, CLIP)
            for j in tl.static_range(RUN):
                codes, restored = codes_on(wanted, s, z, 1, BITS, KIND)
                error = tl.sum(tl.where(lane == j, x - restored, 0.0), 2, keep_dims=True)
                if j + 1 < RUN:
                    wanted += tl.where(lane > j, error * near[j], 0.0)
                # Of this run and those before it nothing is read again.
                added += error * tl.load(coupling + (run * RUN + j) * H + every * RUN + lane)
            tl.store(scratch + token * H + channel, codes.to(tl.uint8))
            at = group * H + run * RUN + tl.arange(0, RUN)[None, :]
            tl.store(scale + at, s)
            tl.store(zero + at, z)


@triton.jit
def encode_values(
    rows, scratch, scale, zero, start,
    COUNT: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, H: tl.constexpr,
    CLIP: tl.constexpr,
):  # fmt: skip
    """Groups of GROUP channels of one token. Scratch is [H, COUNT]."""
    TOKENS: tl.constexpr = 16
    GROUPS: tl.constexpr = H // GROUP
    channel = tl.arange(0, H)
    group = tl.arange(0, GROUPS)
    for i in range((COUNT + TOKENS - 1) // TOKENS):
        token = i * TOKENS + tl.arange(0, TOKENS)
        x = load_rows(rows, token, channel, COUNT, H)
        x = tl.reshape(x, [TOKENS, GROUPS, GROUP])
        codes, s, z = encode(held(x, 2, BITS, KIND), 2, BITS, KIND, CLIP)
        codes = tl.reshape(codes, [TOKENS, H])
        here = (token < COUNT)[:, None]
        tl.store(scratch + channel[None, :] * COUNT + token[:, None], codes, mask=here)
        place = start + token
        at = ((place // 128) * (GROUPS * 128) + place % 128)[:, None] + group[None, :] * 128
        tl.store(scale + at, s, mask=here)
        tl.store(zero + at, z, mask=here)


# ---------------------------------------------------------------------------------------------------------------------
# Codes from scratch memory into the bytes they share with other tokens.
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def pack_planes(
    scratch, block_codes, first,
    COUNT: tl.constexpr, PART: tl.constexpr, DROP: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr,
    TOKEN: tl.constexpr, CHANNEL: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """One block's bytes of PART bits a code, after its lowest DROP bits. `first` is the block's token of the run.

    Byte (row, channel) lies at ROW row + COLUMN channel, code (token, channel) at TOKEN token + CHANNEL channel.
    """
    ROWS: tl.constexpr = 16 * PART
    MASK: tl.constexpr = (1 << PART) - 1
    channel = tl.arange(0, H)[None, :]
    for tile in range(ROWS // 16):
        row = (16 * tile + tl.arange(0, 16))[:, None]
        address = block_codes + row * ROW + channel * COLUMN
        byte = tl.load(address).to(tl.int32)
        for plane in tl.static_range(8 // PART):
            token = first + plane * ROWS + row
            inside = (token >= 0) & (token < COUNT)
            code = tl.load(scratch + token * TOKEN + channel * CHANNEL, mask=inside & (channel >= 0), other=0)
            code = (code.to(tl.int32) >> DROP) & MASK
            byte = tl.where(inside, (byte & (255 - (MASK << (PART * plane)))) | (code << (PART * plane)), byte)
        tl.store(address, byte.to(tl.uint8))


@triton.jit
def pack(
    scratch, codes, start,
    COUNT: tl.constexpr, BITS: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr,
    TOKEN: tl.constexpr, CHANNEL: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """The run's codes into every block that it touches; what other tokens have in these bytes stays."""
    PART: tl.constexpr = 2 if BITS == 3 else BITS
    for i in range((COUNT + 126) // 128 + 1):
        first = (start // 128 + i) * 128 - start
        if first < COUNT:
            there = codes + (start // 128 + i).to(tl.int64) * (16 * BITS * H)
            pack_planes(scratch, there, first, COUNT, PART, 0, ROW, COLUMN, TOKEN, CHANNEL, H)
            if BITS == 3:
                pack_planes(scratch, there + 32 * ROW, first, COUNT, 1, 2, ROW, COLUMN, TOKEN, CHANNEL, H)


@triton.jit
def write_keys(
    rows, factor, coupling, unfolded, scratch, codes, scale, zero, start, head, blocks,
    COUNT: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, H: tl.constexpr,
    CLIP: tl.constexpr, FACTOR: tl.constexpr, FEEDBACK: tl.constexpr,
):  # fmt: skip
    origin = head.to(tl.int64) * blocks
    scratch += head.to(tl.int64) * (COUNT * H)
    metadata = origin * (128 // GROUP * H)
    scale, zero = as_bytes(scale) + metadata, as_bytes(zero) + metadata
    if FEEDBACK:
        unfolded += head.to(tl.int64) * (H * H)
        unfold(coupling + head.to(tl.int64) * (H // 2 * H), unfolded, KIND, H)
        tl.debug_barrier()
        encode_keys_with_feedback(
            rows, factor + head * H, unfolded, scratch, scale, zero, start,
            COUNT, BITS, GROUP, KIND, H, CLIP, FACTOR,
        )  # fmt: skip
    else:
        encode_keys(
            rows, factor + head * H, scratch, scale, zero, start,
            COUNT, BITS, GROUP, KIND, H, CLIP, FACTOR,
        )  # fmt: skip
    tl.debug_barrier()
    pack(scratch, codes + origin * (16 * BITS * H), start, COUNT, BITS, H, 1, H, 1, H)


@triton.jit
def write_values(
    rows, scratch, codes, scale, zero, start, head, blocks,
    COUNT: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, H: tl.constexpr,
    CLIP: tl.constexpr,
):  # fmt: skip
    origin = head.to(tl.int64) * blocks
    scratch += head.to(tl.int64) * (COUNT * H)
    metadata = origin * (H // GROUP * 128)
    scale, zero = as_bytes(scale) + metadata, as_bytes(zero) + metadata
    encode_values(
        rows, scratch, scale, zero, start,
        COUNT, BITS, GROUP, KIND, H, CLIP,
    )  # fmt: skip
    tl.debug_barrier()
    pack(scratch, codes + origin * (16 * BITS * H), start, COUNT, BITS, 1, 16 * BITS, 1, COUNT, H)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels. Grid (B K, 2): the second axis is keys, with queries where they are rotated, and values. Arrays that change
# are inputs and outputs in one; sizes arrive negated, for an argument of 1 jax-triton would compile a program of its
# own.
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def move_rows(rows, COUNT: tl.constexpr, KEEPS: tl.constexpr, H: tl.constexpr):
    """KEEPS rows from row COUNT on to row 0 on, once everyone has read what was there; the two do not overlap."""
    ROWS: tl.constexpr = 16
    tl.debug_barrier()
    channel = tl.arange(0, H)
    for i in range((KEEPS + ROWS - 1) // ROWS):
        row = i * ROWS + tl.arange(0, ROWS)
        here = (row < KEEPS)[:, None]
        at = row[:, None] * H + channel[None, :]
        x = tl.load(rows + COUNT * H + at, mask=here)
        tl.store(rows + at, x, mask=here)


@triton.jit
def append_kernel(
    new_rows, key_unit, value_unit, key_balance, value_balance, accept, window_length, length,
    key_factor, key_coupling,
    _window_key, _window_value, _kc, _ks, _kz, _vc, _vs, _vz,
    heads, blocks,
    window_key, window_value, kc, ks, kz, vc, vs, vz,
    key_scratch, value_scratch, unfolded, query,
    QUERIES: tl.constexpr, BALANCED: tl.constexpr,
    WINDOW: tl.constexpr, FIRST: tl.constexpr, KEEPS: tl.constexpr, H: tl.constexpr,
    KBITS: tl.constexpr, KGROUP: tl.constexpr, KKIND: tl.constexpr, KCLIP: tl.constexpr, KFACTOR: tl.constexpr,
    KFEEDBACK: tl.constexpr,
    VBITS: tl.constexpr, VGROUP: tl.constexpr, VKIND: tl.constexpr, VCLIP: tl.constexpr,
):  # fmt: skip
    """A new token into the window of each accepting sequence; windows full with it are encoded from row FIRST on.

    The last KEEPS rows are not, and move to row FIRST. `new_rows` are of each sequence its heads' keys, then its heads'
    values, then, if they are rotated, QUERIES queries of each head; BALANCED, their channels are scaled first.
    """
    heads, blocks = -heads, -blocks
    COUNT: tl.constexpr = WINDOW - FIRST - KEEPS
    ROWS: tl.constexpr = triton.next_power_of_2(1 + QUERIES)
    head = tl.program_id(0)
    part = tl.program_id(1)
    batch = head // heads
    # Row 0 is the row that arrived, keys bring their queries along. Asked for before anything waits.
    row = tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, H)[None, :]
    asks = (row > 0) & (row <= QUERIES) & (part == 0)
    arrived = new_rows + batch * ((2 + QUERIES) * heads * H) + channel
    mine = arrived + (part * heads + head % heads) * H
    asked = arrived + (2 * heads + head % heads * QUERIES + row - 1) * H
    x = tl.load(tl.where(row == 0, mine, asked), mask=(row == 0) | asks, other=0.0)
    if QUERIES > 0:
        unit = tl.load(tl.where(part == 0, key_unit, value_unit) + head).to(tl.float32)
    if BALANCED:
        balance = tl.load(tl.where(part == 0, key_balance, value_balance) + head * H + channel).to(tl.float32)
    accepts = tl.load(accept + batch) != 0
    filled = tl.load(window_length + batch)
    start = tl.load(length + batch)
    if QUERIES > 0:
        x = x.to(tl.float32)
        if BALANCED:
            x *= tl.where(row == 0, balance, divide(1.0, balance, 1.0 / balance))
        x = rotate(x, ROWS, H)
        to = query + (head * QUERIES + row - 1) * H + channel
        tl.store(to, (x * unit).to(query.dtype.element_ty), mask=asks)
        x *= divide(1.0, unit, 1.0 / unit)
    rows = head.to(tl.int64) * (WINDOW * H)
    to = tl.where(part == 0, window_key, window_value) + rows + filled * H + row * H + channel
    tl.store(to, x.to(window_key.dtype.element_ty), mask=(row == 0) & accepts)
    if accepts & (filled + 1 == WINDOW):
        tl.debug_barrier()
        if part == 0:
            write_keys(
                window_key + rows + FIRST * H, key_factor, key_coupling, unfolded, key_scratch, kc, ks, kz,
                start, head, blocks,
                COUNT, KBITS, KGROUP, KKIND, H, KCLIP, KFACTOR, KFEEDBACK,
            )  # fmt: skip
            move_rows(window_key + rows + FIRST * H, COUNT, KEEPS, H)
        else:
            write_values(
                window_value + rows + FIRST * H, value_scratch, vc, vs, vz, start, head, blocks,
                COUNT, VBITS, VGROUP, VKIND, H, VCLIP,
            )  # fmt: skip
            move_rows(window_value + rows + FIRST * H, COUNT, KEEPS, H)


@triton.jit
def write_kernel(
    key_rows, key_first, key_start, key_when, value_rows, value_first, value_start, value_when,
    key_factor, key_coupling,
    _kc, _ks, _kz, _vc, _vs, _vz,
    heads, blocks,
    kc, ks, kz, vc, vs, vz, key_scratch, value_scratch, unfolded,
    KROWS: tl.constexpr, KCOUNT: tl.constexpr, VROWS: tl.constexpr, VCOUNT: tl.constexpr, H: tl.constexpr,
    KBITS: tl.constexpr, KGROUP: tl.constexpr, KKIND: tl.constexpr, KCLIP: tl.constexpr, KFACTOR: tl.constexpr,
    KFEEDBACK: tl.constexpr,
    VBITS: tl.constexpr, VGROUP: tl.constexpr, VKIND: tl.constexpr, VCLIP: tl.constexpr,
):  # fmt: skip
    """Rows `first` and on of dense keys become tokens `start` and on where `when`; values likewise."""
    heads, blocks = -heads, -blocks
    head = tl.program_id(0)
    batch = head // heads
    if tl.program_id(1) == 0:
        if tl.load(key_when + batch) != 0:
            rows = key_rows + (head.to(tl.int64) * KROWS + tl.load(key_first + batch)) * H
            write_keys(
                rows, key_factor, key_coupling, unfolded, key_scratch, kc, ks, kz,
                tl.load(key_start + batch), head, blocks,
                KCOUNT, KBITS, KGROUP, KKIND, H, KCLIP, KFACTOR, KFEEDBACK,
            )  # fmt: skip
    else:
        if tl.load(value_when + batch) != 0:
            rows = value_rows + (head.to(tl.int64) * VROWS + tl.load(value_first + batch)) * H
            write_values(
                rows, value_scratch, vc, vs, vz, tl.load(value_start + batch), head, blocks,
                VCOUNT, VBITS, VGROUP, VKIND, H, VCLIP,
            )  # fmt: skip
