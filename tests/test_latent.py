"""LoRC and CSKV: latents against a plain reference, and the contracts of every method."""

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import CONFIG, MODEL, TWO_LAYERS, follow, tokens
from reference import latent as reference

from minikv_jax import (
    ConfigError,
    cache_report,
    decode_step,
    empty_cache,
    extend,
    fork,
    insert,
    layer,
    prefill,
    prefill_in_chunks,
    presets,
    reset,
)
from minikv_jax.basis import Hadamard
from minikv_jax.block import Block
from minikv_jax.codec import Codec
from minikv_jax.latent import rank_of
from minikv_jax.models import latent
from minikv_jax.models.llama import Llama
from minikv_jax.models.made import made
from minikv_jax.models.shapes import shape_of
from minikv_jax.report import planned_report
from minikv_jax.ring import Ring

BIASED = Llama(CONFIG.replace(query_key_value_bias=True), rngs=nnx.Rngs(params=1))
BIASED.layers[0].query_key_value_bias[...] = jnp.asarray(np.random.default_rng(0).normal(size=8 * 16), jnp.float32)
SIZE, WIDTH = CONFIG.head_dim, CONFIG.num_kv_heads * CONFIG.head_dim
METHODS = {
    "lorc": presets.lorc(0.5, 0.5),
    "lorc, 4 bits": presets.lorc(0.5, 0.5, bits=4, group_size=8),
    "cskv": presets.cskv(0.5, 0.5, window=8),
    "cskv, 2 bits": presets.cskv(0.5, 1.0, window=8, bits=2, group_size=8),
}
METHODS = {name: config.replace(prompt_capacity=64, generated_capacity=40) for name, config in METHODS.items()}
PARAMS = {name: made(BIASED, config.weights) for name, config in METHODS.items()}
step = jax.jit(decode_step)
read = jax.jit(prefill)


def quick(*names: str) -> list:
    """All methods, of which those that are not named belong to the slow tests."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]


def prompt(rows: int = 1):
    return tokens(rows, 64), jnp.asarray(draws.rng().integers(20, 64, rows), jnp.int32)


def steps(params, cache, later):
    found = []
    for i in range(later.shape[1]):
        logits, cache = step(params, cache, later[:, i])
        found.append(logits)
    return np.stack(found, 1), cache


# ---- against the reference -----------------------------------------------------------------------------------------


def plain(config) -> reference.Weights:
    """The weights of the one layer, and products own by the reference's own decomposition."""
    one = BIASED.layers[0]
    all_weights, bias = (np.asarray(x[...], np.float64) for x in (one.query_key_value, one.query_key_value_bias))
    columns = np.split(np.arange(all_weights.shape[1]), (CONFIG.num_heads * SIZE, CONFIG.num_heads * SIZE + WIDTH))
    query, key, value = (all_weights[:, x] for x in columns)
    own = PARAMS[next(name for name, x in METHODS.items() if x == config)].layers[0]
    products = []
    for whole, first, count, up in (
        (key, 0, own.latent.keys, own.key_up),
        (value, own.latent.keys, own.latent.values, own.value_up),
    ):
        down = np.asarray(own.down[...], np.float64)[:, first : first + count]
        product = down, np.asarray(up[...], np.float64).reshape(count, WIDTH)
        np.testing.assert_allclose(product[0] @ product[1], reference.nearest(whole, count), atol=1e-5)
        products.append(product)
    return reference.Weights(query, key, value, tuple(bias[x] for x in columns), *products)


@pytest.mark.parametrize("name", quick("lorc, 4 bits", "cskv"))
def test_each_step_attends_to_rebuilt_keys_and_values(name):
    config, params = METHODS[name], PARAMS[name]
    codec = config.method.codec
    window = getattr(config.method.inflow, "window", 0)
    text, length = tokens(1, 34), 25
    weights, one = plain(config), BIASED.layers[0]
    _, cache = read(params, text[:, :length], jnp.array([length]), config)
    found, _ = steps(params, cache, text[:, length:])
    x = BIASED.embed(text)
    normed = np.asarray(one.normed(x)[0], np.float64)
    bits, group = (16, 16) if codec.dense else (codec.value_bits, codec.value_group)
    for i in range(length, text.shape[1]):
        seen = reference.attention(normed[: i + 1], weights, SIZE, CONFIG.rope_theta, window, bits, group)
        hidden = one.after_attention(x[:, i : i + 1], jnp.asarray(seen, jnp.float32)[None, None])
        # A code on the edge between two may round either way: few of them do.
        atol = 1e-4 if codec.dense else 2e-2
        np.testing.assert_allclose(found[:, i - length], BIASED.logits(hidden)[:, 0], atol=atol)


