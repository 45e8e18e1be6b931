"""The NumPy simulation in `reference` against the golden tests of the method specification and against its own
definitions.

Nothing here touches the library. Inputs are drawn anew on every run.
"""

import math
from itertools import pairwise

import draws
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reference import (
    H2O,
    KIVI,
    METADATA_BITS,
    Full,
    MiKV,
    MiniKV,
    PyramidKV,
    QHitter,
    SnapKV,
    StreamingLLM,
    attend,
    bits_per_element,
    causal_attention,
    channel_balancer,
    column_sums,
    count_of,
    dequantise,
    full_mib,
    integer_zero_roundtrip,
    kivi_mib,
    mikv_share,
    minikv_mib,
    pack_interleaved,
    pool,
    pyramid_ratios,
    pyramidkv_budgets,
    quantise,
    roundtrip_per_channel,
    roundtrip_per_token,
    top_positions,
    unpack_interleaved,
    window_scores,
)

fresh = settings(max_examples=20, deadline=None, database=None, suppress_health_check=list(HealthCheck))
seeds = st.integers(0, 2**32 - 1)
heads = st.sampled_from([(1, 1), (2, 2), (4, 2), (4, 1), (6, 3)])
LLAMA2_7B = {"layers": 32, "kv_heads": 32, "head_size": 128}


@pytest.fixture
def rng():
    return draws.rng()


def draw(rng, length, shape=(4, 2), size=16):
    """Random query, key and value for `length` tokens; keys and queries strong enough to make attention uneven."""
    query_heads, kv_heads = shape
    return (
        2 * rng.standard_normal((length, query_heads, size), np.float32),
        rng.standard_normal((length, kv_heads, size), np.float32),
        rng.standard_normal((length, kv_heads, size), np.float32),
    )


def play(method, rng, length, steps, shape=(4, 2), size=16):
    """Prefill and step; returns the outputs and the whole sequence's query, key, value."""
    query, key, value = draw(rng, length + steps, shape, size)
    method.prefill(query[:length], key[:length], value[:length])
    outputs = [method.step(query[t], key[t], value[t]) for t in range(length, length + steps)]
    return outputs, query, key, value


