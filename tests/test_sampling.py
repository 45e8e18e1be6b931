"""Sampling draws tokens with the probabilities it is given, and no token from NaN."""

import dataclasses

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations
from hypothesis import given, settings
from hypothesis import strategies as st
from models import METHODS, MODEL, tokens

from minikv_jax import ConfigError, Sampling, forward, generate, stream
from minikv_jax.sampling import _RULES, Seen, sample, with_log_probs


def test_sampling_stays_within_top_p_and_follows_the_temperature():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    keys = jax.random.split(jax.random.key(int(draws.rng().integers(1 << 30))), 4000)

    def shares(sampling):
        drawn = jax.vmap(lambda key: sample(logits, key, sampling)[0])(keys)
        return np.bincount(np.asarray(drawn), minlength=4) / len(keys)

    np.testing.assert_allclose(shares(Sampling(1.0)), [0.5, 0.3, 0.15, 0.05], atol=0.04)
    np.testing.assert_allclose(shares(Sampling(1.0, top_p=0.7)), [0.625, 0.375, 0, 0], atol=0.04)
    assert shares(Sampling(0.0)).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, "0", None, True])
def test_a_temperature_is_a_finite_number(value):
    with pytest.raises(ConfigError, match="temperature"):
        Sampling(temperature=value)
    with pytest.raises(ConfigError, match="top_p"):
        Sampling(top_p=value if value != float("inf") else 2.0)


@pytest.mark.promise("A model that answers NaN generates -1, which is no token, and not token 0")
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(1.0, 0.5)])
def test_nan_becomes_no_token(sampling):
    key = jax.random.key(0)
    logits = jnp.zeros((3, 8)).at[1, 5].set(jnp.nan).at[2].set(jnp.nan)
    assert (sample(logits, key, sampling) >= 0).tolist() == [True, False, False]
    broken = jax.tree.map(lambda x: x, MODEL)
    broken.norm.set_value(broken.norm[...].at[0].set(jnp.nan))
    text, lengths = np.array([[5, 6, 7, 8], [9, 10, 11, 12]], np.int32), np.array([4, 4], np.int32)
    config = METHODS["full"].replace(prompt_capacity=16, generated_capacity=8)
    written, cache = generate(broken, text, lengths, config, 5, sampling=sampling)
    assert (np.asarray(written) == -1).all() and cache.lengths.tolist() == [4, 4]
    assert [token.tolist() for token, _ in stream(broken, text, lengths, config, 3, sampling=sampling)] == [
        [-1, -1]
    ] * 3


def reference(logits, temperature, top_k, top_p, min_p, mask, repetition, presence, read, written):
    """One sequence's logits after everything but the draw, written from the fields' descriptions, in float64."""
    x = np.where(mask, logits.astype(np.float64), -np.inf)
    x = np.where(read, np.where(x > 0, x / repetition, x * repetition), x)
    x = np.where(written, x - presence, x)
    if temperature == 0:
        return np.where(np.arange(len(x)) == x.argmax(), 0.0, -np.inf)
    x = x / temperature
    if top_k:
        x = np.where(x >= np.sort(x)[::-1][min(top_k, len(x)) - 1], x, -np.inf)
    order, share = np.argsort(-x), np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    before = np.cumsum(share[order]) - share[order]
    x[order[before >= top_p]] = -np.inf
    return np.where(np.exp(x - x.max()) >= min_p, x, -np.inf)


jitted = jax.jit(sample)


FIELDS = [name for name in _RULES if name != "stop_tokens"]


def test_each_row_is_drawn_in_its_own_way():
    check_draws(set(FIELDS))


@pytest.mark.slow
@settings(max_examples=12)
@given(used=st.sets(st.sampled_from(FIELDS)))
def test_whatever_is_in_use_each_row_is_drawn_in_its_own_way(used):
    check_draws(used)


