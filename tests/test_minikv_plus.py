"""What minikv_plus adds to MiniKV: sinks out of the groups, metadata of 8 bits at any size of numbers, key feedback."""

import dataclasses
import functools

import draws
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layer import draw, run
from models import with_codes

from minikv_jax import Codec, ConfigError, codec, presets
from minikv_jax.config import Rank
from minikv_jax.models.shapes import shape_of
from minikv_jax.report import planned_report
from pallas_kernels import quantize, two_pass_attention
from pallas_kernels.hadamard import rotate

PLUS = presets.minikv_plus(group_size=8, residual=16)
# Tests draw two sequences of 64 tokens and a stream of 40 where nothing else is needed: one program serves them all.
DRAWN = (2, 64, 40, 2, 2, 16)
decode = jax.jit(quantize.decode, static_argnums=(1, 2))
turn = jax.jit(rotate)


def test_its_cache_weighs_two_and_a_quarter_bits():
    # The newest 64 tokens are always in the window, so there is no room for their codes.
    coded = 4096 + 512 - 64
    total = planned_report(shape_of("llama2-7b"), presets.minikv_plus(sinks=0), 4096, 512).total
    # What feedback needs, half a matrix a head, weighs as much as 114 tokens.
    triangles = 32 * 32 * 64 * 128
    assert total.bytes_tiers - triangles == -(-coded // 128) * 128 * 2**19 * 2.25 / 16
    # 132 tokens in 16 bits, and a counter for each layer.
    total = planned_report(shape_of("llama2-7b"), presets.minikv_plus(), 4096, 512).total
    assert total.bytes_window == 132 * 2**19 + 32 * 4
    three = planned_report(shape_of("llama2-7b"), presets.minikv_plus(key_bits=3), 4096, 512).total
    assert three.bytes_tiers - triangles == (total.bytes_tiers - triangles) * 2.75 / 2.25
    half = planned_report(shape_of("llama2-7b"), presets.minikv_plus(0.25, 0.25), 4096, 512).total
    assert half.bytes_tiers == total.bytes_tiers - 2048 * 2**19 * 2.25 / 16


def as_they_came(x, layer, part="key"):
    """Rows [B, K, S, H] as they are held, in the model's coordinates."""
    balance, _, units = (np.asarray(getattr(state, part), np.float32) if state else None for state in layer.frames)
    return np.asarray(turn(x * units[..., None, None])) / balance[:, :, None]


@pytest.mark.parametrize("length", [3, 9, 24, 31])
def test_the_newest_tokens_stay_as_they_came(length):
    prompt, stream = draw(draws.rng(), 1, 40, 60, 2, 2, 16)
    plain = PLUS.replace(inflow=dataclasses.replace(PLUS.method.inflow, exact_sinks=False))
    seen = run(plain, *prompt, np.array([length]), stream)
    key = np.concatenate([prompt[1][0, :length], stream[1][:, 0]])
    for layer, count in ((seen.prompt, length), (seen.after, length + len(stream[1]))):
        window = int(layer.flow.length[0])
        assert min(count, 8) <= window < 16
        held = as_they_came(layer.flow.key, layer)[0, :, :window]
        np.testing.assert_allclose(held, key[count - window : count].swapaxes(0, 1), atol=1e-4)


def test_sinks_stay_as_they_came_and_stretch_no_group():
    prompt, stream = draw(draws.rng(), *DRAWN)
    lengths = np.array([64, 2])
    quiet = run(PLUS, *prompt, lengths, stream)
    # Sinks of the first sequence came with its prompt; the second had two tokens, so two more are new ones.
    key = np.concatenate([prompt[1][1, :2], stream[1][:2, 1]])
    expected = np.stack([prompt[1][0, :4], key]).swapaxes(1, 2)
    for layer, known in ((quiet.prompt, (4, 2)), (quiet.after, (4, 4))):
        for b, rows in enumerate(known):
            held = as_they_came(layer.flow.key, layer)[b, :, :rows]
            np.testing.assert_allclose(held, expected[b, :, :rows], atol=1e-4)
    loud = [np.array(x) for x in prompt]
    loud[1][0, :4] *= 100
    loud[2][0, :4] *= 100
    again = run(PLUS, *loud, lengths, stream)
    for packed in ("keys", "values"):
        before, after = (getattr(x.after.first, packed) for x in (quiet, again))
        np.testing.assert_array_equal(before.scale, after.scale)


TIERS = presets.minikv_plus(group_size=8, residual=16, important=0.3)


@jax.jit
def _values(segment):
    codes = (quantize.from_packed(x) for x in (segment.keys, segment.values))
    return codec.decode(segment.codec, *codes, None)[1]


def _held(segment, layer, b):
    """A tier's values of sequence b as they came, [K, tokens, H]."""
    return as_they_came(_values(segment), layer, "value")[b, :, : int(segment.length[b])]


@pytest.mark.slow
def test_the_most_attended_tokens_have_four_bits_and_the_others_two():
    lengths = np.array([90, 41, 12, 3])
    prompt, stream = draw(draws.rng(), 4, 90, 30, 2, 2, 16)
    attend = jax.jit(functools.partial(two_pass_attention, score_rows=256))
    _, scores, _ = attend(*prompt, query_lengths=lengths, key_value_lengths=lengths)
    seen = run(TIERS, *prompt, lengths, stream)
    for b, length in enumerate(lengths):
        # Sinks and eight or more of the newest stay dense; between them tiers take tokens in groups of eight.
        between = max(length - 4 - 8, 0) // 8 * 8
        important = min(int(0.3 * length), between) // 8 * 8
        layer = seen.prompt
        found = [int(part.length[b]) for part in (layer.first, layer.rest, layer.flow)]
        assert found == [important, between - important, length - between]
        for head in range(2):
            best = np.sort(4 + np.argsort(-np.asarray(scores)[b, head, 4 : 4 + between], kind="stable")[:important])
            rest = np.setdiff1d(np.arange(4, 4 + between), best)
            for tier, rows, most in ((layer.first, best, 0.15), (layer.rest, rest, 0.6)):
                value, expected = _held(tier, layer, b)[head], prompt[2][b, rows, head]
                assert value.shape == expected.shape
                assert np.linalg.norm(value - expected) <= most * np.linalg.norm(expected)
        # What windows encode joins the others, and so needs what feedback goes by.
        assert seen.prompt.first.coupling is None and seen.prompt.rest.coupling is not None
        after, encoded = seen.after, max(length + 30 - 4 - 8, 0) // 8 * 8
        assert [int(after.first.length[b]), int(after.rest.length[b])] == [important, encoded - important]


@pytest.mark.slow
def test_two_fine_tiers_answer_like_the_full_cache():
    lengths = np.array([90, 41, 12, 3])
    prompt, stream = draw(draws.rng(), 4, 90, 30, 2, 2, 16)
    # Loud queries attend to few tokens, so that two bits surely hurt.
    prompt, stream = ((3 * query, *rest) for query, *rest in (prompt, stream))
    fine = with_codes(TIERS, key_bits=8, value_bits=8)
    found, exact = (run(x, *prompt, lengths, stream).outputs for x in (fine, presets.full()))
    assert np.linalg.norm(found - exact) < 0.03 * np.linalg.norm(exact)
    coarse = run(TIERS, *prompt, lengths, stream).outputs
    assert np.linalg.norm(coarse - exact) > 0.1 * np.linalg.norm(exact)


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda: presets.minikv_plus(heavy=0.25, important=0.1), "leave heavy"),
        (lambda: presets.minikv_plus(important=0.1, precise=(1,)), "in one tier"),
        (lambda: TIERS.replace(rest=Codec()), "fewer than 16 bits"),
        (lambda: TIERS.replace(rest=Codec(2, 2, 16, 16)), "same groups"),
        (lambda: TIERS.replace(rank=Rank(by="attention", attention_weight=0.5)), "by attention alone"),
    ],
)
def test_tiers_that_do_not_go_together_are_named(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


@settings(max_examples=5)
@given(exponents=st.tuples(*[st.integers(-30, 30)] * 2))
def test_numbers_of_any_size_are_kept_as_well(exponents):
    # Eight-bit floats end at 448 and at 2 ** -9: without the layer's units tiny values would all become one.
    (query, key, value), stream = draw(draws.rng(), *DRAWN)
    lengths = np.array([60, 33])
    plain = run(PLUS, query, key, value, lengths, stream).outputs
    k, v = (np.float32(2.0**e) for e in exponents)
    scaled = (query / k, key * k, value * v), (stream[0] / k, stream[1] * k, stream[2] * v)
    np.testing.assert_array_equal(run(PLUS, *scaled[0], lengths, scaled[1]).outputs, plain * v)


def test_keys_of_new_tokens_go_by_the_prompts_queries():
    rng = draws.rng()
    prompt, stream = draw(rng, *DRAWN)
    narrow = rng.standard_normal((3, 16)).astype(np.float32)  # few directions: most of an error is seen by no query
    asked = (rng.standard_normal((2, 64, 4, 3)) @ narrow).astype(np.float32)
    layer = run(PLUS, asked, *prompt[1:], np.array([64, 64]), stream).prompt
    new = draws.array(rng.standard_normal((2, 2, 64, 16)))
    balance = np.asarray(layer.frames[0].key, np.float32)[:, :, None]

    def lost(segment):
        coupling = None if segment.coupling is None else quantize.unfold(segment.coupling)
        codes = jax.jit(codec.encode_keys, static_argnums=0)(segment.codec, new, segment.balance, coupling)
        error = np.asarray(turn(decode(codes, 8, "tokens") - new)) / balance
        return np.square(error @ narrow.T).mean()

    assert lost(layer.first) < 0.9 * lost(dataclasses.replace(layer.first, coupling=None))
