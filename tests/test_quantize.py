"""Group-wise codes: golden values, and properties over drawn numbers."""

import functools

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pallas_kernels import dequantize, quantize
from pallas_kernels.packed_decode.layout import pack, unpack

# Compiled once for all tests of a shape.
encode = jax.jit(quantize.encode, static_argnums=(1, 2, 3, 4, 5))
to_packed = jax.jit(quantize.to_packed, static_argnums=(1, 2, 3, 4))
from_packed, unpacked = jax.jit(quantize.from_packed), jax.jit(dequantize)
encode_with_feedback = jax.jit(quantize.encode_with_feedback, static_argnums=(2, 3))
decode, coupling_of = jax.jit(quantize.decode, static_argnums=(1, 2)), jax.jit(quantize.coupling_of)


def test_four_codes_in_turn_pack_to_the_published_word():
    # The published packing interleaves: a run of four codes shares a byte. Here that is planes of one code each.
    codes = np.tile(np.arange(4, dtype=np.uint8), 4).reshape(4, 4)
    word = np.asarray(pack(jnp.asarray(codes), 2, axis=1)).tobytes()
    assert np.frombuffer(word, "<i4")[0] == -454761244


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_every_code_survives_packing(bits):
    codes = draws.rng().integers(0, 2**bits, (3, 128, 5), dtype=np.uint8)
    for axis, x in ((1, codes), (2, codes.swapaxes(1, 2))):
        packed = pack(jnp.asarray(x), bits, axis=axis)
        assert packed.shape[axis] == 16 * bits
        np.testing.assert_array_equal(unpack(packed, bits, axis=axis), x)


