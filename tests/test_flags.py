"""What users set for all of JAX changes nothing: every preset works under each flag and transformation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import METHODS, MODEL, tokens

from minikv_jax import decode_step, empty_cache, extend, fork, insert, prefill

FLAGS = {
    "x64": functools.partial(jax.enable_x64, True),
    "debug_nans": functools.partial(jax.debug_nans, True),
    "rank_promotion": functools.partial(jax.numpy_rank_promotion, "raise"),
    "dtype_promotion": functools.partial(jax.numpy_dtype_promotion, "strict"),
    "leaks": jax.checking_leaks,
}
FEW = ("mikv", "two_tiers")
EVERY = [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]


def life(method: str, text, turn, later):
    """Logits of a prompt, 40 steps over a flush, a second turn, forks of it, and a step of a slot it is put into."""
    config = METHODS[method].replace(prompt_capacity=32, generated_capacity=64)
    step = jax.jit(decode_step)
    logits, cache = prefill(MODEL, text, np.array([30]), config)
    seen = [logits]
    for token in later:
        logits, cache = step(MODEL, cache, token)
        seen.append(logits)
    logits, cache = extend(MODEL, cache, turn, np.array([turn.shape[1]]))
    forked, _ = step(MODEL, fork(cache, 2), jnp.concatenate([later[0], later[1]]))
    slots = insert(insert(empty_cache(MODEL, config, 2), 0, cache), 1, cache)
    inserted, slots = step(MODEL, slots, jnp.concatenate([later[0], later[0]]))
    return np.stack([*seen, logits, forked[:1], inserted[1:]]), slots


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_of_jax_changes_nothing(flag, method):
    text, turn, later = tokens(1, 30), tokens(1, 9), tokens(40, 1)
    plain, _ = life(method, text, turn, later)
    with FLAGS[flag]():
        flagged, slots = life(method, text, turn, later)
    np.testing.assert_allclose(flagged, plain, atol=1e-4)
    assert flagged.dtype == np.float32
    assert not any(x.dtype.itemsize == 8 for x in jax.tree.leaves(slots))
