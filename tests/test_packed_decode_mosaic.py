"""Packed decode on Hopper's wgmma: interpreted against float64, lowered for a Hopper, and on a GPU."""

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
from test_packed_decode import attention, check_nothing_beyond_the_length, compare, dequantised, error, segment
from test_two_pass_attention import on_device

from pallas_kernels.packed_decode.api import packed_decode_attention

FORMATS = {
    "32 tokens, 64 channels": (2, 32, "float16", 2, 64, "float16"),
    "32 tokens, whole heads, bfloat16": (2, 32, "bfloat16", 2, 128, "bfloat16"),
    "64 tokens, whole heads": (2, 64, "float16", 2, 128, "float16"),
    "128 tokens, 64 channels": (2, 128, "float16", 2, 64, "bfloat16"),
}
QUICK = "32 tokens, 64 channels"

INTERPRETED = """
import sys
sys.path.insert(0, "tests")
import draws, jax, jax.numpy as jnp, numpy as np
import jax.experimental.pallas.mosaic_gpu as plgpu
from pallas_kernels.packed_decode import mosaic_gpu as m
from test_packed_decode import attention, dequantised, error, poison, segment
from test_packed_decode_mosaic import FORMATS

def check(name, lengths, heads=1, rows=2, splits=1, stages=1, scales=None, query_size=1.0):
    rng = draws.rng()
    b = len(lengths)
    keys, values = segment(rng, b, heads, 5, 128, FORMATS[name], scales=scales)
    query = jnp.asarray(rng.normal(size=(b, 1, heads * rows, 128)) * query_size, jnp.bfloat16)
    per_head = np.repeat(np.asarray(lengths)[:, None], heads, axis=1)
    want = attention(query, dequantised(keys), dequantised(values), per_head, 128**-0.5)
    keys, values = (poison(x, max(lengths)) for x in (keys, values))
    got = m.packed_decode_attention(
        query, keys, values, jnp.asarray(lengths, jnp.int32), scale=128**-0.5, return_logits=False,
        splits=splits, blocks=m.Blocks(stages=stages), interpret=plgpu.InterpretGPUParams(detect_races=True),
    )
    assert error(got, want) < 1e-3, error(got, want)

for case in {cases}:
    check(**case)
print("DONE")
"""
CASES = [dict(name=QUICK, lengths=[557], heads=2)]
MORE_CASES = [
    *(dict(name=name, lengths=[513, 0, 100], splits=2) for name in FORMATS),
    dict(name=QUICK, lengths=[640], rows=6, stages=2),
    dict(name=QUICK, lengths=[1], splits=2),
    *(dict(name=QUICK, lengths=[130], scales=[x], query_size=1e-3) for x in (0.0, 1e-6, 1e4)),
]


@on_mosaic
@pytest.mark.parametrize("cases", [CASES, pytest.param(MORE_CASES, marks=pytest.mark.slow)], ids=["", "more"])
@pytest.mark.promise("The Hopper kernels have no data races")
def test_interpreted_it_is_the_definition_and_has_no_races(cases):
    # With fewer threads of JAX's CPU pool than the kernel has the interpreter hangs.
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERPRETED.replace("{cases}", repr(cases))],
        env={**os.environ, "NPROC": "16", "JAX_PLATFORMS": "cpu", "PYTHONPATH": "."},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0 and "DONE" in done.stdout, done.stdout + done.stderr[-3000:]
    assert "RACE" not in done.stdout + done.stderr, (done.stdout + done.stderr)[:3000]


def arguments(fmt, rows=4, blocks=9, h=128):
    keys, values = segment(draws.rng(), 2, 2, blocks, h, fmt)
    return jax.ShapeDtypeStruct((2, 1, 2 * rows, h), jnp.bfloat16), keys, values, jax.ShapeDtypeStruct((2,), jnp.int32)


@on_mosaic
@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_lowers_for_hopper(name):
    call = partial(packed_decode_attention, implementation="mosaic_gpu")
    with on_device("NVIDIA H100 80GB HBM3"):
        text = jax.jit(call).trace(*arguments(FORMATS[name])).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 1
    assert "tensor<2x2x9x32x128xui8>" in text and "x128x128xf" not in text, "codes stay codes"


