"""The Hadamard rotation inside a Triton kernel, for rows that it holds anyway: a launch less, of two microseconds."""

import triton
import triton.language as tl


@triton.jit
def add_and_subtract(x, ROWS: tl.constexpr):
    """Rows [ROWS, 32], rotated but for the scale: a round for every bit of a channel's number.

    Numbers of a row lie in the lanes of a warp and change places by shuffles. As reshapes, each round would go through
    shared memory, and a program of eight warps would wait for all of them twice.
    """
    lane = tl.arange(0, 32)[None, :]
    for i in tl.static_range(5):
        other = tl.gather(x, tl.broadcast_to(lane ^ (1 << i), [ROWS, 32]), 1)
        x = other + tl.where(lane & (1 << i) != 0, -x, x)
    return x


@triton.jit
def rotate(x, ROWS: tl.constexpr, H: tl.constexpr):
    """Rows [ROWS, H] of float32, rotated (`hadamard.rotate`); H is 64 or 128.

    The lowest one or two bits of a channel's number are rounds among a lane's own numbers, for it holds neighbours.
    """
    tl.static_assert(H == 64 or H == 128)
    even, odd = tl.split(tl.reshape(x, [ROWS, H // 2, 2]))
    even, odd = even + odd, even - odd
    if H == 64:
        even, odd = add_and_subtract(even, ROWS), add_and_subtract(odd, ROWS)
    else:
        a, b = tl.split(tl.reshape(even, [ROWS, 32, 2]))
        c, d = tl.split(tl.reshape(odd, [ROWS, 32, 2]))
        a, b = add_and_subtract(a + b, ROWS), add_and_subtract(a - b, ROWS)
        c, d = add_and_subtract(c + d, ROWS), add_and_subtract(c - d, ROWS)
        even, odd = tl.reshape(tl.join(a, b), [ROWS, 64]), tl.reshape(tl.join(c, d), [ROWS, 64])
    return tl.reshape(tl.join(even, odd), [ROWS, H]) * (1.0 / H**0.5)
