"""Triton's two-pass attention without a GPU: interpreted, compiled for several chips, and chosen for the right ones."""

import itertools
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from test_two_pass_attention import lowered

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pallas_kernels import mosaic
from pallas_kernels.two_pass_attention import _triton_kernels as kernels
from pallas_kernels.two_pass_attention import triton as implementation
from pallas_kernels.two_pass_attention.triton import constants, tiles_for

INTERPRETED = """
import sys
sys.path.insert(0, "tests")
import triton_interpreter
import jax, numpy as np, jax.numpy as jnp
from pallas_kernels.two_pass_attention import common, triton
from test_two_pass_attention import compare, denormal, dominant, draw, equal, huge, ints, reference

triton._compute_capability = lambda: 80
tiles = triton.Tile(32, 32, 4, 2), triton.Tile(32, 16, 4, 2)


def check(t, s, h=64, change=None, rows=(None, None), columns=(None, None), offset=(0, 0), causal=True, window=None,
          score_rows="all", enough=1024):
    common._ENOUGH_KEYS = enough
    q, k, v = draw(2, t, s, 4, 2, h, jnp.float16)
    if change is not None:
        q, k, v = globals()[change](q, k, v)
    rows, columns = ([n if x is None else x for x in given] for n, given in ((t, rows), (s, columns)))
    for i in range(2):
        q = q.at[i, rows[i]:].set(jnp.nan)
        k, v = k.at[i, columns[i]:].set(jnp.nan), v.at[i, columns[i]:].set(jnp.inf)
    options = dict(scale=h**-0.5, is_causal=causal, sliding_window=window, score_rows=score_rows, tiles=tiles)
    got = triton.two_pass_attention(q, k, v, ints(*rows), ints(*columns), ints(*offset), **options)
    want = reference(q, k, v, rows, columns, offset, h**-0.5, causal, window, score_rows)
    print(t, s, h, change, flush=True)
    compare(got[:1], want[:1], 3e-3)  # rounded to float16
    compare(got[1:], want[1:], 2e-3 if change == "huge" else 2e-4)


with jax.disable_jit():
    for case in {cases}:
        check(**case)
print("DONE")
"""


CASES = [
    dict(t=70, s=70),
    dict(t=37, s=70, rows=(37, 20), columns=(60, 33), offset=(23, 5), enough=1),
    dict(t=40, s=40, window=21, offset=(0, 3), score_rows=20),
    dict(t=20, s=45, columns=(45, 30), causal=False),
]
MORE_CASES = [
    dict(t=50, s=50, enough=1),
    dict(t=50, s=61, rows=(50, 9), columns=(61, 40), score_rows=12),
    dict(t=33, s=33, h=96),
    dict(t=70, s=70, h=128, rows=(70, 51), window=21, enough=1),
    dict(t=40, s=90, columns=(85, 60), offset=(50, 0), window=7),
    dict(t=5, s=40, offset=(30, 1), score_rows=0),
    dict(t=40, s=9, rows=(40, 0), columns=(0, 9)),
    *(dict(t=40, s=40, change=change) for change in ("dominant", "equal", "huge", "denormal")),
]


@pytest.mark.parametrize("cases", [CASES, pytest.param(MORE_CASES, marks=pytest.mark.slow)], ids=["", "more"])
@pytest.mark.promise("Triton's prefill kernels compute the definition, whatever lies in padding")
def test_the_interpreted_kernels_are_the_definition(cases):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERPRETED.replace("{cases}", repr(cases))],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": "."},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0 and "DONE" in done.stdout, done.stdout + done.stderr[-3000:]


def compiled(kernel, h, capability, dtype="bf16", is_causal=True, sliding_window=None):
    tile = tiles_for(h, capability)[kernel is kernels.scores_kernel]
    constant = constants(h, tile, is_causal, sliding_window)
    pointers = dict(
        query=dtype, key=dtype, value=dtype, extent="i32", lse="fp32",
        out="fp32" if kernel is kernels.scores_kernel else dtype,
    )  # fmt: skip
    types = {name: f"*{pointers[name]}" if name in pointers else "i32" for name in kernel.arg_names}
    types |= {"factor": "fp32"} | dict.fromkeys(constant, "constexpr")
    attributes = {(i,): [["tt.divisibility", 16]] for i, x in enumerate(types.values()) if x.startswith("*")}
    source = ASTSource(kernel, types, constexprs=constant, attrs=attributes)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