def check_draws(used):
    rng, b, v = draws.rng(), 5, 40
    logits = draws.array(3 * rng.standard_normal((b, v)))
    fields = {
        "temperature": np.where(rng.random(b) < 0.3, 0, rng.uniform(0.2, 2, b)).astype(np.float32),
        "top_k": rng.integers(0, 50, b),
        "top_p": rng.uniform(0.1, 1, b).astype(np.float32),
        "min_p": rng.uniform(0, 0.5, b).astype(np.float32),
        "repetition_penalty": rng.uniform(0.5, 2, b).astype(np.float32),
        "presence_penalty": rng.uniform(-1, 3, b).astype(np.float32),
        "seed": rng.integers(0, 2**32, b),
        "logit_mask": rng.random((b, v)) < 0.7,
    }
    fields = {name: fields[name] for name in used}
    read = rng.random((b, v)) < 0.4
    seen, written = Seen(jnp.array(read), jnp.array(read & (rng.random((b, v)) < 0.5))), None
    written = np.asarray(seen.written)
    key, positions = jax.random.key(int(rng.integers(1 << 30))), draws.array(rng.integers(0, 99, b), "int32")
    tokens = np.asarray(jitted(logits, key, Sampling(**fields), positions, seen))
    of = lambda name, row: fields.get(name, np.full(b, _RULES[name].unused))[row]  # noqa: E731
    left = np.stack(
        [
            reference(
                np.asarray(logits[i]), *(of(name, i) for name in ("temperature", "top_k", "top_p", "min_p")),
                fields.get("logit_mask", np.ones((b, v), bool))[i],
                of("repetition_penalty", i), of("presence_penalty", i), read[i], written[i],
            )
            for i in range(b)
        ]
    )  # fmt: skip
    if "seed" in used:
        keys = [jax.random.fold_in(jax.random.key(np.uint32(s)), p) for s, p in zip(fields["seed"], positions)]
        drawn = [jax.random.categorical(k, jnp.asarray(row, jnp.float32)) for k, row in zip(keys, left)]
    else:
        drawn = jax.random.categorical(key, jnp.asarray(left, jnp.float32))
    assert tokens.tolist() == [int(x) for x in drawn], (fields, tokens, drawn)
    # A seeded row is drawn as it is among others, in another place.
    if "seed" in used:
        turned = jax.tree.map(lambda x: jnp.roll(x, 2, axis=0), (logits, Sampling(**fields), positions, seen))
        assert jitted(turned[0], key, *turned[1:]).tolist() == np.roll(tokens, 2).tolist()


@pytest.mark.promise("Other temperatures, seeds and penalties compile nothing; greedy alone pays for none of them")
def test_what_is_in_use_is_static_and_values_are_not():
    logits, key = jnp.zeros((2, 8)), jax.random.key(0)
    jitted(logits, key, Sampling(0.5, top_k=3))
    before = compilations()
    for sampling in (Sampling(0.7, top_k=5), Sampling(np.float32(1.5), top_k=np.int64(2)), Sampling(2, top_k=1)):
        jitted(logits, key, sampling)
    assert compilations() == before
    assert Sampling(0.7, top_k=5).in_use == ("temperature", "top_k") and Sampling(0, top_p=1).in_use == ()
    operations = [str(jax.make_jaxpr(sample)(logits, key, x)) for x in (Sampling(), Sampling(0.0, top_p=1.0, top_k=0))]
    assert operations[0] == operations[1]
    assert not any(x in operations[0] for x in ("random_", " sort[", "exp", "div"))
    restored = jax.tree.unflatten(*reversed(jax.tree.flatten(Sampling(0.5))))
    assert restored.top_p == 1.0 and restored.seed is None and float(restored.temperature) == 0.5


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", np.array([0.5, -1])),
        ("temperature", np.zeros((2, 2))),
        ("top_k", 1.5),
        ("top_k", -1),
        ("top_p", 0.0),
        ("min_p", jnp.array([0.1, 1.1])),
        ("repetition_penalty", 0),
        ("presence_penalty", float("nan")),
        ("seed", -1),
        ("seed", 1 << 32),
        ("seed", 0.5),
        ("stop_tokens", 3),
        ("stop_tokens", [0.5]),
        ("stop_tokens", [1 << 31]),
        ("logit_mask", [0, 1]),
        ("logit_mask", True),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=f"{field}=.*give "):
        Sampling(**{field: value})


def test_what_sampling_cannot_do_is_said():
    logits, key = jnp.zeros((2, 8)), jax.random.key(0)
    for sampling, match in [
        (Sampling(jnp.ones(3)), r"temperature has shape \(3,\)"),
        (Sampling(logit_mask=np.ones(7, bool)), "logit_mask has shape"),
        (Sampling(1.0, seed=3), "positions"),
        (Sampling(presence_penalty=1.0), "seen_in"),
    ]:
        with pytest.raises(ConfigError, match=match):
            sample(logits, key, sampling)
    # Traced, the sequence it concerns has no token; so where a mask leaves none.
    drawn = jax.jit(lambda t: sample(logits, key, Sampling(temperature=t)))
    assert (drawn(jnp.array([-1.0, 0.5])) >= 0).tolist() == [False, True]
    mask = np.array([[False] * 8, [False] * 7 + [True]])
    assert sample(logits, key, Sampling(logit_mask=mask)).tolist() == [-1, 7]


