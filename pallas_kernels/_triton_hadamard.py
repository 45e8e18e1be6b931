"""The Hadamard rotation inside a Triton kernel, for rows that it holds anyway: a launch less, of two microseconds."""

import triton
import triton.language as tl


@triton.jit
def add_and_subtract(x, ROWS: tl.constexpr, H: tl.constexpr):
    """Rows [ROWS, H], rotated but for the scale: a round for every bit of a channel's number.

    The lowest bits' rounds, until 32 numbers of a row are left, are among a lane's own, for it holds neighbours. Those
    32 lie in the lanes of a warp and change places by shuffles. As reshapes, each round would go through shared memory,
    and a program of eight warps would wait for all of them twice.
    """
    if H > 32:
        even, odd = tl.split(tl.reshape(x, [ROWS, H // 2, 2]))
        sums = add_and_subtract(even + odd, ROWS, H // 2)
        differences = add_and_subtract(even - odd, ROWS, H // 2)
        return tl.reshape(tl.join(sums, differences), [ROWS, H])
    else:
        lane = tl.arange(0, H)[None, :]
        for i in tl.static_range(5):
            if 1 << i < H:
                other = tl.gather(x, tl.broadcast_to(lane ^ (1 << i), [ROWS, H]), 1)
                x = other + tl.where(lane & (1 << i) != 0, -x, x)
        return x


@triton.jit
def rotate(x, ROWS: tl.constexpr, H: tl.constexpr):
    """Rows [ROWS, H] of float32, rotated (`hadamard.rotate`)."""
    return add_and_subtract(x, ROWS, H) * (1.0 / H**0.5)