SHARED_MEMORY = {80: 163, 86: 99, 90: 227, 100: 227}
PRODUCT = {80: "mma.sync", 86: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
QUICK = [(64, 80, None), (128, 90, None)]
EVERY = [x for x in itertools.product((64, 96, 128, 256), PRODUCT, (None, 512)) if x not in QUICK]


@pytest.mark.usefixtures("triton_cache")
@pytest.mark.parametrize("kernel", [kernels.forward_kernel, kernels.scores_kernel], ids=["forward", "scores"])
@pytest.mark.parametrize(
    ("h", "capability", "window"), QUICK + [pytest.param(*x, marks=pytest.mark.slow) for x in EVERY]
)
def test_compiles_and_fits(kernel, h, capability, window):
    program = compiled(kernel, h, capability, sliding_window=window)
    assert PRODUCT[capability] in program.asm["ptx"]
    assert "cp.async.cg.shared.global" in program.asm["ptx"], "copies of 16 bytes ahead of their use"
    assert program.metadata.shared <= SHARED_MEMORY[capability] * 1024


@pytest.fixture
def launched(monkeypatch):
    """The kernels that a stand-in for jax-triton, which needs a GPU to be imported, was asked to launch."""
    names = []

    def triton_call(*_, kernel, out_type, **__):
        names.append(kernel.fn.__name__)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out_type)

    monkeypatch.setitem(sys.modules, "jax_triton", types.SimpleNamespace(triton_call=triton_call))
    implementation._two_passes.clear_cache()
    return names


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("Tesla T4", "xla"),
        ("NVIDIA A100-SXM4-80GB", "triton"),
        ("NVIDIA L4", "triton"),
        ("NVIDIA B200", "triton"),
        ("NVIDIA H100 80GB HBM3", "mosaic_gpu" if mosaic.jax_is_new_enough() else "triton"),
    ],
)
def test_every_gpu_gets_the_best_it_can_run(kind, expected, launched):
    text = lowered(kind, jnp.bfloat16, 64, 64, 4, 2, 64)
    assert ("@mosaic_gpu" in text) == (expected == "mosaic_gpu")
    assert launched == (["forward_kernel", "scores_kernel"] if expected == "triton" else [])


def test_an_older_jax_has_triton_on_hopper(launched, monkeypatch):
    monkeypatch.setattr(mosaic, "jax_is_new_enough", lambda: False)
    text = lowered("NVIDIA H100", jnp.bfloat16, 64, 64, 4, 2, 128)
    assert launched == ["forward_kernel", "scores_kernel"] and "@mosaic_gpu" not in text
    with pytest.raises(NotImplementedError, match=r"needs jax 0\.11\.1"):
        lowered("NVIDIA H100", jnp.bfloat16, 64, 64, 4, 2, 128, implementation="mosaic_gpu")


def test_a_sliding_window_on_hopper_is_tritons(launched):
    text = lowered("NVIDIA H100", jnp.bfloat16, 64, 64, 4, 2, 64, sliding_window=16, score_rows=0)
    assert launched == ["forward_kernel"] and "@mosaic_gpu" not in text


def test_it_says_why_it_cannot_run(launched):
    with pytest.raises(NotImplementedError, match=r"Ampere.*Tesla T4"):
        lowered("Tesla T4", jnp.bfloat16, 64, 64, 4, 2, 64, implementation="triton")
    with pytest.raises(NotImplementedError, match="head sizes"):
        lowered("NVIDIA A100", jnp.bfloat16, 64, 64, 4, 2, 80, implementation="triton")


def test_without_jax_triton_ampere_gets_xla(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    assert "while" in lowered("NVIDIA A100", jnp.bfloat16, 64, 64, 4, 2, 64)
    with pytest.raises(NotImplementedError, match="jax-triton"):
        lowered("NVIDIA A100", jnp.bfloat16, 64, 64, 4, 2, 64, implementation="triton")
