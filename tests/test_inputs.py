"""What callers get wrong: concrete values are one error at the edge, traced ones concern their own sequence alone."""

import functools

import chex
import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations
from flax import nnx
from layer import draw, run
from models import CONFIG, METHODS, MODEL, kinds, tokens

from minikv_jax import (
    Allocation,
    CacheConfig,
    Codec,
    ConfigError,
    Method,
    MiniKVError,
    PromptError,
    Rank,
    Sampling,
    bucket,
    decode_step,
    empty_cache,
    extend,
    fork,
    forward,
    generate,
    insert,
    prefill,
    prefill_in_chunks,
    presets,
    reset,
    stream,
)
from minikv_jax import layer as layers
from minikv_jax.append import Append
from minikv_jax.block import Block
from minikv_jax.evict import Evict
from minikv_jax.models.llama import Llama
from minikv_jax.ring import Ring

V = CONFIG.vocab_size
X = np.array([[5, 6, 7, 8], [9, 10, 11, 12]], np.int32)
L = np.array([4, 4], np.int32)
FULL = METHODS["full"].replace(prompt_capacity=16, generated_capacity=8)


def roomy(method: str) -> CacheConfig:
    return METHODS[method].replace(prompt_capacity=16, generated_capacity=24)


def put(x, place, value):
    x = np.array(x)
    x[place] = value
    return x


@pytest.fixture(scope="module")
def cache():
    return prefill(MODEL, X, L, FULL)[1]


@pytest.fixture(scope="module")
def one():
    return prefill(MODEL, X[:1] + 20, L[:1], FULL)[1]


PROMPTS = {
    "no sequence": (np.zeros((0, 4), np.int32), np.zeros(0, np.int32), "batch is empty"),
    "no token": (np.zeros((2, 0), np.int32), L, "nothing to read"),
    "floats": (X.astype(np.float32), L, "float32"),
    "strings": ([["a"]], [1], "whole numbers"),
    "ragged lists": ([[1, 2], [3]], [2, 1], "no array"),
    "one axis": (X[0], L, "shape"),
    "an id too large": (put(X, (1, 2), V), L, f"Token {V} at 2 of sequence 1"),
    "a negative id": (put(X, (0, 0), -1), L, "Token -1 at 0 of sequence 0"),
    "an id that would wrap": (put(X.astype(np.int64), (0, 1), 2**32 + 3), L, "fit int32"),
    "length 0": (X, np.array([4, -1]), "lengths"),
    "a length too large": (X, np.array([4, 5]), "lengths"),
    "a length that would wrap": (X, np.array([2**32 + 3, 4]), "lengths"),
    "lengths with fractions": (X, np.array([2.9, 4.0]), "float64"),
    "lengths that are true or false": (X, np.array([True, True]), "bool"),
    "another number of lengths": (X, np.array([4]), "must be"),
}


@pytest.mark.promise("Token ids and lengths that are wrong are refused with one error before anything is computed")
@pytest.mark.parametrize("case", PROMPTS)
def test_a_prompt_that_is_wrong_is_refused(case, cache):
    text, lengths, match = PROMPTS[case]
    for read in (
        lambda: prefill(MODEL, text, lengths, FULL),
        lambda: prefill_in_chunks(MODEL, text, lengths, FULL),
        lambda: forward(MODEL, text, lengths),
        lambda: generate(MODEL, text, lengths, FULL, 2),
        lambda: stream(MODEL, text, lengths, FULL, 2),
        lambda: extend(MODEL, cache, text, lengths),
    ):
        with pytest.raises(PromptError, match=match):
            read()


def test_ids_and_lengths_of_any_width_and_lists_are_read():
    wanted, _ = prefill(MODEL, X, L, FULL)
    for text, lengths in [(X.tolist(), L.tolist()), (X.astype(np.uint8), L.astype(np.int64)), (jnp.asarray(X), L)]:
        np.testing.assert_array_equal(prefill(MODEL, text, lengths, FULL)[0], wanted)


def test_padding_may_hold_any_number():
    text, lengths = put(X, (1, slice(2, 4)), [-7, 2**31 - 1]), np.array([4, 2])
    np.testing.assert_array_equal(prefill(MODEL, text, lengths, FULL)[0], prefill(MODEL, X, lengths, FULL)[0])


TRACED = {
    "length -1": lambda x, n: (x, n.at[1].set(-1)),
    "length 0": lambda x, n: (x, n.at[1].set(0)),
    "a length too large": lambda x, n: (x, n.at[1].set(99)),
    "an id too large": lambda x, n: (x.at[1, 2].set(V), n),
    "a negative id": lambda x, n: (x.at[1, 0].set(-1), n),
}


