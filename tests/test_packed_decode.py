"""Packed decode attention against float64 attention over the dequantised cache."""

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.hadamard import hadamard
from pallas_kernels.packed_decode import layout
from pallas_kernels.packed_decode.api import Part, decode_attention, dense_decode_attention, packed_decode_attention
from pallas_kernels.packed_decode.layout import BLOCK, PackedTensor, pack, rows_per_block, unpack
from pallas_kernels.partial import Partial, merge_partials

# Compiled once for all tests of a shape.
attend = jax.jit(packed_decode_attention, static_argnames=("implementation", "scale", "return_logits"))
attend_dense = jax.jit(dense_decode_attention, static_argnames=("implementation", "scale", "return_logits"))
attend_together = jax.jit(decode_attention, static_argnames=("implementation", "return_logits"))
dequantize = jax.jit(layout.dequantize)
FORMATS = {
    "2-bit": (2, 32, "float16", 2, 128, "float16"),
    "2-bit, groups of 64 channels": (2, 32, "float16", 2, 64, "float16"),
    "groups of 16": (2, 16, "float16", 2, 16, "float16"),
    "groups of 128 tokens, 32 channels, bfloat16": (2, 128, "bfloat16", 2, 32, "bfloat16"),
    "3 and 2 bits, fp8": (3, 64, "float8_e4m3fn", 2, 64, "float8_e4m3fn"),
    "2-bit, fp8": (2, 64, "float8_e4m3fn", 2, 64, "float8_e4m3fn"),
    "4-bit, fp8": (4, 64, "float8_e4m3fn", 4, 64, "float8_e4m3fn"),
    "4 and 2 bits, fp8": (4, 64, "float8_e4m3fn", 2, 64, "float8_e4m3fn"),
    "2 and 4 bits, groups of 128": (2, 128, "float16", 4, 128, "bfloat16"),
    "3 and 2 bits, groups of 16": (3, 16, "float16", 2, 16, "float16"),
    "4-bit": (4, 32, "float16", 4, 128, "float16"),
    "4 and 2 bits": (4, 32, "float16", 2, 64, "float16"),
    "8-bit": (8, 32, "float16", 8, 64, "bfloat16"),
    "2-bit, half heads": (2, -2, "float16", 2, 32, "float16"),
    "4-bit, whole heads": (4, -1, "bfloat16", 4, 128, "bfloat16"),
    "3-bit, half heads, fp8": (3, -2, "float8_e4m3fn", 2, 64, "float8_e4m3fn"),
}


