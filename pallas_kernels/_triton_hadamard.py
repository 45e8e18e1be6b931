"""The Hadamard rotation inside a Triton kernel, for rows that it holds anyway: a launch less, of two microseconds."""

import triton
import triton.language as tl


@triton.jit
def rotate(x, ROWS: tl.constexpr, H: tl.constexpr):
    """Rows [ROWS, H] of float32, rotated (`hadamard.rotate`).

    Each round adds and subtracts the numbers of two neighbouring channels and puts all sums before all differences:
    after as many rounds as a channel's number has bits, every bit is back in its place.
    """
    for i in tl.static_range(16):
        if H >> (i + 1) > 0:
            even, odd = tl.split(tl.reshape(x, [ROWS, H // 2, 2]))
            x = tl.reshape(tl.permute(tl.join(even + odd, even - odd), (0, 2, 1)), [ROWS, H])
    return x * (1.0 / H**0.5)
