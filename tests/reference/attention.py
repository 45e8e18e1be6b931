"""Exact attention, the scores that methods rank tokens by, and attention over what one head still holds. All in
float64.
"""

from dataclasses import dataclass

import numpy as np


@dataclass
class View:
    """What one kv head's attention reads, oldest token first: `positions [S]`, `keys [S, H]`, `values [S, H]`."""

    positions: np.ndarray
    keys: np.ndarray
    values: np.ndarray


def softmax(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis; entries of minus infinity get zero."""
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def causal_probabilities(query: np.ndarray, key: np.ndarray, scale: float | None = None) -> np.ndarray:
    """`[N, T, T]`: causal softmax of every query head; query head n reads kv head n // (N / K) (section 1.1)."""
    length, query_heads, size = query.shape
    group = query_heads // key.shape[1]
    factor = size**-0.5 if scale is None else scale
    future = np.triu(np.ones((length, length), bool), k=1)
    out = np.zeros((query_heads, length, length))
    for n in range(query_heads):
        logits = query[:, n].astype(np.float64) @ key[:, n // group].astype(np.float64).T * factor
        out[n] = softmax(np.where(future, -np.inf, logits))
    return out


def causal_attention(query: np.ndarray, key: np.ndarray, value: np.ndarray, scale: float | None = None) -> np.ndarray:
    """`[T, N, H]`: exact prefill attention, which no method changes (section 1.4)."""
    group = query.shape[1] // key.shape[1]
    probabilities = causal_probabilities(query, key, scale)
    return np.stack([p @ value[:, n // group].astype(np.float64) for n, p in enumerate(probabilities)], axis=1)


def column_sums(query: np.ndarray, key: np.ndarray, scale: float | None = None) -> np.ndarray:
    """`[K, T]`: attention every prompt token got, summed over all query rows and the query heads of its kv head
    (section 1.1).
    """
    per_head = causal_probabilities(query, key, scale).sum(axis=1)
    return per_head.reshape(key.shape[1], query.shape[1] // key.shape[1], len(key)).sum(axis=1)


def pool(x: np.ndarray, kernel: int, how: str) -> np.ndarray:
    """Pooling of stride 1 over the last axis, zeros on both sides; an average counts those zeros (section 4.2)."""
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"the pooling kernel must be odd, got {kernel}")
    side = kernel // 2
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(side, side)])
    windows = np.stack([padded[..., i : i + x.shape[-1]] for i in range(kernel)])
    if how == "avg":
        return windows.sum(axis=0) / kernel
    if how == "max":
        return windows.max(axis=0)
    raise ValueError(f"pooling must be 'avg' or 'max', got {how!r}")


def window_scores(
    query: np.ndarray, key: np.ndarray, window: int, kernel: int = 5, pooling: str = "avg", scale: float | None = None
) -> np.ndarray:
    """`[K, T - window]`: attention of the last `window` queries to the tokens before them, summed over the group,
    then pooled (4.2).
    """
    length, kv_heads = key.shape[:2]
    rows = causal_probabilities(query, key, scale)[:, length - window :, : length - window]
    per_kv_head = rows.sum(axis=1).reshape(kv_heads, query.shape[1] // kv_heads, length - window).sum(axis=1)
    return pool(per_kv_head, kernel, pooling)


def attend(query: np.ndarray, views: list[View], scale: float | None = None) -> tuple[np.ndarray, list[np.ndarray]]:
    """One decode step: the output `[N, H]`, and for every kv head the attention its tokens got `[S]`, summed over its
    query heads.
    """
    query_heads, size = query.shape
    group = query_heads // len(views)
    factor = size**-0.5 if scale is None else scale
    output = np.zeros((query_heads, views[0].values.shape[-1]))
    received = [np.zeros(len(view.positions)) for view in views]
    for n in range(query_heads):
        view = views[n // group]
        weights = softmax(view.keys @ query[n].astype(np.float64) * factor)
        output[n] = weights @ view.values
        received[n // group] += weights
    return output, received
