"""Two-pass attention: the XLA path against float64, the Hopper kernel through the interpreter, lowering and a GPU."""

import os
import subprocess
import sys
from functools import partial

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper import on_mosaic
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.two_pass_attention import mosaic_gpu
from pallas_kernels.two_pass_attention.api import two_pass_attention

# Compiled once for all tests of a shape.
attend = jax.jit(two_pass_attention, static_argnames=("is_causal", "sliding_window", "score_rows", "implementation"))


def reference(q, k, v, rows, columns, offset, scale, causal=True, window=None, score_rows="all"):
    """The definition, one row at a time, in float64. Padding is never read."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, t, heads, _ = q.shape
    s, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    output, scores = np.zeros(q.shape), np.zeros((batch, kv_heads, s))
    lse = np.full((batch, t, heads), -np.inf)
    for b in range(batch):
        counted = 0 if score_rows == "all" else rows[b] - score_rows
        for n in range(heads):
            for i in range(rows[b]):
                position = i + offset[b]
                last = min(columns[b], position + 1) if causal else columns[b]
                first = 0 if window is None else max(position - window + 1, 0)
                if last <= first:
                    continue
                logits = k[b, first:last, n // group] @ q[b, i, n] * scale
                p = np.exp(logits - logits.max())
                output[b, i, n] = p @ v[b, first:last, n // group] / p.sum()
                lse[b, i, n] = logits.max() + np.log(p.sum())
                if i >= counted:
                    scores[b, n // group, first:last] += p / p.sum()
    return output, scores, lse


def draw(b, t, s, n, k, h, dtype=np.float32):
    rng = draws.rng()
    shapes = (b, t, n, h), (b, s, k, h), (b, s, k, h)
    return [draws.array(rng.standard_normal(shape), dtype) for shape in shapes]


def ints(*x):
    return jnp.asarray(x, jnp.int32)


def compare(got, want, tolerance):
    for a, b in zip(got, want):
        a = np.asarray(a, np.float64)
        assert np.isfinite(a[np.isfinite(b)]).all()
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)


def check_xla(t, s, heads, h, causal, window, score_rows, shift, share):
    q, k, v = draw(2, t, s, *heads, h)
    rows, columns = ints(t, max(int(t * share), 1)), ints(max(int(s * share), 1), s)
    window = window if causal else None
    offset = None if shift is None else ints(shift, 0)
    got = attend(
        q, k, v, query_lengths=rows, key_value_lengths=columns, query_offset=offset, is_causal=causal,
        sliding_window=window, score_rows=score_rows, implementation="xla",
    )  # fmt: skip
    begin = [0, 0] if offset is None else np.asarray(offset)
    want = reference(q, k, v, np.asarray(rows), np.asarray(columns), begin, h**-0.5, causal, window, score_rows)
    compare(got, want, 2e-4)


@given(shift=st.integers(0, 11), share=st.floats(0.1, 1), window=st.sampled_from([None, 7]))
@pytest.mark.promise("Prefill attention, its scores and its log-sum-exp are those of a float64 computation")
def test_xla_is_the_definition(shift, share, window):
    check_xla(40, 45, (4, 2), 64, True, window, 5, shift, share)


@pytest.mark.slow
@settings(max_examples=500)
@given(
    t=st.integers(1, 40),
    s=st.integers(1, 45),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1), (4, 4)]),
    h=st.sampled_from([8, 64, 96]),
    causal=st.booleans(),
    window=st.sampled_from([None, 1, 7]),
    score_rows=st.sampled_from(["all", 0, 5]),
    shift=st.sampled_from([None, 0, 3, 11]),
    share=st.floats(0.1, 1),
)
@pytest.mark.promise("Prefill attention, its scores and its log-sum-exp are those of a float64 computation")
def test_xla_is_the_definition_at_every_shape(t, s, heads, h, causal, window, score_rows, shift, share):
    check_xla(t, s, heads, h, causal, window, score_rows, shift, share)


def dominant(q, k, v):
    return q.at[:].set(1.0), k.at[:, 3].set(50.0), v


def equal(q, k, v):
    return jnp.zeros_like(q), k, v


def huge(q, k, v):
    """Logits of plus and minus 1e4."""
    h = q.shape[-1]
    signs = jnp.where(jnp.arange(k.shape[1]) % 2 == 0, 1.0, -1.0)[:, None, None]
    return jnp.full_like(q, 100.0), jnp.broadcast_to(signs * 100.0 / h**0.5, k.shape).astype(k.dtype), v


def denormal(q, k, v):
    return q * 1e-20, k * 1e-20, v


ADVERSARIAL = [dominant, equal, huge, denormal]


@pytest.mark.parametrize("change", ADVERSARIAL)
@pytest.mark.promise("Dominant, equal, huge and denormal values give right attention")
def test_adversarial_values(change):
    q, k, v = change(*draw(1, 33, 33, 4, 2, 64))
    got = attend(q, k, v, implementation="xla")
    compare(got, reference(q, k, v, [33], [33], [0], 64**-0.5), 2e-3 if change is huge else 1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.promise("NaN and infinities in padding reach no result of prefill attention")
def test_padding_may_hold_anything(bad):
    q, k, v = draw(2, 24, 30, 4, 2, 64)
    rows, columns = ints(24, 13), ints(21, 30)
    clean = attend(q, k, v, query_lengths=rows, key_value_lengths=columns)
    q, k, v = q.at[1, 13:].set(bad), k.at[0, 21:].set(bad), v.at[0, 21:].set(bad)
    dirty = attend(q, k, v, query_lengths=rows, key_value_lengths=columns)
    for a, b in zip(clean, dirty):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert (np.asarray(dirty[0])[1, 13:] == 0).all() and (np.asarray(dirty[1])[0, :, 21:] == 0).all()


@pytest.mark.promise("A row that may see nothing gets zeros, and no NaN")
def test_rows_that_see_nothing_get_zeros():
    q, k, v = draw(2, 24, 30, 4, 2, 64)
    output, scores, lse = attend(q, k * jnp.nan, v * jnp.nan, key_value_lengths=ints(0, 0))
    assert (np.asarray(output) == 0).all() and (np.asarray(scores) == 0).all() and np.isneginf(lse).all()


def test_a_length_beyond_the_array_means_the_array():
    q, k, v = draw(2, 24, 30, 4, 2, 64)
    want = attend(q, k, v, score_rows=5)
    got = attend(q, k, v, query_lengths=ints(25, 999), key_value_lengths=ints(31, 999), score_rows=5)
    compare(got, want, 1e-6)


@pytest.mark.promise("Column sums conserve the mass of attention")
def test_scores_add_up_to_the_rows(figure):
    q, k, v = draw(1, 100, 100, 6, 2, 64)
    _, scores, _ = attend(q, k, v)
    off = np.abs(np.asarray(scores).sum(-1) / (100 * 3) - 1).max()
    assert off < 1e-5
    figure(f"off by {off:.0e} of the number of rows")


@on_mosaic
def test_a_named_implementation_says_why_it_cannot_run():
    q, k, v = draw(1, 8, 8, 2, 1, 64, jnp.bfloat16)
    if jax.default_backend() == "cpu":
        with pytest.raises(NotImplementedError, match="Hopper"):
            two_pass_attention(q, k, v, implementation="mosaic_gpu")
    with on_device("NVIDIA H100"):
        refusals = [
            (dict(sliding_window=4), (q, k, v), "sliding window"),
            (dict(scale=-1.0), (q, k, v), "scale"),
            ({}, [x.astype(jnp.float32) for x in (q, k, v)], "bfloat16"),
            ({}, [x[..., :32] for x in (q, k, v)], "head sizes"),
        ]
        for options, arrays, reason in refusals:
            with pytest.raises(NotImplementedError, match=reason):
                jax.eval_shape(partial(two_pass_attention, implementation="mosaic_gpu", **options), *arrays)
    with pytest.raises(ValueError, match="unknown implementation"):
        two_pass_attention(q, k, v, implementation="fastest")


def on_device(kind):
    device = jax.sharding.AbstractDevice(kind, 132, "cuda")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


def lowered(kind, dtype, t, s, heads, kv_heads, h, **options):
    shape = jax.ShapeDtypeStruct
    arrays = shape((2, t, heads, h), dtype), shape((2, s, kv_heads, h), dtype), shape((2, s, kv_heads, h), dtype)
    lengths = shape((2,), jnp.int32)

    def call(q, k, v, rows, columns, offset):
        return two_pass_attention(
            q, k, v, query_lengths=rows, key_value_lengths=columns, query_offset=offset, **options
        )  # fmt: skip

    with on_device(kind):
        return jax.jit(call).trace(*arrays, lengths, lengths, lengths).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    "dtype,t,s,heads,kv_heads,h,options",
    [
        (jnp.bfloat16, 512, 512, 8, 2, 128, {}),
        pytest.param(jnp.float16, 333, 517, 4, 4, 64, {}, marks=pytest.mark.slow),
        (jnp.bfloat16, 100, 700, 4, 2, 96, dict(score_rows=64)),
        pytest.param(jnp.bfloat16, 256, 256, 2, 1, 256, dict(is_causal=False), marks=pytest.mark.slow),
    ],
)
@on_mosaic
def test_lowers_for_hopper_by_default(dtype, t, s, heads, kv_heads, h, options):
    assert lowered("NVIDIA H100 80GB HBM3", dtype, t, s, heads, kv_heads, h, **options).count("mosaic_gpu") >= 2


@pytest.mark.parametrize("kind", ["NVIDIA A100-SXM4-80GB", "NVIDIA B200", "Tesla T4"])
def test_other_gpus_get_no_hopper_kernel(kind):
    assert "mosaic_gpu" not in lowered(kind, jnp.bfloat16, 64, 64, 4, 2, 64)


@on_mosaic
def test_no_scores_is_one_kernel():
    text = lowered("NVIDIA H100", jnp.bfloat16, 256, 256, 4, 2, 128, score_rows=0)
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 1


@given(st.integers(1, 300), st.integers(1, 1 << 27), st.integers(1, 2048))
def test_heads_in_work_fill_the_gpu_before_they_crowd_its_cache(heads, streamed, blocks):
    cohort = mosaic_gpu._cohort(heads, streamed, blocks)
    assert heads % cohort == 0
    fills = cohort * blocks >= mosaic_gpu._EVEN or cohort == heads
    smaller = [n for n in range(1, cohort) if heads % n == 0]
    crowded = cohort * streamed > mosaic_gpu._STREAMED
    assert fills and not (crowded and any(n * blocks >= mosaic_gpu._EVEN for n in smaller))


INTERPRETED = """
import sys, numpy as np, jax, jax.numpy as jnp
sys.path.insert(0, "tests")
import jax.experimental.pallas.mosaic_gpu as plgpu
from pallas_kernels.two_pass_attention import mosaic_gpu as m
from test_two_pass_attention import compare, draw, ints, reference
case = {case!r}
q, k, v = draw(1, 136, 141, 2, case.get("kv_heads", 1), 64, jnp.bfloat16)
rows, columns, offset = 131, 133, 9
q = q.at[:, rows:].set(jnp.nan)
k, v = k.at[:, columns:].set(jnp.nan), v.at[:, columns:].set(jnp.nan)
m._EVEN, m._STREAMED = 1, 1  # one head after the other
blocks = m.ForwardBlocks(case.get("warpgroups", 2), 64, 64, 2), m.ScoreBlocks(2, 64, 64, 2, **case["blocks"])
got = m.two_pass_attention(
    q, k, v, ints(rows), ints(columns), ints(offset), scale=0.125, is_causal=case["causal"], sliding_window=None,
    score_rows=case["score_rows"], blocks=blocks, interpret=plgpu.InterpretGPUParams(detect_races=True),
)
want = reference(q, k, v, [rows], [columns], [offset], 0.125, case["causal"], None, case["score_rows"])
compare(got, want, 2e-2)
np.testing.assert_allclose(np.asarray(got[1]), want[1], atol=1e-4)
print("DONE")
"""


@pytest.mark.parametrize(
    "case",
    [
        dict(causal=True, score_rows="all", blocks={}),
        # Three tiles of rows, in pairs: the fourth is none.
        pytest.param(dict(causal=True, score_rows="all", blocks={}, kv_heads=2, warpgroups=1), marks=pytest.mark.slow),
        pytest.param(dict(causal=True, score_rows=20, blocks=dict(whole_group=True)), marks=pytest.mark.slow),
        pytest.param(dict(causal=False, score_rows="all", blocks={}), marks=pytest.mark.slow),
    ],
)
@on_mosaic
@pytest.mark.promise("The Hopper kernels have no data races")
def test_kernels_in_the_interpreter_have_no_races(case):
    # The interpreter runs every warpgroup on a thread of JAX's CPU pool: with fewer threads than warpgroups it hangs.
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED.format(case=case)],
        env={**os.environ, "NPROC": "16", "JAX_PLATFORMS": "cpu", "PYTHONPATH": "."},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0 and "DONE" in done.stdout, done.stderr[-3000:]
    assert "RACE" not in done.stdout + done.stderr, (done.stdout + done.stderr)[:3000]


def against_float32(implementation, q, k, v, **options):
    with jax.default_matmul_precision("highest"):
        wide = (x.astype(jnp.float32) for x in (q, k, v))
        want = two_pass_attention(*wide, implementation="xla", **options)
    got = two_pass_attention(q, k, v, implementation=implementation, **options)
    again = two_pass_attention(q, k, v, implementation=implementation, **options)
    for a, b in zip(got, again):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))  # the same bits on every run
    output, scores, lse = (np.asarray(x, np.float32) for x in want)
    scale = max(np.abs(output).max(), 1e-6)
    np.testing.assert_allclose(np.asarray(got[0], np.float32) / scale, output / scale, atol=2e-2)
    np.testing.assert_allclose(np.asarray(got[1]), scores, rtol=2e-3, atol=2e-3 * scores.max() if scores.size else 0)
    np.testing.assert_allclose(np.asarray(got[2]), lse, rtol=1e-5, atol=1e-4)
    return got


on_kernels = pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton"])


@pytest.mark.gpu
@on_kernels
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    "t,s,heads,kv_heads,h,options",
    [
        (1000, 1000, 8, 2, 128, {}),
        (777, 1023, 4, 4, 64, dict(score_rows=64)),
        (513, 600, 4, 2, 96, dict(is_causal=False)),
        (300, 300, 4, 1, 256, {}),
        (1, 9, 2, 1, 128, {}),
    ],
)
def test_gpu_kernels(t, s, heads, kv_heads, h, options, dtype, implementation):
    q, k, v = draw(2, t, s, heads, kv_heads, h, dtype)
    against_float32(implementation, q, k, v, **options)
    short = max(t * 2 // 3, 1), max(s * 3 // 4, 1)
    q, k, v = q.at[1, short[0] :].set(jnp.nan), k.at[1, short[1] :].set(jnp.nan), v.at[1, short[1] :].set(jnp.inf)
    lengths = dict(query_lengths=ints(t, short[0]), key_value_lengths=ints(s, short[1]), query_offset=ints(5, 0))
    output, scores, _ = against_float32(implementation, q, k, v, **lengths, **options)
    assert (np.asarray(output, np.float32)[1, short[0] :] == 0).all() and (
        np.asarray(scores)[1, :, short[1] :] == 0
    ).all()


@pytest.mark.gpu
@pytest.mark.parametrize("tail", [1, 2, 63, 64, 65])
def test_gpu_kernels_write_no_further_than_the_end(tail):
    """What a tile holds beyond the last row or key lies where the next head begins."""
    q, k, v = draw(2, 128 + tail, 128 + tail, 8, 4, 128, jnp.bfloat16)
    against_float32("mosaic_gpu", q, k[:, :tail], v[:, :tail], is_causal=False)
    against_float32("mosaic_gpu", q[:, :tail], k, v, query_offset=ints(128, 0))


@pytest.mark.gpu
@pytest.mark.parametrize("window", [1, 100, 300])
@pytest.mark.parametrize("h", [64, 128])
def test_gpu_kernels_with_a_sliding_window(h, window):
    q, k, v = draw(2, 700, 900, 4, 2, h, jnp.bfloat16)
    lengths = dict(query_lengths=ints(700, 411), key_value_lengths=ints(900, 700), query_offset=ints(200, 0))
    for score_rows in ("all", 64):
        against_float32("triton", q, k, v, sliding_window=window, score_rows=score_rows, **lengths)


@pytest.mark.gpu
@on_kernels
@pytest.mark.parametrize("change", ADVERSARIAL)
def test_gpu_kernels_on_adversarial_values(change, implementation):
    q, k, v = change(*draw(1, 640, 640, 4, 2, 128, jnp.bfloat16))
    _, scores, _ = against_float32(implementation, q, k, v)
    np.testing.assert_allclose(np.asarray(scores).sum(-1), 640 * 2, rtol=1e-3)


@pytest.mark.gpu
@on_kernels
@pytest.mark.parametrize(("batch", "length"), [(1, 8192), (1, 32768), (8, 16384)])
def test_memory_beyond_the_output_is_lse_and_scores(batch, length, implementation):
    shapes = [jax.ShapeDtypeStruct((batch, length, n, 128), jnp.bfloat16) for n in (32, 8, 8)]
    lengths = dict.fromkeys(("query_lengths", "key_value_lengths"), ints(*range(length, length - batch, -1)))
    call = jax.jit(partial(two_pass_attention, implementation=implementation, **(lengths if batch > 1 else {})))
    memory = call.lower(*shapes).compile().memory_analysis()
    beyond = memory.temp_size_in_bytes + memory.output_size_in_bytes - 2 * batch * length * 32 * 128
    last_values = 2 * batch * 128 * 8 * 128 if batch > 1 else 0  # the block in which each sequence ends
    assert beyond <= 4 * batch * length * (32 + 8) + last_values + 4096


@pytest.mark.gpu
@on_kernels
def test_a_prompt_of_131072_tokens(implementation):
    draw_on_device = jax.jit(partial(jax.random.normal, dtype=jnp.bfloat16), static_argnums=1)
    q, k, v = (draw_on_device(jax.random.key(i), (1, 131072, n, 128)) for i, n in enumerate((32, 8, 8)))
    output, scores, lse = two_pass_attention(q, k, v, implementation=implementation)
    np.testing.assert_allclose(np.asarray(scores).sum(-1), 131072 * 4, rtol=1e-3)
    assert jnp.isfinite(output).all() and jnp.isfinite(lse).all()


@on_mosaic
def test_shipped_blocks_fit_a_hopper():
    for h in mosaic_gpu._BLOCKS:
        text = lowered("NVIDIA H200", jnp.bfloat16, 128, 128, 2, 1, h)
        # A vector copied as plain bytes has no bounds within a row of the array; the interpreter gives it some.
        assert "cp.async.bulk.global.shared" not in text