@pytest.mark.slow
def test_whole_rank_is_the_full_cache():
    text, lengths = tokens(2, 40), jnp.array([30, 17])
    full, _ = follow(presets.full(), text[:, :30], lengths, text[:, 30:])
    for config in (presets.lorc(1.0, 1.0), presets.cskv(1.0, 1.0, window=4)):
        found, _ = follow(config, text[:, :30], lengths, text[:, 30:], made(TWO_LAYERS, config.weights))
        np.testing.assert_allclose(found, full, atol=1e-4)


def test_ranks_follow_cumulative_condition_numbers():
    conditions = draws.rng().uniform(1.5, 40, 6)
    found = latent.progressive_ranks(list(conditions), 32, 128)
    expected = reference.ranks(list(conditions), 32, 128)
    assert found == [16 * round(x / 16) for x in expected] and found[0] == 128 and found[-1] == 32
    assert latent.progressive_ranks([3.0], 32, 128) == [128]
    # By hand: logarithms of the products are in the ratio 4 : 2 : 1.
    assert latent.progressive_ranks([4.0, 2.0, 2.0], 16, 112) == [112, 48, 16]


@pytest.mark.slow
def test_ranks_of_layers_may_differ():
    config = presets.lorc(0.5, 1.0)
    params = latent.lorc(TWO_LAYERS, 0.5, 1.0)
    _, cache = prefill(params, tokens(1, 20), jnp.array([20]), config)
    assert [x.first.key.shape[3] for x in cache.layers] == [32, 16]
    logits, _ = step(params, cache, tokens(1))
    assert np.isfinite(np.asarray(logits)).all()


def test_loud_channels_are_decomposed_with_care():
    rng = draws.rng()
    weights, loudness = rng.normal(size=(12, 8)), rng.uniform(0.1, 10, 12)
    down, up = latent.product(weights, 3, loudness)
    np.testing.assert_allclose(down @ up, reference.nearest(weights, 3, loudness), atol=1e-10)
    np.testing.assert_allclose(up @ up.T, np.eye(3), atol=1e-10)


# ---- contracts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", quick())
def test_latents_hold_what_every_cache_promises(name):
    config, params = METHODS[name], PARAMS[name]
    text, lengths = prompt(2)
    later = tokens(2, 12)
    logits, cache = read(params, text, lengths, config)
    np.testing.assert_allclose(prefill(params, text, lengths, config)[0], logits, atol=1e-5)
    together, after = steps(params, cache, later)
    for b in range(2):  # ragged
        alone = read(params, text[b : b + 1], lengths[b : b + 1], config)
        np.testing.assert_allclose(alone[0][0], logits[b], atol=1e-4)
        np.testing.assert_allclose(steps(params, alone[1], later[b : b + 1])[0][0], together[b], atol=0.02)
    assert after.lengths.tolist() == [int(x) + 12 for x in lengths]
    # A traced token that the model does not have stores nothing.
    broken, same = step(params, cache, jnp.array([-1, 5]))
    assert np.isnan(broken[0]).all() and not np.isnan(broken[1]).any() and same.lengths[0] == lengths[0]
    for x, y in zip(jax.tree.leaves(cache.layers), jax.tree.leaves(same.layers)):
        np.testing.assert_array_equal(x[0], y[0])
    # In place: no array is made anew, and nothing is compiled again.
    in_place = jax.jit(decode_step, donate_argnames="cache")
    given = jax.tree.map(jnp.copy, cache)
    first, given = in_place(params, given, later[:, 0])
    programs = in_place._cache_size()
    second, given = in_place(params, given, later[:, 1])
    np.testing.assert_allclose(np.stack((first, second), 1), together[:, :2], atol=1e-5)
    assert in_place._cache_size() == programs


@pytest.mark.parametrize("name", quick())
def test_latents_are_extended_served_and_forked(name):
    config, params = METHODS[name], PARAMS[name]
    text, lengths = prompt()
    later = tokens(1, 12)
    logits, cache = read(params, text, lengths, config)
    alone, after = steps(params, cache, later)
    # Tokens of one reading attend to each other as they are, and to what is encoded after it.
    extended, read_on = extend(params, cache, later, jnp.array([12]))
    assert read_on.lengths.tolist() == after.lengths.tolist()
    if name == "lorc":
        np.testing.assert_allclose(extended, alone[:, -1], atol=1e-4)
    chunked, in_chunks = prefill_in_chunks(params, text, lengths, config, chunk=24)
    np.testing.assert_allclose(chunked, logits, atol=1e-4)
    np.testing.assert_allclose(steps(params, in_chunks, later)[0], alone, atol=0.02)
    slots = insert(reset(insert(empty_cache(params, config, 2), 0, cache), 0), 1, cache)
    served, _ = steps(params, slots, jnp.repeat(later, 2, axis=0))
    assert np.isnan(served[0]).all()
    np.testing.assert_allclose(served[1], alone[0], atol=1e-4)
    forked = fork(cache, 2)
    branches, _ = steps(params, forked, jnp.concatenate((later, later[:, ::-1])))
    np.testing.assert_allclose(branches[0], alone[0], atol=0.02)
    assert all(x.prefix[0].length is y.first.length for x, y in zip(forked.layers, cache.layers))


