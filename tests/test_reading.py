"""Prompts are read in pieces and in groups of sequences: the sizes of these, and the same logits whatever they are."""

import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from models import CONFIG, METHODS, TWO_LAYERS, follow, nearly_equal, tokens

from minikv_jax import forward, prefill
from minikv_jax.models.llama import Llama
from minikv_jax.reading import chunk_rows, sequences_at_once


def in_chunks_of(monkeypatch, rows: int, attended: int):
    """Reads prompts in pieces of so many rows, and so many in a call of attention."""
    for name, value in (("_ROWS", rows), ("_ATTENDED_ROWS", attended)):
        monkeypatch.setattr(sys.modules["minikv_jax.reading"], name, value)


@pytest.mark.parametrize(
    ("method", "rows", "attended"),
    [
        ("minikv", 3 * 128, 3 * 384),  # all sequences at once
        ("snapkv", 128, 256),
        pytest.param("minikv", 128, 128, marks=pytest.mark.slow),  # one after the other
        *(pytest.param("mikv", *x, marks=pytest.mark.slow) for x in ((3 * 128, 3 * 384), (128, 128))),
    ],
)
def test_a_prompt_read_in_chunks_of_rows_is_the_prompt(method, rows, attended, monkeypatch):
    text, lengths, later, config = tokens(3, 300), jnp.array([300, 40, 131]), tokens(3, 4), METHODS[method]
    whole, _ = follow(config, text, lengths, later)
    in_chunks_of(monkeypatch, rows, attended)
    in_chunks, _ = follow(config, text, lengths, later)
    assert nearly_equal(whole, in_chunks)
    np.testing.assert_allclose(whole[:, 0], in_chunks[:, 0], atol=2e-5)


@pytest.mark.parametrize(
    "method",
    ["minikv_pyramid", "mikv", *(pytest.param(x, marks=pytest.mark.slow) for x in ("full", "kivi", "minikv_plus"))],
)
def test_sequences_read_one_group_after_the_other_are_the_batch(method, monkeypatch):
    text, lengths, later, config = tokens(4, 60), jnp.array([60, 21, 33, 4]), tokens(4, 4), METHODS[method]
    whole, expected = follow(config, text, lengths, later)
    monkeypatch.setattr(sys.modules["minikv_jax.reading"], "_ATTENDED_ROWS", 3 * 60)  # of 4 sequences 2 at once
    in_groups, cache = follow(config, text, lengths, later)
    assert nearly_equal(whole, in_groups)
    chex.assert_trees_all_equal_shapes_and_dtypes(cache, expected)
    done = []
    eager = prefill(TWO_LAYERS, text, lengths, config, progress=lambda *counts: done.append(counts))
    assert done == [(i + 1, 4) for i in range(4)]  # two groups, two layers
    inside = jax.jit(lambda model, text, lengths: prefill(model, text, lengths, config))(TWO_LAYERS, text, lengths)
    chex.assert_trees_all_equal_shapes_and_dtypes(inside, eager)
    np.testing.assert_allclose(inside[0], eager[0], atol=2e-5)


@given(batch=st.integers(1, 300), length=st.integers(0, 200_000))
def test_groups_of_sequences_are_even_and_fill_a_call_of_attention(batch, length):
    together = sequences_at_once(batch, length)
    assert batch % together == 0 and (together == 1 or together * length <= 32768)
    if batch * length <= 32768:
        assert together == batch


def test_logits_everywhere_are_the_same_in_chunks_of_rows(monkeypatch):
    model, text = Llama(CONFIG.replace(sliding_window=50), rngs=nnx.Rngs(params=0)), tokens(1, 300)
    whole = forward(model, text, jnp.array([290]))[:, :290]
    in_chunks_of(monkeypatch, 128, 256)
    np.testing.assert_allclose(whole, forward(model, text, jnp.array([290]))[:, :290], atol=2e-5)


@given(batch=st.integers(1, 64), tokens=st.integers(1, 400_000))
def test_chunks_cover_a_prompt_with_little_padding(batch, tokens):
    chunks = chunk_rows(batch, tokens)
    assert chunks.attention % chunks.products == 0
    # Less than 128 rows in each piece, of which the last may hold nothing else: at 153,601 tokens it does.
    pieces = -(-tokens // chunks.attention) * (chunks.attention // chunks.products)
    assert -tokens % chunks.attention < 128 * pieces
    assert chunks.products <= max(4096 // batch, 128)
    assert chunks.attention <= max((1 << 15) // batch, 128) + 128 * (chunks.attention // chunks.products)
