"""Key channels that a tier holds: which, and that everything narrower answers as zeros in the others' place would."""

import dataclasses

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minikv_jax import ConfigError, channels, layer, presets
from minikv_jax.codec import Codec
from minikv_jax.segments import PackedSegment, build
from pallas_kernels import decode_attention, packed_append
from pallas_kernels.packed_append.api import Options
from pallas_kernels.packed_decode.layout import dequantize


@pytest.mark.parametrize(
    ("head_size", "drop", "left"), [(128, 0.4, 80), (128, 0.5, 64), (64, 0.4, 40), (16, 0.6, 8), (16, 0.4, 16)]
)
def test_counts_are_rounded_up_to_whole_loads(head_size, drop, left):
    assert channels.kept(head_size, drop) == left


def drawn(b=2, tokens=90, k=2, h=16):
    rng = draws.rng()
    loud = 2.0 ** rng.uniform(-3, 3, (b, k, 1, h))
    key, value = (jnp.asarray(rng.standard_normal((b, k, tokens, h)) * loud, jnp.float32) for _ in range(2))
    return rng, key, value


def test_those_of_the_largest_norms_are_chosen():
    rng, key, _ = drawn()
    latest = rng.uniform(0, 1, (2, 2, 16)).astype(np.float32)
    tokens = np.array([90, 31])
    got = channels.chosen(jnp.asarray(latest), key, jnp.asarray(tokens), 8)
    for b, k in np.ndindex(2, 2):
        norms = np.linalg.norm(np.asarray(key)[b, k, : tokens[b]], axis=0) * latest[b, k] ** 0.5
        assert got[b, k].tolist() == sorted(np.argsort(norms)[-8:])


@pytest.mark.parametrize(
    "codec", [Codec(), Codec(4, 4, 8, 8), Codec(2, 2, 8, 8, balance=True), Codec(8, 8, "head", key_axis="channels")]
)
def test_a_narrow_segment_attends_as_one_with_zeros_would(codec):
    """Every codec of the narrow keys themselves; `heads` is what a model knows of them."""
    rng, key, value = drawn()
    length = jnp.array([90, 17])
    held = jnp.asarray(np.sort(rng.permuted(np.tile(np.arange(16), (2, 2, 1)), axis=-1)[..., :8]), jnp.int32)
    balance, moment = jnp.asarray(rng.uniform(0.5, 2, (2, 2, 16)), jnp.float32), jnp.ones((2, 2, 16, 16))
    segment = build(codec, key, value, length, 96, jnp.float32, balance, moment, held)
    assert segment.heads == (2, 16)
    if isinstance(segment, PackedSegment):
        narrow_key, whole_value = (np.asarray(dequantize(x))[:, :, :17] for x in (segment.keys, segment.values))
        narrow_key = narrow_key if segment.balance is None else narrow_key / segment.balance[:, :, None]
    else:
        narrow_key, whole_value = (np.asarray(x)[:, :, :17] for x in (segment.key, segment.value))
    query = jnp.asarray(rng.standard_normal((2, 1, 4, 16)), jnp.float32)
    got, _ = decode_attention([segment.part(query)._replace(lengths=jnp.array([17, 17]))])
    for b, n in np.ndindex(2, 4):
        k = n // 2
        logits = narrow_key[b, k] @ np.asarray(query)[b, 0, n, np.asarray(held)[b, k]] * 16**-0.5
        weights = np.exp(logits - logits.max())
        np.testing.assert_allclose(got[b, 0, n], weights @ whole_value[b, k] / weights.sum(), rtol=2e-3, atol=2e-3)


def test_a_full_window_is_encoded_without_the_channels_left_out():
    rng, key, value = drawn(tokens=128)
    held = jnp.asarray(np.sort(rng.permuted(np.tile(np.arange(16), (2, 2, 1)), axis=-1)[..., :8]), jnp.int32)
    codec, moment = Codec(2, 2, 16, 16), jnp.ones((2, 2, 16, 16))
    all_at_once = build(codec, key, value, jnp.array([128, 128]), 128, jnp.float32, None, moment, held)
    empty = dataclasses.replace(jax.tree.map(jnp.zeros_like, all_at_once), channels=held)
    new = packed_append(
        key[:, :, -1:], value[:, :, -1:], jnp.array([True, False]), key, value, jnp.array([127, 127]),
        empty.keys, empty.values, empty.length, options=empty.options,
    )  # fmt: skip
    assert new.length.tolist() == [128, 0]
    for got, want in ((new.keys, all_at_once.keys), (new.values, all_at_once.values)):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
            np.testing.assert_array_equal(a[:1, :, :1], b[:1])
    with pytest.raises(ValueError, match="key_channels"):
        packed_append(
            key[:, :, -1:], value[:, :, -1:], jnp.array([True, False]), key, value, jnp.array([127, 127]),
            empty.keys, empty.values, empty.length, options=Options(key_channels=held[:1]),
        )  # fmt: skip


def test_dropping_nothing_is_no_loss():
    rng = draws.rng()
    rows = [jnp.asarray(rng.standard_normal((2, 50, n, 16)), jnp.float32) for n in (4, 2, 2)]
    lengths = jnp.array([50, 9])
    step = jax.jit(layer.step)
    states = [
        layer.prefill(*rows, lengths, config.replace(generated_capacity=8))[1]
        for config in (presets.think(0.0, "full"), presets.full())
    ]
    for _ in range(5):
        token = [jnp.asarray(rng.standard_normal((2, 1, n, 16)), jnp.float32) for n in (4, 2, 2)]
        (got, states[0]), (want, states[1]) = (step(*token, state) for state in states)
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: presets.think(1.0), "key_drop=1.0"),
        (lambda: presets.think(base="snap"), "base"),
        (lambda: presets.think(recent=0), "window=0"),
        (lambda: presets.kivi().replace(codec=Codec(2, 2, 32, 32, key_drop=0.4)), "key_drop"),
        (lambda: presets.minikv(rotate=True).replace(codec=Codec(2, 2, key_drop=0.4)), "key_drop"),
        (lambda: presets.mikv().replace(codec=Codec(key_drop=0.4)), "key_drop"),
    ],
)
def test_what_does_not_go_together_is_named(make, named):
    with pytest.raises(ConfigError, match=named):
        make()