def test_log_probabilities_are_those_of_the_logits():
    logits = draws.array(draws.rng().standard_normal((3, 9)))
    exact = np.asarray(logits, np.float64)
    exact -= np.log(np.exp(exact).sum(-1, keepdims=True))
    given = with_log_probs(logits, jnp.array([4, 0, -1]), 2)
    np.testing.assert_allclose(given.log_probs, [exact[0, 4], exact[1, 0], np.nan], rtol=1e-5)
    best = np.argsort(-exact, -1)[:2, :2]
    assert given.top_tokens.tolist() == [*best.tolist(), [-1, -1]]
    np.testing.assert_allclose(given.top_log_probs[:2], np.take_along_axis(exact[:2], best, -1), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.promise("A seeded sequence is answered with the same tokens alone, in any batch, at once and in pieces")
def test_a_seeded_sequence_is_answered_alike_wherever_it_is(figure):
    text, lengths, config = tokens(3, 24), np.array([24, 9, 17]), METHODS["full"].replace(generated_capacity=40)
    seeds, warm = np.array([7, 8, 9]), np.array([0.8, 0.0, 1.3], np.float32)
    stops = np.full((3, 2), -1)
    sampling = Sampling(warm, top_k=20, seed=seeds, stop_tokens=stops, presence_penalty=np.array([1.0, 0.5, 0.0]))
    whole, _ = generate(MODEL, text, lengths, config, 30, sampling=sampling, log_probs=3)
    streamed = [x for x, _ in stream(MODEL, text, lengths, config, 30, sampling=sampling, log_probs=3)]
    np.testing.assert_array_equal(whole.tokens, np.stack([x.tokens for x in streamed], 1))
    np.testing.assert_array_equal(whole.top_tokens, np.stack([x.top_tokens for x in streamed], 1))
    assert whole.top_log_probs.shape == (3, 30, 3) and (np.asarray(whole.log_probs) <= 0).all()
    for row in range(3):
        one = jax.tree.map(lambda x, row=row: x[row : row + 1] if np.ndim(x) else x, sampling)
        alone, _ = generate(MODEL, text[row : row + 1], lengths[row : row + 1], config, 30, sampling=one)
        assert alone[0].tolist() == whole.tokens[row].tolist()
    plain = Sampling(warm, seed=seeds)
    at_once, _ = generate(MODEL, text, lengths, config, 20, sampling=plain)
    first, cache = generate(MODEL, text, lengths, config, 8, sampling=plain)
    then, _ = generate(MODEL, first[:, -1:], np.ones(3, np.int32), cache, 12, sampling=plain)
    np.testing.assert_array_equal(at_once, np.concatenate([first, then], 1))
    # A stop token of one sequence ends that one alone.
    stops[0, 0] = int(whole.tokens[0, 3])
    short, cache = generate(
        MODEL, text, lengths, config, 30, sampling=dataclasses.replace(sampling, stop_tokens=stops), log_probs=0
    )
    end = whole.tokens[0].tolist().index(stops[0, 0])
    assert short.tokens[0].tolist() == whole.tokens[0, : end + 1].tolist() + [stops[0, 0]] * (29 - end)
    assert np.isnan(short.log_probs[0, end + 1 :]).all() and short.tokens[2].tolist() == whole.tokens[2].tolist()
    assert cache.lengths.tolist() == [24 + end, 9 + 29, 17 + 29]
    figure("3 sequences of 30 tokens, alone, together, and in two pieces")


@pytest.mark.slow
def test_penalties_count_what_the_call_has_read_and_written():
    text, lengths, config = tokens(2, 12), np.array([12, 5]), METHODS["full"].replace(generated_capacity=20)
    sampling = Sampling(repetition_penalty=np.array([1.5, 1.0]), presence_penalty=np.array([0.0, 2.0]))
    written, _ = generate(MODEL, text, lengths, config, 12, sampling=sampling)
    for b in range(2):
        row, new = text[b, : lengths[b]].tolist(), []
        for token in written[b].tolist():
            x = np.array(forward(MODEL, np.array([(row + new + [0] * 24)[:24]]))[0, len(row + new) - 1])
            for t in set(row + new) if b == 0 else set():
                x[t] = x[t] / 1.5 if x[t] > 0 else x[t] * 1.5
            for t in set(new) if b == 1 else set():
                x[t] -= 2.0
            assert x[token] > x.max() - 1e-4
            new.append(token)
