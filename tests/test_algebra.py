"""Methods as values, named ones and others, each against its own few lines of NumPy.

One key/value head and two query heads of 16 channels; a prompt of 40 tokens and a stream of 24.
"""

import draws
import numpy as np
import pytest
from layer import draw, run
from reference import causal_probabilities, hadamard, pool, roundtrip_per_channel, roundtrip_per_token, softmax

from minikv_jax import presets
from minikv_jax.append import Append
from minikv_jax.basis import Hadamard
from minikv_jax.block import Block
from minikv_jax.codec import Codec
from minikv_jax.config import Allocation, CacheConfig, Method, Rank
from minikv_jax.evict import Evict
from minikv_jax.ring import Ring

PROMPT, STEPS, HEAD_SIZE, GROUP = 40, 24, 16, 8
TOKENWISE = {"key_group": "head", "value_group": "head", "key_axis": "channels"}


def a_draw():
    """Prompt and stream of one sequence, as `run` takes them and as [tokens, heads, H] arrays."""
    prompt, stream = draw(draws.rng(), 1, PROMPT, STEPS, 1, 2, HEAD_SIZE)
    plain = [np.concatenate([x[0], y[:, 0]]).astype(np.float64) for x, y in zip(prompt, stream)]
    return prompt, stream, (plain[0], plain[1][:, 0], plain[2][:, 0])


@pytest.fixture
def drawn():
    return a_draw()


def outputs(method: Method | CacheConfig, drawn, layer: int = 0, layers: int = 1) -> np.ndarray:
    config = method if isinstance(method, CacheConfig) else CacheConfig("of one's own", method)
    prompt, stream, _ = drawn
    return np.asarray(run(config, *prompt, np.array([PROMPT]), stream, layer=layer, layers=layers).outputs)[:, 0]


def attend(query, key, value) -> tuple[np.ndarray, np.ndarray]:
    """Output [N, H] of queries [N, H] over keys [S, H], and the attention [S] the keys received."""
    p = softmax(query @ np.asarray(key).T * HEAD_SIZE**-0.5)
    return p @ np.asarray(value), p.sum(axis=0)


def received(query, key, last: int = PROMPT) -> np.ndarray:
    """Attention that each token of the prompt received from the prompt's last queries."""
    return causal_probabilities(query[:PROMPT], key[:PROMPT, None])[:, -last:].sum(axis=(0, 1))


def same(found: np.ndarray, expected: list[np.ndarray], share: float = 0.02) -> None:
    # A number that lies half-way between two codes may go either way, and so may what it outweighs.
    assert np.mean(np.abs(found - np.stack(expected)) > 1e-3) < share


def coded(x, bits):
    """Tokens [S, H] with one scale each."""
    return np.asarray(roundtrip_per_token(np.asarray(x, np.float32), bits, HEAD_SIZE), np.float64)


def grouped(x, bits):
    """Keys [S, H] in groups of 8 tokens of one channel."""
    return np.asarray(roundtrip_per_channel(np.asarray(x, np.float32), bits, GROUP), np.float64)


def valued(x, bits):
    """Values [S, H] in groups of 8 channels of one token."""
    return np.asarray(roundtrip_per_token(np.asarray(x, np.float32), bits, GROUP), np.float64)


def heaviest(scores, count):
    return set(np.argsort(-scores, kind="stable")[:count].tolist())


def test_every_token_in_eight_bits(drawn):
    _, _, (query, key, value) = drawn
    found = outputs(presets.int8(), drawn)
    key, value = coded(key, 8), coded(value, 8)
    same(found, [attend(query[t], key[: t + 1], value[: t + 1])[0] for t in range(PROMPT, PROMPT + STEPS)])


def test_every_token_in_four_bits_of_a_hadamard_basis(drawn):
    _, _, (query, key, value) = drawn
    turn = hadamard(HEAD_SIZE)
    keys, values = coded(key @ turn, 4), coded(value @ turn, 4)
    expected = [
        attend(query[t] @ turn, keys[: t + 1], values[: t + 1])[0] @ turn for t in range(PROMPT, PROMPT + STEPS)
    ]
    same(outputs(presets.quarot(), drawn), expected, share=0.2)  # rotated back, one code moves all channels