@on_mosaic
@pytest.mark.parametrize(
    ("kind", "fmt", "options", "reason"),
    [
        ("NVIDIA A100", FORMATS[QUICK], {}, "Hopper"),
        ("NVIDIA H100", (4, 32, "float16", 2, 64, "float16"), {}, "4-bit keys"),
        ("NVIDIA H100", (2, 16, "float16", 2, 64, "float16"), {}, "groups of 16 tokens"),
        ("NVIDIA H100", (2, -1, "float16", 2, 64, "float16"), {}, "channels"),
        ("NVIDIA H100", (2, 32, "float16", 2, 32, "float16"), {}, "groups of 32 channels"),
        ("NVIDIA H100", (2, 32, "float8_e4m3fn", 2, 64, "float16"), {}, "float8"),
        ("NVIDIA H100", FORMATS[QUICK], {"return_logits": True}, "logits"),
        ("NVIDIA H100", FORMATS[QUICK], {"scale": -1.0}, "positive"),
    ],
)
def test_it_says_what_it_does_not_run(kind, fmt, options, reason):
    with on_device(kind), pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(partial(packed_decode_attention, implementation="mosaic_gpu", **options), *arguments(fmt))


@on_mosaic
def test_other_head_sizes_are_declined():
    with on_device("NVIDIA H100"), pytest.raises(NotImplementedError, match="head size 64"):
        jax.eval_shape(partial(packed_decode_attention, implementation="mosaic_gpu"), *arguments(FORMATS[QUICK], h=64))


gpu = pytest.mark.gpu


@gpu
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("blocks", "lengths"), [(3, [[384, 100], [0, 257]]), (9, [[1152, 1], [1024, 513]])])
def test_gpu_matches_float64(name, blocks, lengths):
    assert compare("mosaic_gpu", FORMATS[name], h=128, blocks=blocks, lengths=lengths) < 2e-3


@gpu
@pytest.mark.parametrize(("heads", "t"), [((1, 8), 1), ((8, 4), 2), ((4, 1), 4), ((3, 3), 1)])
def test_gpu_takes_every_grouping(heads, t):
    assert compare("mosaic_gpu", FORMATS[QUICK], heads=heads[0], group=heads[1], t=t, h=128, blocks=9) < 2e-3


@gpu
@pytest.mark.parametrize("blocks", [1, 40, 300])
def test_gpu_takes_every_capacity(blocks):
    assert compare("mosaic_gpu", FORMATS[QUICK], h=128, blocks=blocks) < 2e-3


@gpu
@pytest.mark.parametrize("name", FORMATS)
def test_gpu_reads_nothing_beyond_the_length(name):
    for length in (0, 1, 127, 128, 200, 384):  # one program, and it takes its time to compile
        check_nothing_beyond_the_length("mosaic_gpu", length, FORMATS[name], h=128)


@gpu
def test_gpu_takes_adversarial_scales():
    rng = draws.rng()
    for scales in ([0.0], [1e-6], [1e4], [0.0, 1e-6, 0.1, 1e4]):
        keys, values = segment(rng, 1, 2, 2, 128, FORMATS[QUICK], scales=scales)
        query = jnp.asarray(rng.normal(size=(1, 1, 4, 128)) * 1e-3, jnp.bfloat16)
        got = packed_decode_attention(query, keys, values, jnp.asarray([200]), implementation="mosaic_gpu")
        want = attention(query, dequantised(keys), dequantised(values), np.full((1, 2), 200), 128**-0.5)
        assert error(got, want) < 2e-3, scales


@gpu
@pytest.mark.parametrize("options", [{"in_flight": 1}, {"in_flight": 3}, {"stages": 2}])
def test_gpu_schedules_give_the_same_bits(options):
    from pallas_kernels.packed_decode import mosaic_gpu

    keys, values = segment(draws.rng(), 2, 2, 17, 128, FORMATS[QUICK])
    query = jax.random.normal(jax.random.key(0), (2, 1, 8, 128), jnp.bfloat16)
    lengths = jnp.asarray([[2176, 1900], [5, 0]])
    attend = partial(
        mosaic_gpu.packed_decode_attention, query, keys, values, lengths, scale=0.1, return_logits=False, splits=2
    )
    for a, b in zip(attend(), attend(blocks=mosaic_gpu.Blocks(**options))):
        np.testing.assert_array_equal(a, b)


@gpu
def test_gpu_program_has_no_copy_of_the_codes():
    query, keys, values, lengths = arguments(FORMATS[QUICK], blocks=512)
    call = jax.jit(partial(packed_decode_attention, implementation="mosaic_gpu"))
    memory = call.lower(query, keys, values, lengths).compile().memory_analysis()
    assert memory.temp_size_in_bytes < keys.codes.nbytes // 2 + 132 * 4 * 8 * 1024
