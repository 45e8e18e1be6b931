"""A cache reads on: second turns and prompts in chunks leave what reading at once would."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import CHANGING, MODEL, decode, nearly_equal, roomy, slow, tokens, with_codes

from minikv_jax import extend, prefill, prefill_in_chunks, presets


@pytest.mark.parametrize("method", CHANGING)
def test_a_second_turn_is_read_as_well_at_once_as_token_by_token(method):
    # Codes so fine that what is left is how the method goes about tokens.
    config = with_codes(roomy(method), key_bits=8, value_bits=8)
    text, turn, counts = tokens(2, 30), tokens(2, 9), jnp.array([9, 4])
    _, cache = prefill(MODEL, text, jnp.array([30, 17]), config)
    logits, extended = extend(MODEL, cache, turn, counts)
    assert extended.lengths.tolist() == [39, 21] and extended.room.tolist() == [31, 36]
    for b, count in enumerate([9, 4]):
        _, alone = prefill(MODEL, text[b : b + 1], jnp.array([[30, 17][b]]), config)
        rows, alone = decode(alone, turn[b : b + 1, :count])
        # A token read by itself may meet codes where one read in a chunk meets exact neighbours, and misses tokens
        # that were given up on the way.
        if config.method.inflow.grows:
            assert np.corrcoef(rows[0, -1], logits[b])[0, 1] > 0.999
        held = [jax.tree.map(lambda x, b=b: x[b], layer.first.length) for layer in extended.layers]
        assert held == [int(layer.first.length[0]) for layer in alone.layers]


def test_a_second_turn_on_a_full_cache_is_exact():
    text, turn = tokens(1, 150), tokens(1, 300)
    config = presets.full().replace(generated_capacity=400)
    _, cache = prefill(MODEL, text, jnp.array([150]), config)
    logits, _ = extend(MODEL, cache, turn, jnp.array([300]))
    whole = jnp.concatenate([text, turn], 1)
    np.testing.assert_allclose(logits, prefill(MODEL, whole, jnp.array([450]), config)[0], atol=2e-5)


@pytest.mark.parametrize("method", [*slow("minikv_plus", "two_tiers"), "snapkv", "mikv"])
def test_a_prompt_in_chunks_leaves_what_the_whole_prompt_leaves(method):
    text, lengths, later, config = tokens(3, 64), jnp.array([50, 21, 64]), tokens(3, 8), roomy(method)
    logits, cache = prefill(MODEL, text, lengths, config)
    chunked_logits, chunked = prefill_in_chunks(MODEL, text, lengths, config, chunk=16)
    np.testing.assert_allclose(logits, chunked_logits, atol=2e-5)
    assert jax.tree.map(jnp.shape, cache) == jax.tree.map(jnp.shape, chunked)
    assert nearly_equal(decode(cache, later)[0], decode(chunked, later)[0])
