"""Generation writes what step after step would, and ends with the end token or where the cache is full."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import METHODS, MODEL, TWO_LAYERS, every, tokens

from minikv_jax import ConfigError, generate, presets, stream


@pytest.mark.parametrize("method", every("minikv", "mikv"))
def test_generate_is_decode_step_after_decode_step(method):
    text, lengths, config = tokens(2, 24), jnp.array([24, 9]), METHODS[method].replace(generated_capacity=40)
    written, cache = generate(TWO_LAYERS, text, lengths, config, 30)
    *streamed, (last, after) = stream(TWO_LAYERS, text, lengths, config, 30)
    np.testing.assert_array_equal(written, np.stack([token for token, _ in streamed] + [last], 1))
    assert cache.lengths.tolist() == [24 + 29, 9 + 29]

    def counters(cache):
        return [[x for x in jax.tree.leaves(layer) if x.ndim == 1] for layer in cache.layers]

    chex.assert_trees_all_equal(counters(cache), counters(after))
    if method not in ("pyramidkv", "minikv_pyramid"):  # the loop counts once for all layers
        chex.assert_trees_all_equal(*counters(after))


@pytest.mark.parametrize("count", [12, 30])
def test_generation_ends_with_the_end_token(count):
    text, lengths, config = tokens(2, 24), jnp.array([24, 9]), METHODS["minikv"]
    free, _ = generate(MODEL, text, lengths, config, count)
    ends = [int(free[0, 4]), int(free[1, 6])]
    first = [next(i for i, token in enumerate(row.tolist()) if token in ends) for row in free]
    ended, cache = generate(MODEL, text, lengths, config, count, eos_token_ids=ends)
    for b in range(2):
        assert ended[b].tolist() == free[b, : first[b]].tolist() + [int(free[b, first[b]])] * (count - first[b])
    # Nothing is read of a sequence after the step in which it ends, wherever that lies in a run of steps.
    assert cache.lengths.tolist() == [24 + first[0], 9 + first[1]]
    assert cache.room.tolist() == [config.generated_capacity - i for i in first]


def test_more_tokens_than_room_are_refused():
    with pytest.raises(ConfigError, match="generated_capacity"):
        generate(TWO_LAYERS, tokens(1, 4), jnp.array([4]), presets.full().replace(generated_capacity=8), 10)