def test_a_sliding_dense_cache(drawn):
    _, _, (query, key, value) = drawn
    found = outputs(Method(allocation=Allocation(heavy=0, recent=16), inflow=Evict("before")), drawn)
    expected = [attend(query[t], key[t - 15 : t + 1], value[t - 15 : t + 1])[0] for t in range(PROMPT, PROMPT + STEPS)]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_h2o_with_a_quantised_rest(drawn):
    _, _, (query, key, value) = drawn
    method = Method(
        rank=Rank(by="attention"),
        allocation=Allocation(heavy=0.2, recent=0.2),
        rest=Codec(4, 4, **TOKENWISE),
        inflow=Evict("after"),
    )
    recent = int(PROMPT * 0.2)
    scores = np.zeros(PROMPT + STEPS)
    scores[:PROMPT] = received(query, key)
    kept = heaviest(scores[: PROMPT - recent], int(PROMPT * 0.2)) | set(range(PROMPT - recent, PROMPT))
    low_key, low_value = coded(key, 4), coded(value, 4)
    expected = []
    for t in range(PROMPT, PROMPT + STEPS):
        kept.add(t)
        first, rest = sorted(kept), sorted(set(range(t)) - kept)
        rows = [np.concatenate([x[first], y[rest]]) for x, y in ((key, low_key), (value, low_value))]
        output, gained = attend(query[t], *rows)
        scores[first] += gained[: len(first)]
        kept.remove(min((i for i in first if i <= t - recent), key=lambda i: scores[i]))
        expected.append(output)
    same(outputs(method, drawn), expected)


def test_tova_keeps_what_the_newest_query_attends_to(drawn):
    _, _, (query, key, value) = drawn
    kept = heaviest(received(query, key, last=1), 12)
    expected = []
    for t in range(PROMPT, PROMPT + STEPS):
        held = sorted(kept | {t})
        output, gained = attend(query[t], key[held], value[held])
        gained[gained < np.finfo(np.float32).tiny] = 0  # as float32 has it; of equal scores the later token goes
        kept = set(held) - {min(held, key=lambda i: (gained[held.index(i)], -i))}
        expected.append(output)
    np.testing.assert_allclose(outputs(presets.tova(12), drawn), expected, atol=1e-4)


def snapkv_scores(query, key) -> np.ndarray:
    return pool(received(query, key, last=4)[: PROMPT - 4], 3, "avg")


def stands_apart(scores, count: int) -> bool:
    """Whether the `count` largest are larger than all others by more than rounding."""
    ordered = np.sort(scores)
    return ordered[-count] > ordered[-count - 1] * 1.001


@pytest.mark.parametrize("layer", [0, 2])
def test_snapkv_whose_first_layers_are_dense(layer):
    # Around a heavy token pooled scores are all but equal, and float32 may choose another one of them.
    drawn = next(one for one in iter(a_draw, None) if stands_apart(snapkv_scores(*one[2][:2]), 12))
    _, _, (query, key, value) = drawn
    snap = Method(
        rank=Rank(by="last_queries", queries=4, pooling=3), allocation=Allocation(budget=16, recent=4), inflow=Append()
    )
    config = CacheConfig("half snapped", snap, layers=((0, Method(inflow=Append())), (1, Method(inflow=Append()))))
    chosen = heaviest(snapkv_scores(query, key), 12) | set(range(PROMPT - 4, PROMPT))
    held = sorted(chosen) if layer == 2 else list(range(PROMPT))
    expected = []
    for t in range(PROMPT, PROMPT + STEPS):
        held.append(t)
        expected.append(attend(query[t], key[held], value[held])[0])
    np.testing.assert_allclose(outputs(config, drawn, layer, 3), expected, atol=1e-4)


def test_kivi_in_a_hadamard_basis(drawn):
    _, _, (query, key, value) = drawn
    method = Method(codec=Codec(2, 2, GROUP, GROUP), basis=(Hadamard(),), inflow=Ring(16))
    turn = hadamard(HEAD_SIZE)
    query, key, value = query @ turn, key @ turn, value @ turn
    expected = []
    for t in range(PROMPT, PROMPT + STEPS):
        whole, old = t // 16 * 16, max(t - 16, 0)  # the window of keys is encoded after the step that fills it
        keys = np.concatenate([grouped(key[:whole], 2), key[whole : t + 1]])
        values = np.concatenate([valued(value[:old], 2), value[old : t + 1]])
        expected.append(attend(query[t], keys, values)[0] @ turn)
    same(outputs(method, drawn), expected)


@pytest.mark.parametrize("layer", [0, 1])
def test_minikv_with_bits_of_each_layer(drawn, layer):
    _, _, (query, key, value) = drawn
    method = Method(
        rank=Rank(by="attention"),
        allocation=Allocation(heavy=0.25, recent=0.25),
        codec=Codec(2, 2, GROUP, GROUP),
        inflow=Block(16),
    )
    config = CacheConfig("four, then two", method, layers=((0, method.replace(codec=Codec(4, 4, GROUP, GROUP))),))
    bits = 4 if layer == 0 else 2
    scores = received(query, key)
    held = sorted(heaviest(scores[: PROMPT - 10], 10) | set(range(PROMPT - 10, PROMPT)))
    encoded = len(held) // GROUP * GROUP
    expected = []
    for t in range(PROMPT, PROMPT + STEPS):
        held.append(t)
        encoded += 16 if len(held) - encoded == 16 else 0
        keys = np.concatenate([grouped(key[held[:encoded]], bits), key[held[encoded:]]])
        values = np.concatenate([valued(value[held[:encoded]], bits), value[held[encoded:]]])
        expected.append(attend(query[t], keys, values)[0])
    same(outputs(config, drawn, layer, 2), expected)
