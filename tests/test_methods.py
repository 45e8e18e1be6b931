"""Every method's jitted cache against its NumPy simulation: same tokens kept, same lengths, same outputs."""

import functools

import numpy as np
import pytest
import reference
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from layer import draw, run

from minikv_jax import presets
from minikv_jax.cache import PackedSegment

BATCH, TOKENS, STEPS, HEADS, HEAD_SIZE = 2, 80, 40, 2, 16

# (config, simulation of one sequence): small groups and windows, so that flushes happen within the stream.
CASES = {
    "full": (presets.full(), reference.Full),
    "minikv": (
        presets.minikv(group_size=8, residual=16),
        functools.partial(reference.MiniKV, group=8, residual=16),
    ),
    "minikv, 4 bits, more recent": (
        presets.minikv(0.1, 0.4, bits=4, group_size=16, residual=32),
        functools.partial(reference.MiniKV, heavy=0.1, recent=0.4, code_bits=4, group=16, residual=32),
    ),
    "minikv, 3 bits": (
        presets.minikv(bits=3, group_size=4, residual=24),
        functools.partial(reference.MiniKV, code_bits=3, group=4, residual=24),
    ),
    "minikv, dense": (presets.minikv(bits=16), functools.partial(reference.MiniKV, code_bits=16)),
    "minikv_pyramid": (
        presets.minikv(0.3, 0.2, group_size=8, residual=16, pyramid_depth=7),
        functools.partial(
            reference.MiniKV, heavy=0.3, recent=0.2, group=8, residual=16, allocation="pyramid", layer=2, layers=5
        ),
    ),
}


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=6)
@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.tuples(*[st.integers(1, TOKENS)] * BATCH),
    group=st.sampled_from([1, 3]),
)
def test_cache_agrees_with_its_simulation(case, seed, lengths, group):
    config, simulation = CASES[case]
    prompt, stream = draw(np.random.default_rng(seed), BATCH, TOKENS, STEPS, HEADS, group, HEAD_SIZE)
    layer = {"layer": 2, "layers": 5} if config.allocation.pyramid_depth else {}
    result = run(config, *prompt, np.array(lengths), stream, **layer)
    for b, length in enumerate(lengths):
        oracle = simulation()
        oracle.prefill(*(x[b, :length] for x in prompt))
        kept_after_prompt = oracle.held
        expected = np.stack([oracle.step(*(x[i, b] for x in stream)) for i in range(STEPS)])
        assume(oracle.closest_call > 1e-4)
        assert held(result.prompt, b) == kept_after_prompt
        assert held(result.after, b) == oracle.held
        if isinstance(result.after.segment, PackedSegment):
            assert int(result.after.segment.length[b]) == oracle.packed_key_length
        np.testing.assert_allclose(result.outputs[:, b], expected, atol=2e-3, rtol=2e-3)


def held(layer, b):
    return sum(int(part.length[b]) for part in (layer.segment, layer.window) if part is not None)