def segment(rng, b, heads, blocks, h, fmt, low=-1.0, high=1.0, scales=None):
    """Random codes and metadata: keys, values. A negative group of keys is a part of the head, over channels."""
    kbits, kgroup, ktype, vbits, vgroup, vtype = fmt
    kaxis, kgroup = ("tokens", kgroup) if kgroup > 0 else ("channels", h // -kgroup)
    kgroups = (BLOCK // kgroup, h) if kaxis == "tokens" else (h // kgroup, BLOCK)
    vgroup = min(vgroup, h)

    def metadata(shape, dtype, a, z):
        return draws.array(rng.uniform(a, z, shape), dtype)

    def one(codes_shape, shape, bits, group, dtype, axis, last):
        top = 1.0 / 2**bits
        scale = metadata(shape, dtype, 0, top) if scales is None else draws.array(rng.choice(scales, shape), dtype)
        codes = draws.array(rng.integers(0, 256, codes_shape), "uint8")
        return PackedTensor(codes, scale, metadata(shape, dtype, low, high), bits, group, axis, last)

    lead = (b, heads, blocks)
    return (
        one((*lead, 16 * kbits, h), (*lead, *kgroups), kbits, kgroup, ktype, kaxis, False),
        one((*lead, h, 16 * vbits), (*lead, h // vgroup, BLOCK), vbits, vgroup, vtype, "channels", True),
    )


def codes_of(packed):
    """The definition of the layout, bit by bit, in numpy: codes [B, K, S, H]."""
    x = np.asarray(packed.codes)
    x = np.swapaxes(x, -1, -2) if packed.tokens_last else x  # [B, K, blocks, P, H]
    b, k, blocks, _, h = x.shape
    out = np.zeros((b, k, blocks, BLOCK, h), np.int64)
    parts = [(2, 0, 32), (1, 2, 16)] if packed.bits == 3 else [(packed.bits, 0, rows_per_block(packed.bits))]
    first = 0
    for bits, shift, rows in parts:
        for token in range(BLOCK):
            byte = x[..., first + token % rows, :].astype(np.int64)
            out[..., token, :] |= ((byte >> (bits * (token // rows))) & (2**bits - 1)) << shift
        first += rows
    return out.reshape(b, k, blocks * BLOCK, h)


def dequantised(packed):
    """float64 [B, K, S, H], by the definition."""
    codes = codes_of(packed)
    b, k, s, h = codes.shape

    def spread(x):
        x = np.asarray(x).astype(np.float64)
        x = np.repeat(x, packed.group_size, axis=-2)
        if packed.group_axis == "channels":
            x = np.swapaxes(x, -1, -2)
        return x.reshape(b, k, s, h)

    return codes * spread(packed.scale) + spread(packed.zero)


def attention(query, key, value, lengths, scale):
    """float64: output, maximum, total, unnormalised as in `Partial`."""
    query = np.asarray(query).astype(np.float64)
    b, t, n, _ = query.shape
    group = n // key.shape[1]
    out, maximum, total = np.zeros((b, t, n, value.shape[-1])), np.full((b, t, n), -np.inf), np.zeros((b, t, n))
    for i in range(b):
        for head in range(n):
            length = int(lengths[i, head // group])
            if length == 0:
                continue
            x = query[i, :, head] @ key[i, head // group, :length].T * scale
            top = x.max(axis=1)
            p = np.exp(x - top[:, None])
            out[i, :, head] = p @ value[i, head // group, :length]
            maximum[i, :, head], total[i, :, head] = top, p.sum(axis=1)
    return out, maximum, total


def error(got: Partial, want) -> float:
    """Relative error of the normalised output, after checks of the other two numbers."""
    out, maximum, total = (np.asarray(x, np.float64) for x in got)
    empty = want[2] == 0
    assert np.isneginf(maximum[empty]).all() and (total[empty] == 0).all() and (out[empty] == 0).all()
    held = ~empty
    if not held.any():
        return 0.0
    lse, want_lse = (m[held] + np.log(t[held]) for m, t in ((maximum, total), want[1:]))
    np.testing.assert_allclose(lse, want_lse, rtol=2e-3, atol=5e-3)
    got_mean, want_mean = out[held] / total[held][:, None], want[0][held] / want[2][held][:, None]
    return float(np.linalg.norm(got_mean - want_mean) / max(np.linalg.norm(want_mean), 1e-30))


def compare(implementation, fmt, *, b=2, heads=2, group=2, t=1, h=64, blocks=2, lengths=None, dtype="bfloat16"):
    rng = draws.rng()
    keys, values = segment(rng, b, heads, blocks, h, fmt)
    query = draws.array(rng.normal(size=(b, t, heads * group, h)), dtype)
    if lengths is None:
        lengths = rng.integers(0, blocks * BLOCK + 1, (b, heads))
    lengths = np.asarray(lengths)
    got = attend(query, keys, values, jnp.asarray(lengths, jnp.int32), implementation=implementation)
    lengths = np.broadcast_to(lengths.reshape(b, -1), (b, heads))
    return error(got, attention(query, dequantised(keys), dequantised(values), lengths, h**-0.5))


@pytest.mark.parametrize("bits", layout.SUPPORTED_BITS)
@pytest.mark.parametrize("axis", [-1, -2])
def test_pack_and_unpack_are_inverse(bits, axis):
    rng = draws.rng()
    codes = draws.array(rng.integers(0, 2**bits, (3, 128, 128)), "uint8")
    packed = jax.jit(pack, static_argnums=(1, 2))(codes, bits, axis)
    assert packed.shape[axis] == rows_per_block(bits)
    np.testing.assert_array_equal(jax.jit(unpack, static_argnums=(1, 2))(packed, bits, axis), codes)


@pytest.mark.parametrize("name", FORMATS)
def test_dequantize_follows_the_definition(name):
    for packed in segment(draws.rng(), 1, 2, 2, 64, FORMATS[name]):
        np.testing.assert_allclose(dequantize(packed), dequantised(packed), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.promise("Attention over packed codes is that of a float64 computation over the same codes, within 1e-5")
def test_xla_matches_float64(name, figure):
    assert compare("xla", FORMATS[name], lengths=[[256, 100], [0, 129]]) < 1e-5
    figure("relative errors below 1e-5")


@settings(max_examples=4, deadline=None)
@given(
    name=st.sampled_from(sorted(FORMATS)),
    heads=st.sampled_from([(1, 1), (1, 8), (2, 4), (3, 3)]),
    t=st.sampled_from([1, 3]),
    blocks=st.integers(1, 3),
)
def test_xla_matches_float64_on_drawn_shapes(name, heads, t, blocks):
    k, group = heads
    assert compare("xla", FORMATS[name], heads=k, group=group, t=t, blocks=blocks) < 1e-5


@pytest.mark.parametrize("scales", [[0.0], [1e-6], [1e4], [0.0, 1e-6, 0.1, 1e4]])
@pytest.mark.promise("Scales of zero, tiny and huge ones give finite, right attention")
def test_xla_takes_adversarial_scales(scales):
    rng = draws.rng()
    keys, values = segment(rng, 1, 2, 1, 64, FORMATS["2-bit"], scales=scales)
    query = draws.array(rng.normal(size=(1, 1, 4, 64)) * 1e-3)
    lengths = jnp.asarray([100])
    got = attend(query, keys, values, lengths, implementation="xla")
    want = attention(query, dequantised(keys), dequantised(values), np.full((1, 2), 100), 64**-0.5)
    assert error(got, want) < 1e-4


def poison(packed, length):
    """Garbage in everything that only tokens past `length` touch."""
    keep = np.arange(packed.capacity) < length
    keep = keep.reshape(-1, BLOCK)
    if packed.group_axis == "tokens":
        held = keep.reshape(keep.shape[0], -1, packed.group_size).any(axis=-1)[None, None, :, :, None]
    else:
        held = keep[None, None, :, None, :]
    return PackedTensor(
        packed.codes,
        *(draws.array(np.where(held, np.asarray(x, np.float32), np.nan), x.dtype) for x in (packed.scale, packed.zero)),
        packed.bits,
        packed.group_size,
        packed.group_axis,
        packed.tokens_last,
    )


def check_nothing_beyond_the_length(implementation, length, fmt, h=64):
    rng = draws.rng()
    keys, values = segment(rng, 1, 2, 3, h, fmt)
    query = draws.array(rng.normal(size=(1, 1, 4, h)), "bfloat16")
    lengths = jnp.asarray([length])
    clean = attend(query, keys, values, lengths, implementation=implementation)
    dirty = attend(query, poison(keys, length), poison(values, length), lengths, implementation=implementation)
    for a, b in zip(clean, dirty):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("length", [0, 1, 127, 128, 200, 384])
@pytest.mark.promise("Attention over packed codes reads nothing beyond a length: NaN there changes no bit")
def test_xla_reads_nothing_beyond_the_length(length):
    check_nothing_beyond_the_length("xla", length, FORMATS["groups of 16"])


def random_partials(rng, count):
    return [
        Partial(
            draws.array(rng.normal(size=(1, 2, 3, 4))),
            draws.array(rng.normal(size=(1, 2, 3)) * 30),
            draws.array(rng.uniform(1, 50, (1, 2, 3))),
        )
        for _ in range(count)
    ]


@settings(max_examples=8, deadline=None)
@given(order=st.permutations(range(4)))
@pytest.mark.promise("Segments may be attended to in any order")
def test_merge_does_not_depend_on_the_order(order):
    partials = random_partials(draws.rng(), 4)
    for a, b in zip(merge_partials(partials), merge_partials([partials[i] for i in order])):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_merge_ignores_empty_parts():
    (part,) = random_partials(draws.rng(), 1)
    empty = Partial(jnp.zeros((1, 2, 3, 4)), jnp.full((1, 2, 3), -jnp.inf), jnp.zeros((1, 2, 3)))
    for a, b in zip(merge_partials([part]), merge_partials([empty, part, empty])):
        np.testing.assert_array_equal(a, b)
    output, lse = merge_partials([empty, empty])
    assert (output == 0).all() and np.isneginf(lse).all()


def test_merging_segments_is_attention_over_all_of_them():
    rng = draws.rng()
    parts = [segment(rng, 1, 2, blocks, 64, FORMATS["2-bit"]) for blocks in (1, 2)]
    query = draws.array(rng.normal(size=(1, 2, 4, 64)))
    lengths = (70, 200)
    merged, lse = jax.jit(merge_partials)([attend(query, *part, jnp.asarray([n])) for part, n in zip(parts, lengths)])
    key, value = (
        np.concatenate([dequantised(part[i])[:, :, :n] for part, n in zip(parts, lengths)], axis=2) for i in range(2)
    )
    want = attention(query, key, value, np.full((1, 2), sum(lengths)), 64**-0.5)
    np.testing.assert_allclose(merged, want[0] / want[2][..., None], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(lse, want[1] + np.log(want[2]), rtol=1e-5)


def compare_dense(
    implementation, *, b=2, heads=2, group=2, t=1, h=64, width=None, s=90, dtype="float32", attend=attend_dense
) -> float:
    """Drawn rows visible to every query and head, keys of `width` channels; what nobody sees is NaN."""
    rng, width = draws.rng(), width or h
    query = draws.array(rng.normal(size=(b, t, heads * group, width)), dtype)
    key, value = (draws.array(rng.normal(size=(b, heads, s, channels)), dtype) for channels in (width, h))
    lengths = rng.integers(0, s + 1, (b, t, heads))
    seen = (np.arange(s) < lengths.max(1)[:, :, None])[..., None]
    dirty = [draws.array(np.where(seen, np.asarray(x, np.float32), np.nan), dtype) for x in (key, value)]
    options = {"return_logits": True, "implementation": implementation}
    got, logits = attend(query, *dirty, jnp.asarray(lengths, jnp.int32), **options)
    key, value = (np.asarray(x.astype(jnp.float32), np.float64) for x in (key, value))
    worst = 0.0
    for i in range(t):
        one = Partial(*(x[:, i : i + 1] for x in got))
        worst = max(worst, error(one, attention(query[:, i : i + 1], key, value, lengths[:, i], h**-0.5)))
    wide = np.repeat(key, group, axis=1)
    want = np.einsum("btnh,bnsh->btns", np.asarray(query.astype(jnp.float32), np.float64), wide) * h**-0.5
    seen = np.arange(s) < np.repeat(lengths, group, axis=2)[..., None]
    np.testing.assert_allclose(np.asarray(logits)[seen], want[seen], rtol=1e-2, atol=1e-2)
    return worst


@settings(max_examples=4, deadline=None)
@given(
    heads=st.sampled_from([(1, 1), (1, 8), (2, 4), (3, 3)]),
    t=st.integers(1, 3),
    s=st.integers(1, 200),
    width=st.sampled_from([64, 40]),
)
def test_dense_matches_float64(heads, t, s, width):
    assert compare_dense("xla", heads=heads[0], group=heads[1], t=t, s=s, width=width) < 1e-5


@pytest.mark.promise("Grouped heads attend as repeated heads would")
@settings(max_examples=10)
@given(t=st.sampled_from([1, 3]))
def test_grouped_heads_are_repeated_heads(t):
    rng = draws.rng()
    query, key, value = (draws.array(rng.normal(size=shape)) for shape in ((1, t, 4, 64), *[(1, 2, 90, 64)] * 2))
    wide = (jnp.repeat(x, 2, axis=1) for x in (key, value))
    lengths = draws.array(rng.integers(1, 91, 1), "int32")
    for a, b in zip(attend_dense(query, key, value, lengths), attend_dense(query, *wide, lengths)):
        np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(a).max())


@pytest.mark.promise("The order in which kept tokens lie does not matter")
@settings(max_examples=10)
@given(order=st.permutations(range(90)))
def test_the_order_of_kept_tokens_does_not_matter(order):
    rng = draws.rng()
    query, key, value = (draws.array(rng.normal(size=shape)) for shape in ((1, 1, 4, 64), *[(1, 2, 90, 64)] * 2))
    lengths, order = jnp.asarray([90]), np.asarray(order)
    whole = attend_dense(query, key, value, lengths)
    moved = attend_dense(query, key[:, :, order], value[:, :, order], lengths)
    for a, b in zip(whole, moved):
        np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(a).max())


def check_together(
    implementation, *, t=1, heads=2, group=2, h=64, dtype="bfloat16", lengths=((200, 33), (0, 0)), formats=("2-bit",)
):
    """Packed segments and a dense one as one softmax, and the logits of the first; `lengths` of each, by sequence."""
    rng = draws.rng()
    b = len(lengths)
    query = draws.array(rng.normal(size=(b, t, heads * group, h)), dtype)
    held = [segment(rng, b, heads, 2, h, FORMATS[name]) for name in formats]
    held.append(tuple(draws.array(rng.normal(size=(b, heads, 40, h)), dtype) for _ in range(2)))
    parts = [Part(query, *x, jnp.asarray(n, jnp.int32)) for x, n in zip(held, zip(*lengths), strict=True)]
    output, lse, logits = attend_together(parts, return_logits=True, implementation=implementation)
    tensors = [[_float64(x) for x in pair] for pair in held]
    for count in (1, len(parts)):
        wanted_output, wanted_lse = [], []
        for i in range(b):
            mine = list(zip(tensors, lengths[i]))[:count]
            rows = [np.concatenate([pair[j][i, :, :n] for pair, n in mine], 1)[None] for j in range(2)]
            out, top, total = attention(query[i : i + 1], *rows, np.full((1, heads), rows[0].shape[2]), h**-0.5)
            wanted_output.append(out[0] / np.maximum(total, 1e-30)[0][..., None])
            with np.errstate(divide="ignore"):
                wanted_lse.append((top + np.log(total))[0])
        whole = count == len(parts)
        got = (output, lse) if whole else attend_together(parts[:count], implementation=implementation)
        assert got[0].dtype == query.dtype
        np.testing.assert_allclose(np.asarray(got[0], np.float64), wanted_output, rtol=2e-2, atol=4e-3)
        np.testing.assert_allclose(got[1], wanted_lse, rtol=2e-3, atol=5e-3)
    unit = 2.0 ** rng.integers(-4, 4, (b, heads))
    turned, lse = attend_together(parts, rotated=draws.array(unit), implementation=implementation)
    turned = np.asarray(turned, np.float64) / np.repeat(unit, group, axis=1)[:, None, :, None]
    np.testing.assert_allclose(turned, wanted_output @ hadamard(h), rtol=2e-2, atol=8e-3)
    np.testing.assert_allclose(lse, wanted_lse, rtol=2e-3, atol=5e-3)
    balance = 2.0 ** rng.integers(-4, 4, (b, heads, h))
    balanced = {"rotated": draws.array(unit), "balanced": draws.array(balance, "bfloat16")}
    evened, lse = attend_together(parts, **balanced, implementation=implementation)
    evened = np.asarray(evened, np.float64) * np.repeat(balance, group, axis=1)[:, None]
    evened /= np.repeat(unit, group, axis=1)[:, None, :, None]
    np.testing.assert_allclose(evened, turned, rtol=2e-2, atol=1e-3)
    np.testing.assert_allclose(lse, wanted_lse, rtol=2e-3, atol=5e-3)
    wide = np.repeat(tensors[0][0], group, axis=1)
    want = np.einsum("btnh,bnsh->btns", np.asarray(query, np.float64), wide) * h**-0.5
    for i in range(b):
        np.testing.assert_allclose(logits[i, ..., : lengths[i][0]], want[i, ..., : lengths[i][0]], rtol=1e-2, atol=1e-2)


def _float64(x) -> np.ndarray:
    return dequantised(x) if isinstance(x, PackedTensor) else np.asarray(x, np.float64)


TWO_TIERS = {"formats": ("4-bit, fp8", "2-bit, fp8"), "lengths": ((64, 200, 33), (0, 0, 0), (8, 0, 40))}


@pytest.mark.parametrize("t", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_segments_attend_together(t):
    check_together("xla", t=t)
    check_together(None, t=t)
    check_together(None, t=t, **TWO_TIERS)


def test_wrong_arguments_are_refused():
    keys, values = segment(draws.rng(), 1, 2, 1, 64, FORMATS["2-bit"])
    query, lengths = jnp.zeros((1, 1, 4, 64)), jnp.asarray([3])
    with pytest.raises(ValueError, match="head size"):
        packed_decode_attention(jnp.zeros((1, 1, 4, 128)), keys, values, lengths)
    with pytest.raises(ValueError, match="does not fit"):
        packed_decode_attention(jnp.zeros((1, 1, 3, 64)), keys, values, lengths)
    with pytest.raises(ValueError, match="lengths"):
        packed_decode_attention(query, keys, values, jnp.zeros((2,), jnp.int32))
    with pytest.raises(ValueError, match="at least one segment"):
        decode_attention([])
    with pytest.raises(ValueError, match="must be alike"):
        dense = Part(query.astype(jnp.bfloat16), jnp.zeros((1, 2, 5, 64)), jnp.zeros((1, 2, 5, 64)), lengths)
        decode_attention([Part(query, keys, values, lengths), dense])
    with pytest.raises(ValueError, match="unknown implementation"):
        packed_decode_attention(query, keys, values, lengths, implementation="cuda")


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="declines only without a GPU")
def test_triton_declines_without_a_gpu():
    keys, values = segment(draws.rng(), 1, 2, 1, 64, FORMATS["2-bit"])
    query, lengths = jnp.zeros((1, 1, 4, 64)), jnp.asarray([3])
    with pytest.raises(NotImplementedError, match="needs a CUDA GPU"):
        packed_decode_attention(query, keys, values, lengths, implementation="triton")
    first = packed_decode_attention(query, keys, values, lengths)
    second = packed_decode_attention(query, keys, values, lengths, implementation=("triton", "xla"))
    np.testing.assert_array_equal(first.output, second.output)