@functools.cache
def read_traced(method):
    return jax.jit(functools.partial(prefill, MODEL, cache_config=roomy(method)))


@functools.cache
def extend_traced():
    return jax.jit(functools.partial(extend, MODEL))


step = jax.jit(decode_step)


@pytest.mark.promise(
    "Inside jit a wrong id or length gives its own sequence NaN and an empty cache; others do not notice"
)
@pytest.mark.parametrize("method", kinds("minikv"))
def test_a_traced_prompt_that_is_wrong_concerns_its_own_sequence(method):
    text, lengths = jnp.asarray(X), jnp.asarray(L)
    good_logits, good = read_traced(method)(text, lengths)
    for wrong in TRACED.values():
        logits, cache = read_traced(method)(*wrong(text, lengths))
        assert np.isnan(logits[1]).all() and cache.lengths.tolist() == [4, 0] and cache.room.tolist() == [24, 0]
        np.testing.assert_array_equal(logits[0], good_logits[0])
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[0], y[0]), cache.layers, good.layers)
        after, _ = step(MODEL, cache, jnp.array([3, 3]))
        assert np.isnan(after[1]).all() and not np.isnan(after[0]).any()


@pytest.mark.promise("A refused sequence's cache stays bit for bit what it was")
@pytest.mark.parametrize("method", kinds("mikv"))
def test_a_traced_turn_or_token_that_is_wrong_changes_nothing(method):
    _, before = prefill(MODEL, X, L, roomy(method))
    # `length 0` is no fault here: there is just nothing to read.
    for wrong in TRACED.values():
        logits, after = extend_traced()(before, *wrong(jnp.asarray(X), jnp.asarray(L)))
        assert np.isnan(logits[1]).all() and not np.isnan(logits[0]).any()
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[1], y[1]), after, before)
    for token in (-1, V, 2**31 - 1):
        logits, after = step(MODEL, before, jnp.array([3, token]))
        assert np.isnan(logits[1]).all() and not np.isnan(logits[0]).any()
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[1], y[1]), after, before)


def test_traced_logits_without_a_cache_are_nan_where_the_prompt_is_wrong():
    logits = jax.jit(functools.partial(forward, MODEL))(jnp.asarray(put(X, (1, 2), V)), jnp.asarray(L))
    assert np.isnan(logits[1]).all() and not np.isnan(logits[0]).any()


@pytest.mark.parametrize(
    ("token", "match"),
    [
        (np.array([3, V]), f"Token {V} of sequence 1"),
        (np.array([-1, 3]), "Token -1 of sequence 0"),
        (np.array([[3], [4]]), "shape"),
        (np.array([3]), "2 sequences"),
        (np.array([3, 4, 5]), "2 sequences"),
        (np.array([3.0, 4.0]), "float64"),
        (3, "shape"),
    ],
)
def test_a_token_that_is_wrong_is_refused(token, match, cache):
    with pytest.raises(PromptError, match=match):
        decode_step(MODEL, cache, token)


def test_a_sequence_without_room_may_be_given_any_token(cache):
    logits, _ = decode_step(MODEL, reset(cache, 1), np.array([3, -1]))
    assert np.isnan(logits[1]).all() and not np.isnan(logits[0]).any()


def test_more_tokens_than_a_sequence_has_room_for_are_refused(cache):
    text = tokens(2, 9)
    with pytest.raises(PromptError, match="Sequence 0 has room for 8 more tokens and is given 9"):
        extend(MODEL, cache, text, np.array([9, 8]))
    logits, after = extend_traced()(cache, text, jnp.array([9, 8]))
    assert np.isnan(logits[0]).all() and not np.isnan(logits[1]).any()
    assert after.lengths.tolist() == [4, 12]
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[0], y[0]), after, cache)


@pytest.mark.promise(
    "A slot that a cache does not have is refused, or left alone inside jit; no neighbour is overwritten"
)
@pytest.mark.parametrize("change", [lambda c, slot, one: insert(c, slot, one), lambda c, slot, one: reset(c, slot)])
def test_a_slot_that_is_not_there_is_refused(change, cache, one):
    for slot in (2, -1, -3, 2**40, True, 1.0, "0", None, np.array([0])):
        with pytest.raises(ConfigError, match="slot"):
            change(cache, slot, one)
    traced = jax.jit(change)
    for slot in (2, -1, -3, 2**31 - 1):
        chex.assert_trees_all_equal(traced(cache, slot, one), cache)
    for slot in (0, np.int64(1), jnp.int32(1)):
        chex.assert_trees_all_equal(traced(cache, slot, one), change(cache, slot, one))