@pytest.mark.slow
@pytest.mark.parametrize("inflow", [Ring(16), Block(16)])
def test_latents_go_through_windows_of_groups(inflow):
    """Positions of rows that wait for their group follow those of the encoded ones."""
    codec = Codec(8, 8, 8, 8)
    config = METHODS["lorc"].replace(inflow=inflow, codec=codec)
    text, lengths = tokens(2, 64), jnp.array([52, 37])
    dense = read(PARAMS["lorc"], text, lengths, METHODS["lorc"])[1]
    _, cache = read(PARAMS["lorc"], text, lengths, config)
    later = tokens(2, 20)
    np.testing.assert_allclose(steps(PARAMS["lorc"], cache, later)[0], steps(PARAMS["lorc"], dense, later)[0], atol=0.1)


def test_bytes_are_those_of_the_latents():
    text, lengths = tokens(1, 64), jnp.array([64])
    for name, numbers in (("lorc", 2 * 16), ("cskv", 2 * 16)):
        config = METHODS[name].replace(dtype="bfloat16", generated_capacity=1)
        report = cache_report(prefill(PARAMS[name], text, lengths, config)[1]).total
        rows = 65 if name == "lorc" else 65 - 8
        assert report.bytes_tiers == rows * numbers * 2
        assert report.bytes_window == (0 if name == "lorc" else 8 * (numbers + 2 * WIDTH) * 2 + 4)
        assert report.bytes_bfloat16 == 64 * 2 * WIDTH * 2
    size = planned_report(shape_of("llama3-8b"), presets.cskv(0.25, 0.75, window=32), 4064, 32).total
    assert size.bytes_tiers == 32 * 4064 * 1024 * 2
    # Ranks that follow from weights are assumed to be the mean.
    mean, flat = (planned_report(shape_of("llama3-8b"), x, 4096, 32).total for x in
                  (presets.lorc(0.25, 0.75), presets.lorc(0.5, 0.5)))  # fmt: skip
    assert mean == flat


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: prefill(MODEL, tokens(1, 8), [8], presets.lorc()), "lorc needs weights made into"),
        (lambda: prefill(MODEL, tokens(1, 8), [8], presets.cskv()), "made.made"),
        (lambda: prefill(PARAMS["lorc"], tokens(1, 8), [8], presets.kivi()), "kivi reads the model as it was loaded"),
        (lambda: prefill(PARAMS["lorc"], tokens(1, 8), [8], presets.lorc(0.5, 0.75)), "most=0.75"),
        (lambda: latent.lorc(PARAMS["lorc"], 0.5, 0.5), "as `load` gives it"),
        (lambda: latent.lorc(MODEL, 0.75, 0.5), "exchange them"),
        (lambda: latent.cskv(MODEL, 0.0, 0.5), "keys=0.0"),
        (lambda: presets.cskv(window=0), "window=0"),
        (lambda: presets.cskv(bits=5), "key_bits=5"),
        (lambda: _read_with(allocation=presets.h2o().method.allocation), "every token must stay"),
        (lambda: _read_with(codec=Codec(4, 4, 8, 8, "channels", balance=True)), "Queries do not meet latents"),
        (lambda: _read_with(codec=Codec(4, 4, 8, 8, "channels"), basis=(Hadamard(),)), "Queries do not meet latents"),
        (lambda: _read_with(codec=Codec(4, 4, 24, 24, "channels")), r"\[24, 24\]"),
        (lambda: _through_a_layer(presets.lorc()), "lorc caches latents"),
    ],
)
def test_what_latents_cannot_do_is_refused_by_name(make, named):
    with pytest.raises(ConfigError, match=named):
        make()


def _read_with(**changes):
    return prefill(PARAMS["lorc"], tokens(1, 8), [8], METHODS["lorc"].replace(**changes))


def _through_a_layer(config):
    x = jnp.zeros((1, 8, 2, 16))
    return layer.prefill(x, x, x, jnp.array([8]), config)


def test_a_cache_of_latents_needs_the_params_that_filled_it():
    _, cache = read(PARAMS["lorc"], *prompt(), METHODS["lorc"])
    with pytest.raises(ConfigError, match="give the params that filled the cache"):
        decode_step(BIASED, cache, tokens(1))
    _, cache = read(BIASED, *prompt(), presets.full())
    with pytest.raises(ConfigError, match="holds keys and values"):
        decode_step(PARAMS["lorc"], cache, tokens(1))


def test_shares_are_whole_multiples_of_16():
    assert [rank_of(x, 1024) for x in (0.001, 0.1, 0.5, 1.0)] == [16, 96, 512, 1024]
    assert rank_of(1.0, 24) == 24
