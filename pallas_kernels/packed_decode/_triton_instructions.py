"""Single PTX instructions for a warp: every tensor has shape [32] and means one 32-bit register of each lane.

Lane = 4 g + t throughout, the naming of the PTX manual for `mma.m16n8k16`. Tuples of tensors are register fragments.
"""

import triton
import triton.language as tl


@tl.core.builtin
def limit_registers(count, _semantic=None, _generator=None):
    """Caps the registers of a lane, so that more warps fit a processor; what jax-triton has no argument for."""
    count = tl.core._unwrap_if_constexpr(count)
    if count:
        _generator.module.set_attr("ttg.maxnreg", _semantic.builder.get_int32_attr(count))


@triton.constexpr_function
def ring_text(size):
    return f".shared .align 128 .b8 ring[{size}]; mov.u32 $0, ring;"


@triton.jit
def ring(lane, SIZE: tl.constexpr):
    """Address of SIZE bytes of shared memory. Called once: every call would reserve bytes of its own."""
    return tl.inline_asm_elementwise(
        "{ " + ring_text(SIZE) + " }", "=r,r", [lane], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def copy16(to, source, valid):
    """Starts the copy of 16 bytes from global to shared memory where `valid`."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p cp.async.cg.shared.global [$1], [$2], 16; mov.u32 $0, 0; }",
        "=r,r,l,r",
        [to, source, valid],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def close_group(lane):
    """All copies started since the last call become one group."""
    tl.inline_asm_elementwise(
        "cp.async.commit_group; mov.u32 $0, 0;", "=r,r", [lane], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def wait_group(lane):
    """Waits for all groups but the newest, and makes them visible to the whole warp."""
    tl.inline_asm_elementwise(
        "cp.async.wait_group 1; bar.warp.sync -1; mov.u32 $0, 0;",
        "=r,r",
        [lane],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def warp_barrier(lane):
    tl.inline_asm_elementwise("bar.warp.sync -1; mov.u32 $0, 0;", "=r,r", [lane], dtype=tl.int32, is_pure=False, pack=1)


@triton.constexpr_function
def read_text(bits):
    return f"{{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b{bits} $0, 0; @p ld.global.b{bits} $0, [$1]; }}"


@triton.jit
def read(pointer, valid):
    """Numbers of 16 or 32 bits from global memory, 0 where not `valid`.

    As `tl.load`, and as `write` is `tl.store`, but out of sight of the compiler's search for layouts in which accesses
    coalesce: it looks at the whole kernel once for each of them, which was two thirds of the time to compile, and a
    warp with one element a lane has no choice of layouts.
    """
    BITS: tl.constexpr = pointer.dtype.element_ty.primitive_bitwidth
    x = tl.inline_asm_elementwise(
        read_text(BITS),
        "=r,l,r" if BITS == 32 else "=h,l,r",
        [pointer.to(tl.int64), valid.to(tl.int32)],
        dtype=tl.int32 if BITS == 32 else tl.int16,
        is_pure=False,
        pack=1,
    )
    return x.to(pointer.dtype.element_ty, bitcast=True)


@triton.jit
def read4(address, valid):
    """16 bytes from global memory as four words, zeros where not `valid`."""
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $5, 0; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; "
        "@p ld.global.v4.b32 {$0,$1,$2,$3}, [$4]; }",
        "=&r,=&r,=&r,=&r,l,r",
        [address, valid.to(tl.int32)],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=False,
        pack=1,
    )


@triton.jit
def write(pointer, x, valid):
    """Writes float32 to global memory where `valid`; see `read`."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.global.b32 [$1], $2; mov.u32 $0, 0; }",
        "=r,l,f,r",
        [pointer.to(tl.int64), x, valid.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def load1(address):
    return tl.inline_asm_elementwise(
        "ld.shared.b32 $0, [$1];", "=r,r", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def store1(address, x):
    tl.inline_asm_elementwise(
        "st.shared.b32 [$1], $2; mov.u32 $0, 0;", "=r,r,r", [address, x], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def load2(address):
    return tl.inline_asm_elementwise(
        "ld.shared.v2.b32 {$0,$1}, [$2];",
        "=r,=r,r",
        [address],
        dtype=(tl.int32, tl.int32),
        is_pure=False,
        pack=1,
    )


@triton.jit
def load4(address):
    return tl.inline_asm_elementwise(
        "ld.shared.v4.b32 {$0,$1,$2,$3}, [$4];",
        "=r,=r,=r,=r,r",
        [address],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=False,
        pack=1,
    )


@triton.constexpr_function
def mma_text(dtype, left, before=""):
    """The product of a left operand [16, 16] of four words, named in `left`, with ($8, $9) [16, 8], plus $10..$13."""
    return (
        f"{before}mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32 "
        f"{{$0,$1,$2,$3}}, {{{left}}}, {{$8,$9}}, {{$10,$11,$12,$13}};"
    )


@triton.jit
def mma(a0, a1, a2, a3, b0, b1, c, BFLOAT16: tl.constexpr = False):
    """c + A B with A [16, 16] and B [16, 8] in float16 or bfloat16, c [16, 8] in float32."""
    return tl.inline_asm_elementwise(
        mma_text("bf16" if BFLOAT16 else "f16", "$4,$5,$6,$7"),
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        [a0, a1, a2, a3, b0, b1, c[0], c[1], c[2], c[3]],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.constexpr_function
def masked_mma_text(mask, third):
    if mask == 0xFF00FF:  # all that `spread` leaves
        return mma_text("f16", "$4,$5,$6,$7")
    steps = [f"and.b32 a{i}, ${4 + i}, {mask}; " for i in range(4)]
    if third:
        steps += [f"and.b32 e{i}, ${14 + i}, {third}; or.b32 a{i}, a{i}, e{i}; " for i in range(4)]
    return "{ .reg .b32 a<4>, e<4>; " + mma_text("f16", "a0,a1,a2,a3", "".join(steps)) + " }"


@triton.jit
def masked_mma(a, b0, b1, c, MASK: tl.constexpr):
    """`mma` with the bits MASK of the left operand's words.

    The same instructions as apart, but Triton and LLVM take ten times as long over five pieces as over one.
    """
    return tl.inline_asm_elementwise(
        masked_mma_text(MASK, 0),
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        [a[0], a[1], a[2], a[3], b0, b1, c[0], c[1], c[2], c[3]],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def twice_masked_mma(a, e, b0, b1, c, MASK: tl.constexpr, THIRD: tl.constexpr):
    """`masked_mma` whose left operand has the bits THIRD of `e` besides."""
    return tl.inline_asm_elementwise(
        masked_mma_text(MASK, THIRD),
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f,r,r,r,r",
        [a[0], a[1], a[2], a[3], b0, b1, c[0], c[1], c[2], c[3], e[0], e[1], e[2], e[3]],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def transpose8(x):
    """Transposes an 8 x 8 matrix of 16-bit numbers: lane (g, t) gives row g, columns 2t and 2t + 1."""
    return tl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def shuffle(x, lane):
    return tl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 31, -1;", "=f,f,r", [x, lane], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def warp_max(x):
    """Maximum of a non-negative int32 over the warp."""
    return tl.inline_asm_elementwise(
        "redux.sync.max.s32 $0, $1, -1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def spread(x):
    """Bytes 0 and 1 of a word, each widened to 16 bits, and bytes 2 and 3."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $2, 0, 0x4140; prmt.b32 $1, $2, 0, 0x4342;",
        "=&r,=r,r",
        [x],
        dtype=(tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def spread_up(x):
    """Bytes 0 and 1 of a word, each the upper byte of 16 bits, and bytes 2 and 3."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $2, 0, 0x1404; prmt.b32 $1, $2, 0, 0x3424;",
        "=&r,=r,r",
        [x],
        dtype=(tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def unpack_float8(x):
    """The four float8_e4m3fn of a word as two pairs of float16."""
    return tl.inline_asm_elementwise(
        "{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.rn.f16x2.e4m3x2 $0, l; cvt.rn.f16x2.e4m3x2 $1, h; }",
        "=&r,=r,r",
        [x],
        dtype=(tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def subtract2(x, y):
    """Difference of two pairs of float16."""
    return tl.inline_asm_elementwise("sub.rn.f16x2 $0, $1, $2;", "=r,r,r", [x, y], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def multiply2(x, y):
    """Product of two pairs of float16."""
    return tl.inline_asm_elementwise("mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [x, y], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def half_as_float(x, shift):
    """The float16 that starts at bit `shift` of a word."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 w; .reg .b16 h; shr.b32 w, $1, $2; cvt.u16.u32 h, w; cvt.f32.f16 $0, h; }",
        "=f,r,r",
        [x, shift],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def pair(low, high, BFLOAT16: tl.constexpr = False):
    """Rounds two float32 to a pair of float16 or bfloat16."""
    return tl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $1, $2;" if BFLOAT16 else "cvt.rn.f16x2.f32 $0, $1, $2;",
        "=r,f,f",
        [high, low],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def column_max(x, lane):
    """Maximum over g: every lane gets that of its t."""
    x = tl.maximum(x, shuffle(x, lane ^ 4))
    x = tl.maximum(x, shuffle(x, lane ^ 8))
    return tl.maximum(x, shuffle(x, lane ^ 16))


@triton.jit
def column_sum(x, lane):
    """Sum over g: every lane gets that of its t."""
    x += shuffle(x, lane ^ 4)
    x += shuffle(x, lane ^ 8)
    return x + shuffle(x, lane ^ 16)