OTHERS = {
    "fewer key/value heads": (
        Llama(CONFIG.replace(num_kv_heads=1), rngs=nnx.Rngs(params=0)),
        "give both the same model",
    ),
    "another head size": (Llama(CONFIG.replace(head_dim=8), rngs=nnx.Rngs(params=0)), "give both the same model"),
    "another dtype": (Llama(CONFIG, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(params=0)), "bfloat16"),
    "more layers": (Llama(CONFIG.replace(num_layers=2), rngs=nnx.Rngs(params=0)), "other parts"),
}


@pytest.mark.promise("A cache of another model, method or capacity is refused")
@pytest.mark.parametrize("other", OTHERS)
def test_a_prefix_of_another_model_is_refused(other, cache):
    model, match = OTHERS[other]
    _, prefix = prefill(model, X[:1], L[:1], FULL)
    for put_in in (insert, jax.jit(insert)):
        with pytest.raises(ConfigError, match=match):
            put_in(cache, 0, prefix)
    if other == "another dtype":
        return
    for read in (decode_step, step):
        with pytest.raises(ConfigError, match="another model"):
            read(model, cache, np.array([3, 3]))
    with pytest.raises(ConfigError, match="another model"):
        extend(model, cache, X, L)


def test_what_is_no_cache_or_no_method_is_refused(cache):
    with pytest.raises(ConfigError, match="The cache is a"):
        decode_step(MODEL, cache.layers, np.array([3, 3]))
    with pytest.raises(ConfigError, match="The method is a str"):
        prefill(MODEL, X, L, "minikv")
    with pytest.raises(ConfigError, match="The model is a"):
        prefill("smollm2", X, L, FULL)


def test_a_fork_that_was_indexed_is_refused_by_name():
    _, prefix = prefill(MODEL, X[:1], L[:1], roomy("minikv"))
    forked = fork(prefix, 3)
    for order in ([2, 0, 1], [1, 1]):
        # What users write: JAX clamps the indices of the prefix, which all forks share.
        wrong = jax.tree.map(lambda x, order=order: x[jnp.asarray(order)], forked)
        with pytest.raises(ConfigError, match="in another order, by `take`"):
            decode_step(MODEL, wrong, np.zeros(len(order), np.int32))


@pytest.mark.parametrize("count", [0, -1, 2.0, True, "2", None, 2**70 * 1.0])
def test_a_number_of_things_is_a_whole_number(count, one):
    for call in (
        lambda: fork(one, count),
        lambda: empty_cache(MODEL, FULL, count),
        lambda: prefill_in_chunks(MODEL, X, L, FULL, chunk=count),
        lambda: generate(MODEL, X, L, FULL, count),
        lambda: stream(MODEL, X, L, FULL, count),
    ):
        with pytest.raises(ConfigError, match="whole number"):
            call()


@pytest.mark.parametrize("seed", [2**70, 2**32, -1, 1.0, "1", None, True])
def test_a_seed_is_used_whole_or_refused(seed):
    with pytest.raises(ConfigError, match="seed"):
        generate(MODEL, X, L, FULL, 2, seed=seed)


def test_a_traced_seed_is_a_seed():
    drawn = jax.jit(lambda seed: generate(MODEL, X, L, FULL, 4, sampling=Sampling(1.0), seed=seed)[0])
    np.testing.assert_array_equal(drawn(7), generate(MODEL, X, L, FULL, 4, sampling=Sampling(1.0), seed=7)[0])


TWO_BITS = {"key_bits": 2, "value_bits": 2}
ANY = {"name": "x", "method": FULL.method}
FIELDS = [
    (CacheConfig, "generated_capacity", 1.5, ANY),
    (CacheConfig, "prompt_capacity", True, ANY),
    (CacheConfig, "generated_capacity", 0, ANY),
    (CacheConfig, "dtype", "float64", ANY),
    (CacheConfig, "method", "minikv", {"name": "x"}),
    (CacheConfig, "layers", (1,), ANY),
    (CacheConfig, "layers", ((-1, FULL.method),), ANY),
    (Method, "codec", "dense", {"inflow": Append()}),
    (Method, "inflow", "append", {}),
    (Method, "basis", (Codec(),), {"inflow": Append()}),
    (Block, "window", 16.0, {}),
    (Block, "keeps", 9, {"window": 16}),
    (Block, "exact_sinks", 1, {}),
    (Ring, "window", 0, {}),
    (Evict, "when", "sometimes", {}),
    (Codec, "key_bits", 2.0, {"value_bits": 2}),
    (Codec, "metadata_dtype", "float32", TWO_BITS),
    (Codec, "key_clip", (float("nan"),), TWO_BITS),
    (Codec, "key_clip", 0.9, TWO_BITS),
    (Codec, "balance", 1, TWO_BITS),
    (Rank, "by", "luck", {}),
    (Rank, "queries", 8.0, {"by": "last_queries"}),
    (Rank, "pooling", True, {"by": "attention"}),
    (Rank, "attention_weight", float("nan"), {"by": "attention"}),
    (Allocation, "heavy", float("nan"), {}),
    (Allocation, "sinks", 4.0, {}),
    (Allocation, "recent", "0.5", {}),
    (Allocation, "pyramid_depth", float("nan"), {"heavy": 0.5}),
]