@pytest.mark.promise("Packing loses no code: all 65,536 pairs of bytes come back")
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_every_pair_of_bytes_survives_unpacking_and_packing(bits, figure):
    rows = 16 * bits
    pairs = np.stack(np.meshgrid(*[np.arange(256, dtype=np.uint8)] * 2), axis=-1).reshape(-1)
    stored = np.resize(pairs, (-(-pairs.size // rows), rows)).T
    codes = unpack(jnp.asarray(stored), bits, axis=0)
    assert codes.shape == (128, stored.shape[1]) and int(codes.max()) == 2**bits - 1
    np.testing.assert_array_equal(pack(codes, bits, axis=0), stored)
    figure(f"{pairs.size // 2:,} pairs, {bits} bits")


EXTREMES = {
    "range 0": lambda x: np.full_like(x, 3.25),
    "all zero": np.zeros_like,
    "largest float16": lambda x: np.sign(x) * 65504,
    "subnormal": lambda x: x * np.float32(1e-41),
    "one outlier": lambda x: np.where(np.arange(x.size).reshape(x.shape) == 77, 1e4, x),
}


@pytest.mark.promise("Constant groups, subnormals, outliers and the largest float16 come back within their range")
@pytest.mark.parametrize("axis", ["tokens", "channels"])
@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_groups_come_back_within_their_range(name, axis):
    x = EXTREMES[name](draws.rng().standard_normal((1, 1, 128, 16)).astype(np.float32)).astype(np.float32)
    restored = np.asarray(unpacked(to_packed(encode(x, 2, 16, axis, "float16"), 2, 16, axis, False)))
    slack = np.abs(x).max() * 2.0**-9 + 1e-7
    assert np.isfinite(restored).all() and restored.min() >= x.min() - slack and restored.max() <= x.max() + slack
    if name in ("range 0", "all zero"):
        np.testing.assert_array_equal(restored, x)


def test_ties_round_to_even():
    group = np.array([-1, 2, -0.5, 0.5, 1.5] + [0.0] * 11, np.float32).reshape(1, 1, 1, 16)
    codes = encode(jnp.asarray(group), 2, 16, "channels", "float16")
    assert float(codes.scale[0, 0, 0, 0]) == 1.0
    assert np.asarray(codes.codes)[0, 0, 0, 2:5].tolist() == [0, 2, 2]


@given(constant=st.floats(-6e4, 6e4, width=16))
def test_a_constant_group_gives_back_the_constant(constant):
    x = jnp.full((1, 1, 128, 16), constant, jnp.float32)
    for axis in ("tokens", "channels"):
        codes = encode(x, 2, 16, axis, "float16")
        assert np.all(unpacked(to_packed(codes, 2, 16, axis, False)) == x)


@pytest.mark.parametrize("tokens_last", [False, True])
@pytest.mark.parametrize("axis", ["tokens", "channels"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("group", [16, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 32))])
@pytest.mark.promise("Stored numbers are those of an independent NumPy quantiser")
def test_stored_numbers_are_the_references(group, bits, axis, tokens_last):
    rng = draws.rng()
    x = rng.standard_normal((1, 2, 128, 32)).astype(np.float32) * rng.choice([0.1, 1, 30], 32).astype(np.float32)
    codes = encode(jnp.asarray(x), bits, group, axis, "float16")
    packed = to_packed(codes, bits, group, axis, tokens_last)
    for before, after in zip(codes, from_packed(packed)):
        np.testing.assert_array_equal(before, after)
    roundtrip = reference.roundtrip_per_channel if axis == "tokens" else reference.roundtrip_per_token
    expected = np.stack([roundtrip(head, bits, group) for head in x[0]])
    # A number half-way between two codes may go either way in float32 and float64.
    different = np.abs(unpacked(packed)[0] - expected) > 1e-3 * np.abs(x).max()
    assert different.mean() < 1e-3


@given(
    x=hnp.arrays(np.float32, (16, 8), elements=st.floats(-1e4, 1e4, width=32), fill=st.floats(-1, 1, width=32)),
    bits=st.sampled_from([1, 2, 3, 4, 8]),
    axis=st.sampled_from(["tokens", "channels"]),
)
@pytest.mark.promise("No number comes back off by more than half a step and the rounding of its metadata")
def test_no_number_is_off_by_more_than_half_a_step(x, bits, axis):
    x = np.tile(x, (8, 1))[None, None]
    codes = encode(jnp.asarray(x), bits, 8, axis, "float16")
    restored = np.asarray(unpacked(to_packed(codes, bits, 8, axis, False)))
    groups = x.reshape(1, 1, 16, 8, 8)
    axis_of_group = 3 if axis == "tokens" else 4
    step = np.ptp(groups, axis=axis_of_group, keepdims=True) / (2**bits - 1)
    # float16 metadata: eleven bits of the minimum, and of the scale times the largest code.
    rounding = (np.abs(groups).max(axis=axis_of_group, keepdims=True) * 4 + 6e-5 * 2**bits) * 2.0**-11
    bound = np.broadcast_to(step / 2 + rounding, groups.shape).reshape(x.shape)
    assert np.all(np.abs(restored - x) <= bound * 1.001 + 1e-7)


@pytest.mark.promise("A number that a code's scale or minimum cannot hold comes back as NaN, never as another number")
@pytest.mark.parametrize(
    ("metadata", "held", "beyond"),
    [("float16", 65504, 70000), ("bfloat16", 3e38, np.inf), ("float8_e4m3fn", 448, 500)],
)
@pytest.mark.parametrize("axis", ["tokens", "channels"])
def test_an_offset_beyond_the_metadata_is_nan_and_one_within_is_held(axis, metadata, held, beyond):
    x = draws.rng().standard_normal((1, 1, 128, 16)).astype(np.float32)
    x[..., :16, :8] += held * np.float32(0.999)
    x[..., 16:32, :8] = -beyond
    codes = encode(jnp.asarray(x), 2, 8, axis, metadata)
    restored = np.asarray(unpacked(to_packed(codes, 2, 8, axis, False)))
    broken = np.zeros_like(x, bool)
    broken[..., 16:32, :8] = True
    np.testing.assert_array_equal(np.isnan(restored), broken)
    # A last digit of float8_e4m3fn is a sixteenth of the number, and may lie either way.
    np.testing.assert_allclose(restored[..., :16, :8], held, rtol=0.04)


@pytest.mark.parametrize("where", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("metadata", ["float16", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("clip", [(), (0.9, 0.8)])
def test_codes_of_a_compiled_program_go_by_metadata_as_stored(clip, metadata, where):
    # XLA drops conversions to a short float and back on a GPU: codes would go by scales that nobody has.
    x = draws.rng().standard_normal((2, 2, 128, 16)).astype(np.float32) + 5
    with jax.default_device(jax.devices(where)[0]):
        encode = functools.partial(quantize.encode, bits=3, group_size=16, group_axis="tokens")
        codes = jax.jit(functools.partial(encode, metadata_dtype=metadata, clip=clip))(jnp.asarray(x))
        codes = jax.device_get(codes)
    scale, zero = (np.repeat(np.asarray(y, np.float32), 16, axis=2) for y in codes[1:])
    wanted = np.clip((x - zero) / scale, 0, 7)
    assert np.abs(codes.codes - wanted).max() <= 0.5001


STORED = [("float16", ()), ("float8_e4m3fn", (0.9, 0.8))]
MORE = [("float16", (0.9, 0.8)), ("bfloat16", ()), ("bfloat16", (0.9, 0.8)), ("float8_e4m3fn", ())]


@pytest.mark.parametrize(("metadata", "clip"), STORED + [pytest.param(*x, marks=pytest.mark.slow) for x in MORE])
@pytest.mark.parametrize("axis", ["tokens", "channels"])
@given(place=st.tuples(st.integers(0, 127), st.integers(0, 15)), whole=st.booleans())
@pytest.mark.promise("NaN comes back as NaN, in its own group alone")
def test_a_group_that_holds_nan_comes_back_as_nan_and_no_other_does(axis, metadata, clip, place, whole):
    # XLA's own minimum loses NaN or keeps it as the size has it compiled: two heads of two sequences lose it.
    x = draws.rng().standard_normal((2, 2, 128, 16)).astype(np.float32)
    token, channel = place
    broken = np.zeros_like(x, bool)
    if axis == "tokens":
        broken[0, 0, token // 8 * 8 : token // 8 * 8 + 8, channel] = True
    else:
        broken[0, 0, token, channel // 8 * 8 : channel // 8 * 8 + 8] = True
    x[broken if whole else (0, 0, *place)] = np.nan
    codes = encode(x, 2, 8, axis, metadata, clip)
    restored = np.asarray(unpacked(to_packed(codes, 2, 8, axis, False)))
    np.testing.assert_array_equal(np.isnan(restored), broken)


@given(
    x=hnp.arrays(np.float32, (16, 4), elements=st.floats(-8, 8, width=32)),
    offset=st.sampled_from([0, 1, 30, 100, -354]),
    bits=st.sampled_from([2, 3]),
)
def test_short_metadata_reaches_all_of_a_group(x, offset, bits):
    # A minimum of 354 is 352 in eight bits and one of 370 is 384: the scale must make up for it.
    x = np.tile((x / 8 + offset / 4)[None, None], (1, 1, 8, 1))
    codes = encode(jnp.asarray(x), bits, 16, "tokens", "float8_e4m3fn")
    restored = np.asarray(decode(codes, 16, "tokens"))
    low, high = x[0, 0].min(axis=0), x[0, 0].max(axis=0)
    for c in range(4):
        minimum = reference.short_floats(low[c], 4)[0] if abs(low[c]) > 2**-6 else low[c] - 2**-9
        step = (high[c] - minimum) / (2**bits - 1)
        step += max(step / 8, 2**-9)  # rounded up: to four significant bits, below 2 ** -6 to a multiple of 2 ** -9
        assert np.square(restored - x)[..., c].mean() <= (step / 2) ** 2 * 1.001


def test_feedback_is_gptq_and_saves_what_queries_see():
    rng = draws.rng()
    x = rng.standard_normal((1, 1, 128, 16)).astype(np.float32)
    queries = (rng.standard_normal((400, 4)) @ rng.standard_normal((4, 16))).astype(np.float32)
    moment = (queries.T @ queries)[None, None]
    plain = encode(jnp.asarray(x), 2, 32, "tokens")
    fed = encode_with_feedback(jnp.asarray(x), coupling_of(jnp.asarray(moment)), 2, 32)
    back = [np.asarray(decode(codes, 32, "tokens"))[0, 0] for codes in (plain, fed)]
    lost = [np.square((y - x[0, 0]) @ queries.T).mean() for y in back]
    assert lost[1] < 0.5 * lost[0]

    def grid_of(column):
        group = reference.quantise(column[None], 2, 32)
        return float(group.scale[0, 0]), float(group.minimum[0, 0])

    hessian = reference.damped(moment[0, 0])
    expected = [reference.gptq(group, grid_of, hessian, 2) for group in x[0, 0].reshape(4, 32, 16)]
    # Now and then a number lies half-way between two codes, and all after it go another way.
    assert np.mean(np.abs(np.concatenate(expected) - back[1]) < 1e-3) > 0.9


@pytest.mark.parametrize("size", [1, 2, 7, 16])
def test_a_triangle_unfolds_to_what_it_was(size):
    triangle = np.triu(draws.rng().standard_normal((2, 3, size, size)).astype(np.float32), 1)
    half = quantize.fold(jnp.asarray(triangle))
    assert half.shape == (2, 3, -(-size // 2), size)
    np.testing.assert_array_equal(quantize.unfold(half), triangle)


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), rank=st.integers(1, 64), spread=st.floats(0, 4))
def test_a_coupling_fits_into_eight_bits(seed, rank, spread):
    rng = np.random.default_rng(seed)
    queries = rng.standard_normal((rank, 64)) * 10 ** (spread * rng.standard_normal(64))
    coupling = np.asarray(coupling_of(jnp.asarray(queries.T @ queries, jnp.float32)[None, None]))
    assert np.all(np.isfinite(coupling)) and np.abs(coupling).max() <= 10.1 * 64**0.5


def test_feedback_without_queries_is_rounding():
    x = jnp.asarray(draws.rng().standard_normal((1, 2, 128, 16)), jnp.float32)
    plain = encode(x, 2, 32, "tokens")
    fed = encode_with_feedback(x, coupling_of(jnp.zeros((1, 2, 16, 16))), 2, 32)
    for a, b in zip(plain, fed):
        np.testing.assert_array_equal(a, b)