def plain_row(query, key, value, t):
    """Attention of token t over all tokens up to it, in scalar arithmetic: `[N][H]`."""
    group = query.shape[1] // key.shape[1]
    out = []
    for n in range(query.shape[1]):
        k, v = key[: t + 1, n // group].astype(float), value[: t + 1, n // group].astype(float)
        logits = [sum(a * b for a, b in zip(query[t, n].astype(float), row)) / math.sqrt(key.shape[2]) for row in k]
        top = max(logits)
        weights = [math.exp(x - top) for x in logits]
        out.append([sum(w * x for w, x in zip(weights, column)) / sum(weights) for column in v.T])
    return np.array(out)


def same_as_full(outputs, query, key, value, length):
    for i, output in enumerate(outputs):
        np.testing.assert_allclose(output, plain_row(query, key, value, length + i), rtol=1e-9, atol=1e-11)


# -- golden tests 1 to 3: packing and the quantiser --------------------------------------------------------------------


def test_golden_1_packing_puts_the_first_code_lowest():
    word = pack_interleaved(np.tile([0, 1, 2, 3], 4), 2)
    assert word.dtype == np.int32
    assert word.tolist() == [-454761244]
    assert word.view(np.uint32)[0] == 0xE4E4E4E4


@fresh
@given(seeds, st.sampled_from([1, 2, 4, 8]), st.integers(1, 4))
def test_packing_round_trip_and_bit_positions(seed, bits, words):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (3, words * 32 // bits))
    packed = pack_interleaved(codes, bits)
    assert packed.shape == (3, words)
    np.testing.assert_array_equal(unpack_interleaved(packed, bits), codes)
    for row, value in zip(codes, packed[:, 0]):
        assert int(value) % 2**32 == sum(int(c) << (bits * j) for j, c in enumerate(row[: 32 // bits]))


def test_packing_refuses_what_it_cannot_hold():
    with pytest.raises(ValueError, match="fill a word"):
        pack_interleaved(np.zeros(32, int), 3)
    with pytest.raises(ValueError, match="multiple"):
        pack_interleaved(np.zeros(15, int), 2)
    with pytest.raises(ValueError, match=r"0\.\.3"):
        pack_interleaved(np.full(16, 4), 2)


@pytest.mark.parametrize("metadata", METADATA_BITS)
def test_golden_2_ties_round_to_even(metadata):
    group = np.array([-1, 2, -0.5, 0.5, 1.5] + [0] * 11)
    quantised = quantise(group, 2, 16, metadata)
    assert float(quantised.scale[0]) == 1 and float(quantised.minimum[0]) == -1
    assert quantised.codes[:5].tolist() == [0, 3, 0, 2, 2]


@fresh
@given(seeds, st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from(list(METADATA_BITS)))
def test_golden_3_a_constant_group_gives_back_the_constant(seed, bits, metadata):
    rng = np.random.default_rng(seed)
    constant = np.asarray(rng.uniform(-200, 200), np.float32)
    constant = quantise(np.full(4, constant), bits, 4, metadata).minimum[0].astype(np.float32)
    quantised = quantise(np.full((2, 8), constant), bits, 4, metadata)
    assert not quantised.scale.any() and not quantised.codes.any()
    np.testing.assert_array_equal(dequantise(quantised), np.full((2, 8), constant, np.float32))


@fresh
@given(seeds, st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from([2, 4, 16]), st.floats(0.01, 20))
def test_quantiser_error_stays_within_half_a_step(seed, bits, group, spread):
    x = np.random.default_rng(seed).standard_normal((3, 4 * group)).astype(np.float32) * np.float32(spread)
    exact = quantise(x, bits, group, "float32")
    assert exact.codes.min() == 0 and exact.codes.max() == 2**bits - 1
    step = np.repeat(exact.scale, group, axis=-1)
    assert (np.abs(dequantise(exact) - x) <= step * 0.5001 + 1e-6).all()
    for metadata, relative in (("float16", 2**-11), ("bfloat16", 2**-8)):
        rounded = quantise(x, bits, group, metadata)
        slack = np.abs(x).max() * relative + step * (2**bits - 1) * relative + 1e-6
        assert (np.abs(dequantise(rounded) - x) <= step * 0.5001 + 2 * slack).all()


@fresh
@given(seeds, st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from(["float16", "bfloat16", "float8_e4m3fn"]))
def test_codes_are_the_best_ones_for_the_rounded_metadata(seed, bits, metadata):
    """No other code comes closer once scale and minimum are rounded: the codes do not belong to the unrounded ones."""
    x = np.random.default_rng(seed).uniform(3, 5, (2, 32)).astype(np.float32)
    quantised = quantise(x, bits, 16, metadata)
    scale = np.repeat(quantised.scale.astype(float), 16, axis=-1)
    minimum = np.repeat(quantised.minimum.astype(float), 16, axis=-1)
    error = np.abs(quantised.codes * scale + minimum - x)
    for code in range(2**bits):
        assert (error <= np.abs(code * scale + minimum - x) + 1e-5).all()


def test_metadata_is_rounded_and_a_lost_range_gives_the_minimum():
    quantised = quantise(np.array([1.0, 1.0 + 2**-20]), 2, 2, "float16")
    assert quantised.scale.dtype == np.float16
    assert quantise(np.zeros(2), 2, 2, "bfloat16").scale.dtype == ml_dtypes.bfloat16
    tiny = quantise(np.array([1.0, 1.001]), 2, 2, "float8_e4m3fn")
    assert float(tiny.scale[0]) == 0
    np.testing.assert_array_equal(dequantise(tiny), [1, 1])
    with pytest.raises(ValueError, match="does not fit"):
        quantise(np.array([-1e6, 1e6]), 2, 2, "float16")


def test_groups_run_over_tokens_for_keys_and_channels_for_values(rng):
    x = rng.standard_normal((8, 4)).astype(np.float32)
    keys, values = roundtrip_per_channel(x, 2, 4), roundtrip_per_token(x, 2, 2)
    for t0 in (0, 4):
        for c in range(4):
            expected = dequantise(quantise(x[t0 : t0 + 4, c], 2, 4))
            np.testing.assert_array_equal(keys[t0 : t0 + 4, c], expected)
    for t in range(8):
        for c0 in (0, 2):
            np.testing.assert_array_equal(values[t, c0 : c0 + 2], dequantise(quantise(x[t, c0 : c0 + 2], 2, 2)))


@fresh
@given(seeds)
def test_integer_zero_quantiser(seed):
    x = np.random.default_rng(seed).standard_normal((5, 64)).astype(np.float32)
    back = integer_zero_roundtrip(x)
    step = (x.max(1) - x.min(1)) / 15
    assert (np.abs(back - x) <= step[:, None] * 1.02).all()
    assert len(np.unique(back[0])) <= 16
    levels = back / np.float16(step)[:, None].astype(np.float32)
    np.testing.assert_allclose(levels, np.rint(levels), atol=1e-3)
    assert (back[x == 0] == 0).all()


def test_integer_zero_quantiser_saturates_away_from_zero():
    x = np.array([[10.0, 11.5]], np.float32)
    np.testing.assert_allclose(integer_zero_roundtrip(x), [[1.5, 1.5]], rtol=1e-3)


# -- golden tests 4, 5, 10: allocation and scores ----------------------------------------------------------------------


def test_golden_4_pyramid():
    ratios = pyramid_ratios(0.25, 32)
    assert ratios[0] == pytest.approx(0.464286, abs=5e-7)
    assert ratios[31] == pytest.approx(0.035714, abs=5e-7)
    counts = [int(4096 * r) for r in ratios]
    assert counts[:3] == [1901, 1845, 1788] and counts[-2:] == [202, 146] and sum(counts) == 32752


@fresh
@given(st.floats(0.001, 1), st.integers(1, 80), st.floats(1, 30))
def test_pyramid_keeps_the_mean_and_falls(ratio, layers, depth):
    ratios = pyramid_ratios(ratio, layers, depth)
    assert np.mean(ratios) == pytest.approx(ratio)
    assert all(a >= b - 1e-12 for a, b in pairwise(ratios))
    if layers > 1:
        assert ratios[-1] == pytest.approx(ratio / depth)


def test_golden_5_uniform_attention_has_harmonic_column_sums(rng):
    query, key, _ = draw(rng, 40)
    sums = column_sums(np.zeros_like(query), key)
    expected = [2 * sum(1 / (i + 1) for i in range(j, 40)) for j in range(40)]
    np.testing.assert_allclose(sums, [expected, expected], rtol=1e-12)


@fresh
@given(seeds, st.integers(1, 60), heads)
def test_golden_5_column_sums_add_to_the_number_of_rows(seed, length, shape):
    query, key, _ = draw(np.random.default_rng(seed), length, shape)
    np.testing.assert_allclose(column_sums(query, key).sum(axis=1), length * shape[0] // shape[1], rtol=1e-10)


@fresh
@given(seeds, st.integers(2, 30), st.integers(1, 30))
def test_scores_read_no_future(seed, length, window):
    """The last token's own column only holds its own row; window scores leave out all rows before the window."""
    rng = np.random.default_rng(seed)
    window = min(window, length - 1)
    query, key, _ = draw(rng, length, (4, 2))
    before = window_scores(query, key, window, kernel=1)
    changed = query.copy()
    changed[: length - window] = rng.standard_normal(changed[: length - window].shape)
    np.testing.assert_allclose(window_scores(changed, key, window, kernel=1), before, rtol=1e-12)
    assert (column_sums(query, key)[:, -1] <= 2).all()
    assert before.shape == (2, length - window) and (before.sum(axis=1) <= 2 * window).all()


def test_window_of_everything_else_makes_the_column_sums(rng):
    query, key, _ = draw(rng, 20, (6, 3))
    rows = window_scores(query, key, 12, kernel=1)
    before = column_sums(query[:8], key[:8])
    np.testing.assert_allclose(rows + before, column_sums(query, key)[:, :8], rtol=1e-10)


def test_golden_10_pyramidkv_budgets():
    budgets = pyramidkv_budgets(2048, 32, 32, 8192)
    assert budgets[0] == 3932 and budgets[31] == 119 and budgets[0] - budgets[1] == 123


@fresh
@given(st.integers(0, 64), st.integers(0, 400), st.integers(2, 40), st.integers(1, 3000))
def test_pyramidkv_budgets_never_ask_for_more_than_there_is(window, spare, layers, length):
    capacity = max(window, 1) + spare
    budgets = pyramidkv_budgets(capacity, window, layers, length)
    mean = capacity - window
    assert len(budgets) == layers and all(0 <= b <= max(length - window, 0) for b in budgets)
    assert all(a >= b for a, b in pairwise(budgets))
    if capacity <= length < 2 * mean:
        assert set(budgets) == {mean}
    elif length >= max(capacity, 2 * mean):
        step = budgets[0] - budgets[1]
        assert all(a - b == step for a, b in pairwise(budgets))
        assert mean <= np.mean(budgets) < mean + layers / 2


@fresh
@given(st.integers(1, 30), st.integers(1, 300), st.integers(2, 40), st.data())
def test_pyramidkv_is_flat_below_twice_the_capacity(window, spare, layers, data):
    length = data.draw(st.integers(window + spare, max(window + spare, 2 * spare)))
    budgets = pyramidkv_budgets(window + spare, window, layers, length)
    if length < 2 * spare:
        assert budgets == [spare] * layers
    elif length == 2 * spare and spare >= 20 * layers:
        assert budgets[0] > spare > budgets[-1]


def test_counts_are_cut_not_rounded():
    assert [count_of(n, 0.25) for n in (3, 4, 7, 8)] == [0, 1, 1, 2]
    assert count_of(100, 0.29) == 28
    assert count_of(5, 12) == 12
    with pytest.raises(ValueError):
        count_of(5, -0.5)


def test_pooling_counts_the_zero_padding():
    x = np.array([[3.0, 0, 0, 0, 6]])
    np.testing.assert_allclose(pool(x, 3, "avg"), [[1, 1, 0, 2, 2]])
    np.testing.assert_allclose(pool(x, 3, "max"), [[3, 3, 0, 6, 6]])
    np.testing.assert_allclose(pool(np.ones((1, 5)), 5, "avg"), [[0.6, 0.8, 1, 0.8, 0.6]])
    with pytest.raises(ValueError, match="odd"):
        pool(x, 4, "avg")


@fresh
@given(seeds, st.integers(1, 20), st.data())
def test_top_positions_settle_ties_by_position(seed, length, data):
    scores = np.random.default_rng(seed).integers(0, 4, length).astype(float)
    count = data.draw(st.integers(0, length))
    expected = np.sort(np.argsort(-scores, kind="stable")[:count])
    assert top_positions(scores, count) == expected.tolist()


# -- the full cache ----------------------------------------------------------------------------------------------------


@fresh
@given(seeds, st.integers(1, 20), st.integers(0, 6), heads)
def test_full_is_plain_attention(seed, length, steps, shape):
    rng = np.random.default_rng(seed)
    method = Full()
    outputs, query, key, value = play(method, rng, length, steps, shape, 8)
    same_as_full(outputs, query, key, value, length)
    prefill = causal_attention(query, key, value)
    for t in range(length + steps):
        np.testing.assert_allclose(prefill[t], plain_row(query, key, value, t), rtol=1e-9, atol=1e-11)
    assert method.held == length + steps
    assert method.bits().total == 2 * (length + steps) * shape[1] * 8 * 16


def test_the_prefill_output_is_exact_whatever_is_kept(rng):
    query, key, value = draw(rng, 60)
    expected = causal_attention(query, key, value)
    methods = (
        Full(),
        StreamingLLM(recent=8),
        H2O(),
        SnapKV(window=4, capacity=9),
        QHitter(),
        KIVI(group=4, residual=8),
    )
    for method in (*methods, MiniKV(group=4, residual=8), MiKV()):
        np.testing.assert_array_equal(method.prefill(query, key, value), expected)


# -- StreamingLLM ------------------------------------------------------------------------------------------------------


@fresh
@given(seeds, st.integers(1, 30), st.integers(1, 10), st.integers(0, 5), st.integers(1, 12), st.sampled_from([0, 1]))
def test_streaming_llm_holds_the_sinks_and_the_last_tokens(seed, length, recent, sinks, steps, late):
    method = StreamingLLM(sinks=sinks, recent=recent, make_room=("before", "after")[late])
    _, _, key, _ = play(method, np.random.default_rng(seed), length, steps)
    total = length + steps
    expected = [t for t in range(total) if t < sinks or t >= total - recent]
    assert method.positions() == [expected, expected]
    read = [t for t in range(total) if t < sinks or t >= total - recent - late]
    assert method.seen[1].positions.tolist() == read
    np.testing.assert_array_equal(method.seen[1].keys, key[read, 1])


# -- H2O ---------------------------------------------------------------------------------------------------------------


def test_h2o_by_hand_with_uniform_attention(rng):
    """Zero queries: early tokens lead, each step adds the same to all, and the youngest outside the window goes."""
    query, key, value = draw(rng, 14)
    query[:] = 0
    method = H2O(heavy=3, recent=2)
    method.prefill(query[:10], key[:10], value[:10])
    assert method.positions() == [[0, 1, 2, 8, 9]] * 2
    for t, expected in ((10, [0, 1, 2, 9, 10]), (11, [0, 1, 2, 10, 11])):
        method.step(query[t], key[t], value[t])
        assert method.positions() == [expected] * 2
        assert all(len(view.positions) == 6 for view in method.seen)
    harmonic = 2 * sum(1 / (i + 1) for i in range(10))
    assert method.scores()[0][0] == pytest.approx(harmonic + 4 / 6)
    assert method.scores()[0][-1] == pytest.approx(2 / 6)


@fresh
@given(seeds, st.integers(1, 60), st.integers(1, 8), st.floats(0, 0.6), st.floats(0, 0.6), heads)
def test_h2o_size_is_constant_and_the_choice_is_the_sources(seed, length, steps, heavy, recent, shape):
    """Step by step: the same set as picking the heavy best of all but the recent tokens anew (section 4.1, path 2)."""
    rng = np.random.default_rng(seed)
    query, key, value = draw(rng, length + steps, shape)
    method = H2O(heavy=heavy, recent=recent)
    method.prefill(query[:length], key[:length], value[:length])
    n_heavy, n_recent = int(length * heavy), int(length * recent)
    if n_heavy + n_recent == 0:
        n_recent = 1
    sums = column_sums(query[:length], key[:length])
    held = [sorted(np.argsort(-s[: length - n_recent])[:n_heavy].tolist()) for s in sums]
    held = [h + list(range(max(0, length - n_recent), length)) for h in held]
    if n_heavy + n_recent >= length:
        held = [list(range(length))] * shape[1]
    assert method.positions() == held
    totals = [{p: s[p] for p in h} for s, h in zip(sums, held)]
    for t in range(length, length + steps):
        expected_output = np.zeros((shape[0], 16))
        for k in range(shape[1]):
            totals[k][t] = 0
            places = sorted(totals[k])
            for n in range(k * shape[0] // shape[1], (k + 1) * shape[0] // shape[1]):
                weights = np.exp(key[places, k].astype(float) @ query[t, n] / 4)
                weights /= weights.sum()
                expected_output[n] = weights @ value[places, k]
                for p, w in zip(places, weights):
                    totals[k][p] += w
            if len(places) > n_heavy + n_recent:
                old, new = places[: len(places) - n_recent], places[len(places) - n_recent :]
                best = sorted(old, key=lambda p, k=k: -totals[k][p])[:n_heavy]
                totals[k] = {p: totals[k][p] for p in sorted(best + new)}
        output = method.step(query[t], key[t], value[t])
        np.testing.assert_allclose(output, expected_output, rtol=1e-6, atol=1e-8)
        assert method.positions() == [sorted(x) for x in totals]
        for k in range(shape[1]):
            np.testing.assert_allclose(method.scores()[k], [totals[k][p] for p in sorted(totals[k])], rtol=1e-6)
        assert method.held == min(t + 1, n_heavy + n_recent)


@pytest.mark.parametrize("kind, options", [(H2O, {"heavy": 3, "recent": 2}), (MiKV, {"ratio": 0.5})])
def test_of_equal_scores_the_later_position_goes(rng, kind, options):
    query, key, value = draw(rng, 11)
    query[:] = 0
    method = kind(**options)
    method.prefill(query[:10], key[:10], value[:10])
    for head in method.heads:
        for token in head:
            token.score = 1.0
    method.step(query[10], key[10], value[10])
    held = method.positions() if kind is H2O else method.important_positions()
    assert held == [[0, 1, 2, 9, 10]] * 2


@fresh
@given(seeds, st.integers(4, 40), st.integers(1, 8))
def test_h2o_persistent_keeps_its_choice_and_all_generated(seed, length, steps):
    method = H2O(heavy=0.25, recent=0.25, persistent=True)
    play(method, np.random.default_rng(seed), length, steps)
    once = H2O(heavy=0.25, recent=0.25)
    rng = np.random.default_rng(seed)
    query, key, value = draw(rng, length + steps)
    once.prefill(query[:length], key[:length], value[:length])
    assert method.kept_prompt_positions() == once.positions()
    assert all(head[-steps:] == list(range(length, length + steps)) for head in method.positions())
    assert method.held == 2 * int(length * 0.25) + steps
    assert method.bits().scores == 0 < once.bits().scores


# -- SnapKV and PyramidKV ----------------------------------------------------------------------------------------------


@fresh
@given(seeds, st.integers(-3, 30), st.integers(1, 12), st.integers(0, 30), st.sampled_from(["avg", "max"]), heads)
def test_snapkv_keeps_the_window_and_the_best_of_the_rest(seed, over, window, spare, pooling, shape):
    length = max(1, window + spare + over)
    method = SnapKV(window=window, capacity=window + spare, kernel=5, pooling=pooling)
    outputs, query, key, _ = play(method, np.random.default_rng(seed), length, 3, shape)
    assert len(outputs) == 3 and method.held == min(length, window + spare) + 3
    kept = method.kept_prompt_positions()
    assert all(head[-min(window, length) :] == list(range(max(0, length - window), length)) for head in kept)
    if length >= window + spare:
        rows = []
        for n in range(shape[0]):
            logits = query[:length, n].astype(float) @ key[:length, n * shape[1] // shape[0]].T.astype(float) / 4
            p = np.where(np.tri(length, dtype=bool), np.exp(logits), 0)
            rows.append((p / p.sum(1, keepdims=True))[length - window :, : length - window].sum(0))
        sums = np.array(rows).reshape(shape[1], shape[0] // shape[1], length - window).sum(1)
        for k in range(shape[1]):
            pooled = np.zeros(length - window)
            for j in range(length - window):
                near = [sums[k, i] for i in range(j - 2, j + 3) if 0 <= i < length - window]
                pooled[j] = max(near) if pooling == "max" else sum(near) / 5
            inside = pooled[kept[k][:spare]]
            outside = np.delete(pooled, kept[k][:spare])
            assert not (inside.size and outside.size) or inside.min() >= outside.max() - 1e-9


def test_snapkv_below_its_window_keeps_the_last_tokens(rng):
    method = SnapKV(window=8, capacity=0.1)
    play(method, rng, 30, 0)
    assert method.positions() == [[27, 28, 29]] * 2
    method = SnapKV(window=8, capacity=0.1)
    play(method, rng, 5, 0)
    assert method.positions() == [[4]] * 2


@fresh
@given(seeds, st.integers(1, 80), st.integers(2, 6))
def test_pyramidkv_follows_its_budgets(seed, length, layers):
    query, key, value = draw(np.random.default_rng(seed), length)
    held = []
    for layer in range(layers):
        method = PyramidKV(window=4, capacity=24, layer=layer, layers=layers)
        method.prefill(query, key, value)
        held.append(method.held)
        widest = SnapKV(window=4, capacity=min(held[0], length))
        widest.prefill(query, key, value)
        assert all(set(a) <= set(b) for a, b in zip(method.positions(), widest.positions()))
    if length < 24:
        assert held == [length] * layers
    else:
        assert held == [b + 4 for b in pyramidkv_budgets(24, 4, layers, length)]


# -- Q-Hitter ----------------------------------------------------------------------------------------------------------


@fresh
@given(seeds, st.integers(20, 60), st.integers(0, 5), st.sampled_from(["integer-zero", "min-max"]))
def test_qhitter_holds_a_constant_number_of_quantised_tokens(seed, length, steps, quantiser):
    method = QHitter(heavy=0.3, recent=0.2, quantiser=quantiser)
    _, _, key, value = play(method, np.random.default_rng(seed), length, steps)
    total, recent = length + steps, int(length * 0.2)
    assert method.held == int(length * 0.3) + recent == method.packed_key_length == method.packed_value_length
    assert all(head[-recent:] == list(range(total - recent, total)) for head in method.positions())
    for h, view in enumerate(method.views()):
        for exact, back in ((key, view.keys), (value, view.values)):
            rows = exact[view.positions, h]
            if quantiser == "integer-zero":
                np.testing.assert_array_equal(back, integer_zero_roundtrip(rows))
            else:
                np.testing.assert_array_equal(back, roundtrip_per_token(rows, 4, 16))
    bits = method.bits()
    assert bits.kv == 2 * 2 * method.held * (16 * 4 + 32) and bits.dense == 0


def test_qhitter_of_weight_one_chooses_like_h2o(rng):
    query, key, value = draw(rng, 60)
    for weight, same in ((1.0, True), (0.0, False)):
        method, plain = QHitter(heavy=0.2, recent=0.1, weight=weight), H2O(heavy=0.2, recent=0.1)
        method.prefill(query, key, value)
        plain.prefill(query, key, value)
        assert (method.positions() == plain.positions()) is same


def test_qhitter_prefers_friendly_tokens_but_not_over_the_default_share(rng):
    """With weight 0 all but the default share go to the tokens of smallest error."""
    query, key, value = draw(rng, 100, (1, 1))
    method = QHitter(heavy=0.2, recent=0.05, weight=0.0)
    method.prefill(query, key, value)
    (kept,) = method.positions()
    scores = column_sums(query, key)[0, :95]
    default = top_positions(scores, 7)
    assert set(default) <= set(kept)
    errors = []
    for x in (key[:, 0], value[:, 0]):
        e = np.linalg.norm(integer_zero_roundtrip(x).astype(float) - x, axis=1)
        errors.append((e - e.min()) / (e.max() - e.min()))
    total = (errors[0] + errors[1])[:95]
    others = sorted(set(range(95)) - set(default), key=lambda t: total[t])[:13]
    assert kept == sorted(default + others) + list(range(95, 100))


def zero_to_one(x):
    return (x - x.min()) / (x.max() - x.min())


def test_qhitter_combines_over_the_whole_layer(rng):
    """Both terms are normalised over all heads and tokens, at prefill and at the eviction of a step (section 4.4)."""
    query, key, value = draw(rng, 61)
    query[:, 2:] *= 0.1
    query[:, :2, 0], key[3, 0, 0] = 5, 10  # head 0 looks at one token, so head 1's attention is small in the layer
    key[:, 1] *= np.linspace(0.2, 4, 61, dtype=np.float32)[:, None]
    method = QHitter(heavy=0.3, recent=0.1)
    method.prefill(query[:60], key[:60], value[:60])

    def errors(x):
        return np.array(
            [np.linalg.norm(integer_zero_roundtrip(x[:, h]).astype(float) - x[:, h], axis=1) for h in (0, 1)]
        )

    sums = column_sums(query[:60], key[:60])
    friendly = (2 - zero_to_one(errors(key[:60])) - zero_to_one(errors(value[:60]))) / 2
    mixed = (zero_to_one(sums) + friendly) / 2
    for h in (0, 1):
        default = top_positions(sums[h, :54], 4)
        others = sorted(set(range(54)) - set(default), key=lambda t, h=h: -mixed[h, t])[:14]
        assert method.positions()[h] == sorted(default + others) + list(range(54, 60))

    before = method.positions()
    method.step(query[60], key[60], value[60])
    totals = [{p: sums[h, p] if p < 60 else 0.0 for p in [*before[h], 60]} for h in (0, 1)]
    for h in (0, 1):
        assert method.seen[h].positions.tolist() == [*before[h], 60]
        for p, w in zip(method.seen[h].positions, method.received[h]):
            totals[h][p] += w
    flat = [x for t in totals for x in t.values()]
    for h in (0, 1):
        old = before[h][:19]  # 18 heavy and the one that leaves the window
        default = sorted(old, key=lambda p, h=h: -totals[h][p])[:4]
        combined = {p: (totals[h][p] - min(flat)) / (max(flat) - min(flat)) + friendly[h, p] for p in old}
        others = sorted(set(old) - set(default), key=lambda p, c=combined: -c[p])[:14]
        assert method.positions()[h] == sorted(default + others) + list(range(55, 61))


def test_qhitter_normalises_a_new_token_over_heads_alone(rng):
    query, key, value = draw(rng, 21)
    method = QHitter(heavy=0.5, recent=0.5)
    method.prefill(query[:20], key[:20], value[:20])
    method.step(query[20], key[20], value[20])
    both = [
        [np.linalg.norm(integer_zero_roundtrip(x[20, h][None])[0].astype(float) - x[20, h]) for h in (0, 1)]
        for x in (key, value)
    ]
    expected = [1 - (both[0][h] > both[0][1 - h]) / 2 - (both[1][h] > both[1][1 - h]) / 2 for h in (0, 1)]
    assert [head[-1].friendliness for head in method.heads] == expected
    single = QHitter(heavy=0.5, recent=0.5)
    single.prefill(query[:20, :2], key[:20, :1], value[:20, :1])
    single.step(query[20, :2], key[20, :1], value[20, :1])
    assert single.heads[0][-1].friendliness == 1


def test_qhitter_can_leave_the_recent_tokens_dense(rng):
    method = QHitter(heavy=0.2, recent=0.1, dense_recent=True)
    _, _, key, _ = play(method, rng, 50, 4)
    assert method.window_key_length == 5 and method.packed_value_length == 10
    np.testing.assert_array_equal(method.views()[0].keys[-5:], key[-5:, 0])
    assert method.seen[0].positions[-1] == 53
    np.testing.assert_array_equal(method.seen[0].keys[-1], key[-1, 0])


# -- KIVI --------------------------------------------------------------------------------------------------------------


def test_golden_9_kivi_tails(rng):
    method = KIVI(group=16, residual=128)
    play(method, rng, 300, 0, (1, 1))
    assert (method.packed_key_length, method.window_key_length) == (256, 44)
    assert (method.packed_value_length, method.window_value_length) == (172, 128)


@fresh
@given(
    seeds, st.integers(1, 60), st.integers(0, 20), st.sampled_from([(4, 4), (4, 12), (8, 16)]), st.sampled_from([2, 4])
)
def test_kivi_lengths_and_contents(seed, length, steps, sizes, bits):
    group, residual = sizes
    rng = np.random.default_rng(seed)
    query, key, value = draw(rng, length + steps)
    method = KIVI(code_bits=bits, group=group, residual=residual)
    method.prefill(query[:length], key[:length], value[:length])
    for total in range(length, length + steps + 1):
        if total > length:
            t = total - 1
            before = method.views()
            output = method.step(query[t], key[t], value[t])
            for h, (old, seen) in enumerate(zip(before, method.seen)):
                np.testing.assert_array_equal(seen.keys, np.vstack([old.keys, key[t, h]]))
                np.testing.assert_array_equal(seen.values, np.vstack([old.values, value[t, h]]))
            np.testing.assert_allclose(output, attend(query[t], method.seen)[0])
        assert method.held == total
        assert method.window_key_length == total % residual
        assert method.window_value_length == min(total, residual)
    for h, view in enumerate(method.views()):
        packed = method.packed_key_length
        np.testing.assert_array_equal(view.keys[:packed], roundtrip_per_channel(key[:packed, h], bits, group))
        np.testing.assert_array_equal(view.keys[packed:], key[packed:, h])
        packed = method.packed_value_length
        np.testing.assert_array_equal(view.values[:packed], roundtrip_per_token(value[:packed, h], bits, group))
        np.testing.assert_array_equal(view.values[packed:], value[packed:, h])


@fresh
@given(seeds, st.integers(1, 30), st.integers(1, 10))
def test_kivi_at_16_bits_is_full(seed, length, steps):
    outputs, *tensors = play(KIVI(code_bits=16, group=4, residual=8), np.random.default_rng(seed), length, steps)
    same_as_full(outputs, *tensors, length)


# -- MiniKV ------------------------------------------------------------------------------------------------------------


@fresh
@given(seeds, st.integers(1, 40), st.integers(1, 8), st.sampled_from(["uniform", "pyramid"]), heads)
def test_golden_6_minikv_that_keeps_all_at_16_bits_is_full(seed, length, steps, allocation, shape):
    method = MiniKV(heavy=1.0, recent=0.0, code_bits=16, residual=128, allocation=allocation)
    outputs, *tensors = play(method, np.random.default_rng(seed), length, steps, shape)
    same_as_full(outputs, *tensors, length)
    method = MiniKV(heavy=0.5, recent=0.5, code_bits=16, residual=16, group=16)
    outputs, *tensors = play(method, np.random.default_rng(seed), 2 * length, steps, shape)
    same_as_full(outputs, *tensors, 2 * length)


def test_minikv_halves_of_an_odd_prompt_lose_one_token(rng):
    """int(N / 2) + int(N / 2) < N: shares that add to one do not always keep all (section 1.2)."""
    method = MiniKV(heavy=0.5, recent=0.5)
    play(method, rng, 17, 0)
    assert method.held == 16


def test_golden_9_minikv_flushes_at_the_116th_token_then_every_128(rng):
    method = MiniKV(heavy=0.5, recent=0.5, group=16, residual=128)
    flushes = []
    query, key, value = draw(rng, 300 + 116 + 128 + 3, (1, 1))
    method.prefill(query[:300], key[:300], value[:300])
    assert (method.packed_key_length, method.window_key_length) == (288, 12)
    assert (method.packed_value_length, method.window_value_length) == (288, 12)
    for generated in range(1, 116 + 128 + 3):
        packed = method.packed_key_length
        t = 300 + generated - 1
        method.step(query[t], key[t], value[t])
        assert method.packed_key_length == method.packed_value_length
        if method.packed_key_length != packed:
            assert method.packed_key_length == packed + 128 and method.window_key_length == 0
            assert not np.array_equal(method.seen[0].keys[-1], key[t, 0]), "the newest token is read after the flush"
            flushes.append(generated)
        else:
            np.testing.assert_array_equal(method.seen[0].keys[-1], key[t, 0])
    assert flushes == [116, 244]


@fresh
@given(seeds, st.integers(1, 80), st.integers(0, 20), st.floats(0, 0.7), st.floats(0, 0.7), heads)
def test_minikv_selection_and_contents(seed, length, steps, heavy, recent, shape):
    method = MiniKV(heavy=heavy, recent=recent, group=4, residual=8)
    outputs, query, key, value = play(method, np.random.default_rng(seed), length, steps, shape)
    n_heavy, n_recent = int(length * heavy), int(length * recent)
    sums = column_sums(query[:length], key[:length])
    for h in range(shape[1]):
        if n_heavy + n_recent >= length:
            kept = list(range(length))
        elif n_heavy + n_recent == 0:
            kept = [length - 1]
        else:
            best = np.argsort(-sums[h, : length - n_recent])[:n_heavy]
            kept = sorted(best.tolist()) + list(range(length - n_recent, length))
        assert method.kept_prompt_positions()[h] == kept
        assert method.positions()[h] == kept + list(range(length, length + steps))
        order = method.positions()[h]
        first = len(kept) - len(kept) % 4
        packed = first
        while len(order) - packed >= 8:
            packed += 8
        assert (method.packed_key_length, method.packed_value_length) == (packed, packed)
        assert method.window_key_length < 8
        view = method.views()[h]
        # A flush holds whole groups, so grouping the packed part from its start is the same as flush by flush.
        np.testing.assert_array_equal(view.keys[:packed], roundtrip_per_channel(key[order[:packed], h], 2, 4))
        np.testing.assert_array_equal(view.values[:packed], roundtrip_per_token(value[order[:packed], h], 2, 4))
        np.testing.assert_array_equal(view.keys[packed:], key[order[packed:], h])
        np.testing.assert_array_equal(view.values[packed:], value[order[packed:], h])
        if outputs:
            np.testing.assert_array_equal(method.seen[h].keys, view.keys)
    bits = method.bits()
    per_element = bits_per_element(2, 4)
    assert bits.codes + bits.metadata == 2 * shape[1] * 16 * packed * per_element
    assert bits.dense == 2 * shape[1] * 16 * method.window_key_length * 16


@fresh
@given(seeds, st.integers(1, 60), st.integers(2, 6))
def test_minikv_pyramid_counts(seed, length, layers):
    query, key, value = draw(np.random.default_rng(seed), length)
    for layer, ratio in enumerate(pyramid_ratios(0.25, layers)):
        method = MiniKV(allocation="pyramid", layer=layer, layers=layers)
        method.prefill(query, key, value)
        assert method.held == max(1, int(length * ratio) + int(length * 0.25))


# -- MiKV --------------------------------------------------------------------------------------------------------------


@fresh
@given(seeds, st.integers(1, 40), st.integers(1, 6), heads, st.booleans())
def test_golden_7_mikv_with_everything_important_is_full(seed, length, steps, shape, persistent):
    method = MiKV(ratio=1.0, persistent=persistent)
    outputs, *tensors = play(method, np.random.default_rng(seed), length, steps, shape)
    same_as_full(outputs, *tensors, length)
    assert method.retained_positions() == [[]] * shape[1]


@fresh
@given(seeds, st.integers(1, 40), heads)
def test_golden_7_the_balancer_leaves_exact_logits(seed, length, shape):
    query, key, _ = draw(np.random.default_rng(seed), length, shape)
    key[..., 3] *= 50
    key[..., 5] = 0
    balance = channel_balancer(query, key).astype(float)
    assert balance.shape == (shape[1], 16) and np.isfinite(balance).all() and (balance > 0).all()
    for n in range(shape[0]):
        h = n * shape[1] // shape[0]
        plain = query[:, n].astype(float) @ key[:, h].astype(float).T
        balanced = (query[:, n] / balance[h]) @ (key[:, h] * balance[h]).T
        np.testing.assert_allclose(balanced, plain, rtol=1e-9, atol=1e-9)


def test_balancer_by_hand():
    query, key = np.zeros((2, 2, 2), np.float32), np.zeros((2, 1, 2), np.float32)
    query[1, 1, 0], query[0, 0, 0], key[1, 0, 0] = -8, 2, 2
    np.testing.assert_allclose(channel_balancer(query, key), [[2, 1]])
    np.testing.assert_allclose(channel_balancer(query[:, :1], key), [[1, 1]])
    key[0, 0, 1] = -1e5
    np.testing.assert_allclose(channel_balancer(query, key), [[2, 1e-5]], rtol=1e-5)


@fresh
@given(seeds, st.integers(1, 50), st.integers(0, 8), st.floats(0, 0.99), heads, st.sampled_from(["prompt", "current"]))
def test_mikv_drops_nothing_and_demotes_for_good(seed, length, steps, ratio, shape, budget):
    rng = np.random.default_rng(seed)
    query, key, value = draw(rng, length + steps, shape)
    method = MiKV(ratio=ratio, budget=budget)
    method.prefill(query[:length], key[:length], value[:length])
    size = int(ratio * length)
    sums = column_sums(query[:length], key[:length])
    for h in range(shape[1]):
        recent = size // 2
        best = np.argsort(-sums[h, : length - recent])[: size - recent].tolist()
        assert method.important_positions()[h] == sorted(best + list(range(length - recent, length)))
    for t in range(length, length + steps):
        before, scores = method.important_positions(), method.scores()
        method.step(query[t], key[t], value[t])
        size = int(ratio * (length if budget == "prompt" else t + 1))
        for h in range(shape[1]):
            after = method.important_positions()[h]
            lost = sorted(set([*before[h], t]) - set(after))
            assert set(after) <= set([*before[h], t]) and len(after) == size and len(lost) <= 1
            if lost:
                candidates = [*before[h], t][: len(before[h]) + 1 - size // 2]
                totals = {p: ([*scores[h], 0.0][p] + method.received[h][p]) for p in candidates}
                assert min(totals, key=totals.get) == lost[0]
                place = method.seen[h].positions.tolist().index(lost[0])
                np.testing.assert_array_equal(method.seen[h].keys[place], key[lost[0], h])
    balance = channel_balancer(query[:length], key[:length])
    assert method.positions() == [list(range(length + steps))] * shape[1]
    for h, view in enumerate(method.views()):
        low, high = method.retained_positions()[h], method.important_positions()[h]
        np.testing.assert_array_equal(view.keys[high], key[high, h])
        np.testing.assert_array_equal(view.values[high], value[high, h])
        if low:
            back = roundtrip_per_token(key[low, h] * balance[h], 2, 8).astype(float) / balance[h].astype(float)
            np.testing.assert_array_equal(view.keys[low], back)
            np.testing.assert_array_equal(view.values[low], roundtrip_per_token(value[low, h], 2, 8))
    bits = method.bits()
    assert bits.dense == 2 * shape[1] * size * 16 * 16
    assert bits.codes + bits.metadata == 2 * shape[1] * (length + steps - size) * 16 * bits_per_element(2, 8)


def test_mikv_by_hand_with_uniform_attention(rng):
    query, key, value = draw(rng, 22)
    query[:] = 0
    method = MiKV(ratio=0.25)
    method.prefill(query[:20], key[:20], value[:20])
    assert method.important_positions() == [[0, 1, 2, 18, 19]] * 2
    method.step(query[20], key[20], value[20])
    assert method.important_positions() == [[0, 1, 2, 19, 20]] * 2
    method = MiKV(ratio=0.25, persistent=True)
    method.prefill(query[:20], key[:20], value[:20])
    method.step(query[20], key[20], value[20])
    assert method.important_positions() == [[0, 1, 2, 18, 19, 20]] * 2


@fresh
@given(seeds, st.integers(2, 40), st.integers(1, 8), st.sampled_from([2, 4, 8]))
def test_mikv_integer_importance(seed, length, steps, bits):
    """The important tier takes the same quantiser, keys unbalanced, new tokens at once; r = 1 has only that error."""
    method = MiKV(ratio=1.0, important_bits=bits)
    _, _, key, value = play(method, np.random.default_rng(seed), length, steps)
    for h, view in enumerate(method.seen):
        np.testing.assert_array_equal(view.keys, roundtrip_per_token(key[:, h], bits, 8))
        np.testing.assert_array_equal(view.values, roundtrip_per_token(value[:, h], bits, 8))
    held = method.bits()
    assert held.kv == 2 * 2 * 16 * (length + steps) * bits_per_element(bits, 8)
    assert held.balancer == 2 * 16 * 32


def test_mikv_retained_at_16_bits_is_full(rng):
    method = MiKV(ratio=0.3, retained_bits=16)
    outputs, *tensors = play(method, rng, 30, 5)
    same_as_full(outputs, *tensors, 30)
    assert method.bits().kv == 2 * 2 * 16 * 35 * 16


def test_the_balancer_helps_when_a_key_channel_is_an_outlier(rng):
    """Averaged over 30 draws: 2-bit keys with one channel fifty times the others (section 2.1 c)."""
    errors = {True: 0.0, False: 0.0}
    for _ in range(30):
        query, key, value = draw(rng, 41, (1, 1), 16)
        key[..., 2] = 50 * np.sign(key[..., 2])
        query[..., 2] /= 50
        exact = plain_row(query, key, value, 40)
        for balancer in errors:
            method = MiKV(ratio=0.0, balancer=balancer)
            method.prefill(query[:40], key[:40], value[:40])
            method.heads[0] = [t for t in method.heads[0] if t.position < 40]
            for token in method.heads[0]:
                token.value.array = value[token.position, 0]
            errors[balancer] += float(np.abs(method.step(query[40], key[40], value[40]) - exact).mean())
    assert errors[True] < 0.8 * errors[False], errors


# -- golden test 8: sizes ----------------------------------------------------------------------------------------------


def test_golden_8_sizes():
    assert minikv_mib(4096, 512, **LLAMA2_7B) == 320
    assert kivi_mib(4096, 512, **LLAMA2_7B, group=16) == 576
    assert full_mib(4096 + 512, **LLAMA2_7B) == 2304
    smaller = 1 - minikv_mib(4096, 512, **LLAMA2_7B) / full_mib(4096 + 512, **LLAMA2_7B)
    assert smaller == pytest.approx(0.861, abs=5e-4)
    shares = [mikv_share(0.2, 2, high, 128) for high in (16, 8, 4, 2)]
    assert shares == pytest.approx([0.325, 0.23125, 0.18125, 0.15625])
    assert [mikv_share(0.2, low, 16, 128) for low in (3, 4)] == pytest.approx([0.375, 0.425])


def test_bits_per_element_table():
    table = [[bits_per_element(b, g) for g in (16, 32, 64, 128)] for b in (2, 3, 4, 8)]
    assert table == [[4, 3, 2.5, 2.25], [5, 4, 3.5, 3.25], [6, 5, 4.5, 4.25], [10, 9, 8.5, 8.25]]


@fresh
@given(seeds, st.sampled_from([0.2, 0.25, 0.5]), st.sampled_from([(2, 16), (2, 2), (4, 8), (3, 16)]))
def test_mikv_bits_follow_the_formula(seed, ratio, tiers):
    low, high = tiers
    method = MiKV(ratio=ratio, retained_bits=low, important_bits=high)
    play(method, np.random.default_rng(seed), 40, 0)
    assert method.bits().kv / (2 * 2 * 40 * 16 * 16) == pytest.approx(mikv_share(ratio, low, high, 16))


@pytest.mark.parametrize("metadata", ["float16", "bfloat16", "float8_e4m3fn"])
def test_minikv_bits_follow_the_formula_when_the_buffer_is_empty(rng, metadata):
    method = MiniKV(metadata=metadata)
    play(method, rng, 64, 128)
    assert method.window_key_length == 0
    assert method.bits().kv / (2 * 2 * 160 * 16) == bits_per_element(2, 16, METADATA_BITS[metadata])


# -- heads -------------------------------------------------------------------------------------------------------------

EVERY_METHOD = [
    (Full, {}),
    (StreamingLLM, {"recent": 9}),
    (H2O, {"heavy": 0.2, "recent": 0.2}),
    (SnapKV, {"window": 4, "capacity": 14}),
    (PyramidKV, {"window": 4, "capacity": 14, "layer": 1, "layers": 4}),
    (QHitter, {"heavy": 0.2, "recent": 0.2}),
    (KIVI, {"group": 4, "residual": 8}),
    (MiniKV, {"group": 4, "residual": 8}),
    (MiniKV, {"group": 4, "residual": 8, "allocation": "pyramid", "layer": 2, "layers": 4}),
    (MiKV, {}),
    (MiKV, {"important_bits": 8, "persistent": True}),
]


@pytest.mark.parametrize("kind, options", EVERY_METHOD)
def test_per_query_head_is_a_run_on_repeated_heads(rng, kind, options):
    query, key, value = draw(rng, 44, (4, 2))
    wide_key, wide_value = (np.stack([x[:, n // 2] for n in range(4)], axis=1) for x in (key, value))
    one, two = kind(**options, per_query_head=True), kind(**options)
    one.prefill(query[:40], key[:40], value[:40])
    two.prefill(query[:40], wide_key[:40], wide_value[:40])
    for t in range(40, 44):
        output = one.step(query[t], key[t], value[t])
        np.testing.assert_array_equal(output, two.step(query[t], wide_key[t], wide_value[t]))
    assert one.positions() == two.positions() and len(one.positions()) == 4
    assert one.bits() == two.bits()


@pytest.mark.parametrize("kind, options", [m for m in EVERY_METHOD if m[0] is not QHitter])
def test_kv_heads_do_not_disturb_each_other(rng, kind, options):
    """Each kv head with its query heads gives what it gives alone. (Q-Hitter compares heads by design, section 4.4.)"""
    query, key, value = draw(rng, 44, (4, 2))
    whole = kind(**options)
    whole.prefill(query[:40], key[:40], value[:40])
    parts = [kind(**options) for _ in range(2)]
    for h, part in enumerate(parts):
        part.prefill(query[:40, 2 * h : 2 * h + 2], key[:40, h : h + 1], value[:40, h : h + 1])
    for t in range(40, 44):
        output = whole.step(query[t], key[t], value[t])
        for h, part in enumerate(parts):
            alone = part.step(query[t, 2 * h : 2 * h + 2], key[t, h : h + 1], value[t, h : h + 1])
            np.testing.assert_allclose(output[2 * h : 2 * h + 2], alone, rtol=1e-12)
            assert part.positions()[0] == whole.positions()[h]


@pytest.mark.parametrize("kind, options", EVERY_METHOD)
def test_the_order_of_query_heads_in_a_group_does_not_matter(rng, kind, options):
    query, key, value = draw(rng, 44, (4, 2))
    swapped = query[:, [1, 0, 3, 2]]
    one, two = kind(**options), kind(**options)
    one.prefill(query[:40], key[:40], value[:40])
    two.prefill(swapped[:40], key[:40], value[:40])
    for t in range(40, 44):
        output = one.step(query[t], key[t], value[t])
        np.testing.assert_allclose(two.step(swapped[t], key[t], value[t])[[1, 0, 3, 2]], output, rtol=1e-9, atol=1e-12)
    assert one.positions() == two.positions()


@pytest.mark.parametrize("kind, options", EVERY_METHOD)
@pytest.mark.parametrize("length", [1, 2, 3])
def test_short_prompts_never_leave_an_empty_cache(rng, kind, options, length):
    method = kind(**options)
    outputs, *_ = play(method, rng, length, 3)
    assert method.kept_prompt_positions()[0] or kind in (H2O, QHitter)
    assert method.held >= 1 and all(np.isfinite(output).all() for output in outputs)


def test_bad_shapes_are_refused(rng):
    query, key, value = draw(rng, 8)
    with pytest.raises(ValueError, match="shapes"):
        Full().prefill(query, key, value[:5])
    with pytest.raises(ValueError, match="shapes"):
        Full().prefill(query[:0], key[:0], value[:0])
    with pytest.raises(ValueError, match="divide"):
        Full().prefill(query[:, :3], key, value)
    with pytest.raises(ValueError, match="before step"):
        Full().step(query[0], key[0], value[0])
    with pytest.raises(ValueError, match="residual"):
        MiniKV(group=16, residual=24).prefill(query, key, value)
    with pytest.raises(ValueError, match="head size"):
        KIVI(group=32, residual=32).prefill(query, key, value)


def test_closest_call_measures_the_cut(rng):
    query, key, value = draw(rng, 30, (1, 1))
    method = MiniKV(heavy=0.2, recent=0.2)
    method.prefill(query, key, value)
    scores = np.sort(column_sums(query, key)[0, :24])[::-1]
    assert method.closest_call == pytest.approx((scores[5] - scores[6]) / scores[5])
    method = MiniKV(heavy=1.0)
    method.prefill(query, key, value)
    assert method.closest_call == np.inf
