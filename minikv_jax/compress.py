"""From one layer's prompt to its cache."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from minikv_jax import basis, rank, segments
from minikv_jax.allocate import Budget
from minikv_jax.cache import LayerCache, Prompt, Readers, Shape, is_counter
from minikv_jax.config import Method
from minikv_jax.segments import DenseSegment
from pallas_kernels.rows import below

# Numbers of a layer's keys that are compressed at once.
_AT_ONCE = 1 << 26


def compress(
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K V"],
    scores: Float[Array, "B K T"],
    readers: Readers,
    lengths: Int[Array, "B"],
    budget: Budget,
    method: Method,
    shape: Shape,
    dtype: DTypeLike | None = None,
) -> LayerCache:
    """One layer's keys and values of the prompt, as the method keeps them.

    Args:
        key, value: of the prompt, after rotary embedding.
        scores: attention received (`Method.score_rows`); ignored by ranks by position.
        readers: of the prompt; ignored by methods without balance and feedback.
        lengths: true prompt lengths.
        budget: of the first tier (`allocate.budgets`).
        method: the layer's.
        shape: static capacities (`Shape.of`).
        dtype: of dense rows; None: that of the keys.
    """
    present = below(lengths, key.shape[1])
    dtype = dtype or key.dtype
    # Padding may hold anything; zeros keep NaN out of everything stored.
    key, value = (jnp.where(present[..., None, None], x, 0) for x in (key, value))
    if method.keeps_all_as_it_is:
        # Filled up before it is turned: one pass makes the segment, and nothing as large lies beside it.
        key, value = (jnp.swapaxes(segments.fit(x.astype(dtype), shape.first, axis=1), 1, 2) for x in (key, value))
        return LayerCache(DenseSegment(key, value, jnp.array(lengths)), method)
    key, value = (jnp.swapaxes(x, 1, 2) for x in (key, value))
    scores = rank.refine(scores, value, lengths, budget.recent, method.rank)
    frames, key, value, moments = basis.fit(method.bases, key, value, readers.moments, lengths, method.first_encoded)
    balances = any(codec.balance for codec in method.codecs)
    balance = channel_balance(readers.loudest, key) if balances else None
    prompt = Prompt(key, value, scores, lengths, budget, balance, moments.query, readers.latest, dtype, shape)
    layer = method.inflow.begin(prompt, method)
    return dataclasses.replace(layer, frames=frames)


def channel_balance(loudest: Float[Array, "B K H"], key: Float[Array, "B K T H"]) -> Float[Array, "B K H"]:
    """b = sqrt(max |query| / max |key|) of each channel over the prompt (MiKV equation 2)."""
    loudest_key = jnp.abs(key).max(axis=2).astype(jnp.float32)
    return jnp.sqrt(jnp.maximum(loudest, 1e-5) / jnp.maximum(loudest_key, 1e-5))


@functools.partial(jax.jit, static_argnames=("method", "shape", "dtype", "at_once"))
def compress_in_pieces(
    key, value, scores, readers, lengths, budget, method: Method, shape: Shape, dtype=None, at_once: int = _AT_ONCE
) -> LayerCache:
    """`compress`, for long prompts sequence by sequence and some heads at a time: it ranks and casts what it is given.

    Arguments are those of `compress`; `at_once` bounds the numbers of the keys in one piece of work.
    """
    arrays = key, value, scores, readers
    static: dict[str, Any] = {"method": method, "shape": shape, "dtype": dtype}
    b, tokens, heads, head_size = key.shape
    if method.keeps_all_as_it_is:  # one pass over each
        return compress(*arrays, lengths, budget, **static)

    def some_heads(arrays, lengths, budget):
        together = max(at_once // (arrays[0].shape[0] * tokens * head_size), 1)
        # Q-Hitter's mix looks at all heads of a layer.
        if together >= heads or method.rank.attention_weight < 1:
            return compress(*arrays, lengths=lengths, budget=budget, **static)
        together = even_share(heads, together)

        def one(first):
            def some(x, axis):
                return jax.lax.dynamic_slice_in_dim(x, first, together, axis)

            key, value = (some(x, 2) for x in arrays[:2])
            scores, readers = jax.tree.map(lambda x: some(x, 1), arrays[2:])
            return compress(key, value, scores, readers, lengths, budget, **static)

        # Each part is a layer of some heads, in front of whose axes is that of the parts; counters are all alike.
        parts = jax.lax.map(one, starts(heads, together))
        return jax.tree.map(lambda x: x[0] if is_counter(x[0]) else _joined_heads(x), parts)

    if b == 1 or key.size <= at_once:
        return some_heads(arrays, lengths, budget)

    def one_sequence(arguments):
        return some_heads(*jax.tree.map(lambda x: x[None], arguments))

    caches = jax.lax.map(one_sequence, (arrays, lengths, budget))
    return jax.tree.map(lambda x: x[:, 0], caches)


def even_share(count: int, most: int) -> int:
    """The largest divisor of `count` up to `most`: shares of one size need one program."""
    return next(n for n in range(most, 0, -1) if count % n == 0)


def starts(size: int, step: int) -> Int[Array, "pieces"]:
    """Where pieces of `step` rows begin."""
    return jnp.arange(0, size, step, dtype=jnp.int32)


def _joined_heads(x):
    """[parts, B, K, ...] -> [B, parts K, ...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


@functools.partial(jax.jit, static_argnames=("shapes",))
def cut(layer: LayerCache, shapes: tuple[tuple[int, ...], ...]) -> LayerCache:
    """The layer's arrays cut to these shapes."""
    leaves, structure = jax.tree.flatten(layer)
    return jax.tree.unflatten(structure, [x[tuple(slice(n) for n in shape)] for x, shape in zip(leaves, shapes)])