@pytest.mark.parametrize(("part", "field", "value", "others"), FIELDS)
def test_a_field_of_a_method_has_its_type_and_range(part, field, value, others):
    with pytest.raises(ConfigError, match=field):
        part(**{field: value}, **others)


@pytest.mark.parametrize("ends", [(), (3,)])
def test_one_new_token_is_the_prompts_own(ends):
    wanted = prefill(MODEL, X, L, FULL)[0].argmax(axis=1)[:, None]
    written, cache = generate(MODEL, X, L, FULL, 1, eos_token_ids=ends)
    np.testing.assert_array_equal(written, wanted)
    assert cache.lengths.tolist() == L.tolist()
    assert len(list(stream(MODEL, X, L, FULL, 1, eos_token_ids=ends))) == 1


def test_end_tokens_are_whole_numbers():
    with pytest.raises(ConfigError, match="eos_token_ids"):
        generate(MODEL, X, L, FULL, 2, eos_token_ids=(1.5,))


def test_messages_are_one_short_line():
    long = "x" * 100_000
    for call in (
        lambda: prefill(MODEL, [[long]], L, FULL),
        lambda: prefill(MODEL, X, [10**6] * 10_000, FULL),
        lambda: Rank(by=long),
        lambda: presets.by_name(long),
        lambda: fork(prefill(MODEL, X[:1], L[:1], FULL)[1], -(10**5000)),
        lambda: presets.minikv(bits=long),
        lambda: empty_cache(MODEL, FULL, long),
    ):
        with pytest.raises(MiniKVError) as caught:
            call()
        assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)


@pytest.mark.promise("Prompts of one bucket compile nothing, whatever their length")
def test_padding_to_a_bucket_compiles_for_no_length():
    bucket(np.ones((2, 20), np.int32))
    before = compilations()
    for length in range(33, 64):
        assert bucket(np.ones((2, length), np.int32)).shape[1] % 16 == 0
        bucket(np.ones((2, length), np.int32).tolist())
    assert compilations() == before


@pytest.mark.promise("A layer that is fed past its room answers NaN and stores nothing more")
@pytest.mark.parametrize("method", kinds("minikv"))
def test_a_layer_fed_past_its_room_says_so(method):
    config = METHODS[method].replace(prompt_capacity=20, generated_capacity=50)
    prompt, _ = draw(draws.rng(), batch=2, tokens=20, steps=1, heads=2, group=2, head_size=16)
    layer = run(config, *prompt, jnp.array([20, 7]), tuple(x[None, :, 0] for x in prompt)).prompt
    state = layers.State(layer, jnp.array([20, 7]), jnp.full(2, 1000))
    refused = np.zeros(2, bool)
    read = jax.jit(layers.step)
    for i in range(400):
        new = (jnp.asarray(x[:, i % 20, None]) for x in prompt)
        before, (output, state) = state, read(*new, state)
        bad = np.isnan(output).any(axis=(1, 2, 3))
        assert i >= 1 or not bad.any()
        assert not (refused & ~bad).any()
        if bad.any():
            for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(state), strict=True):
                np.testing.assert_array_equal(np.asarray(x)[bad], np.asarray(y)[bad])
        refused = bad
    # A method that gives tokens up for good has room for ever, if what it may hold fits.
    first, flow = state.cache.first, state.cache.flow
    gives_up = not config.method.inflow.grows and config.method.rest is None
    for_ever = gives_up and bool((flow.size < first.capacity).all())
    assert refused.all() != for_ever
    assert for_ever or (state.lengths >= jnp.array([20, 7]) + 1).all()
    for tier in (state.cache.first, state.cache.rest):
        assert tier is None or (tier.length <= tier.capacity).all()
