"""LoRC and CSKV in plain loops: low-rank products, progressive ranks, and attention over rebuilt keys and values."""

import math
from dataclasses import dataclass

import numpy as np

from .quantiser import roundtrip_per_token


def nearest(weights: np.ndarray, rank: int, loudness: np.ndarray | None = None) -> np.ndarray:
    """The matrix of this rank that is nearest to [D, KH] weights, each row of the error times its loudness."""
    scale = np.ones(len(weights)) if loudness is None else loudness
    left, singular, right = np.linalg.svd(scale[:, None] * weights)
    found = np.zeros(weights.shape)
    for i in range(rank):
        found += singular[i] * np.outer(left[:, i], right[i])
    return found / scale[:, None]


def ranks(conditions: list[float], least: float, most: float) -> list[float]:
    """LoRC's: linear in the logarithm of the product of all condition numbers from the layer to the last one."""
    products = [math.prod(conditions[layer:]) for layer in range(len(conditions))]
    logs = [math.log(product) for product in products]
    return [least + (most - least) * (log - min(logs)) / (max(logs) - min(logs)) for log in logs]


def rotated(x: np.ndarray, position: int, theta: float) -> np.ndarray:
    """Rotary embedding of one head; channel i pairs with channel i + H / 2."""
    half = len(x) // 2
    out = np.empty(len(x))
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


@dataclass
class Weights:
    """One layer's matrices [D, N H], [D, K H] with biases, and the products (A, B) in the place of the last two."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    biases: tuple[np.ndarray, np.ndarray, np.ndarray]
    key_product: tuple[np.ndarray, np.ndarray]
    value_product: tuple[np.ndarray, np.ndarray]


def attention(
    x: np.ndarray, weights: Weights, size: int, theta: float, window: int, bits: int = 16, group: int = 16
) -> np.ndarray:
    """What the last of the tokens x [T, D] attends to: [N, H]. The newest `window` tokens have their own keys and
    values, all others (x A) B, where x A may have gone through a quantiser.
    """
    last = len(x) - 1
    query = (x[last] @ weights.query + weights.biases[0]).reshape(-1, size)
    keys, values = [], []
    for position, row in enumerate(x):
        pair = []
        for whole, (down, up) in ((weights.key, weights.key_product), (weights.value, weights.value_product)):
            latent = row @ down
            if bits < 16:
                latent = roundtrip_per_token(latent[None], bits, group)[0]
            pair.append(row @ whole if last - position < window else latent @ up)
        key, value = ((y + bias).reshape(-1, size) for y, bias in zip(pair, weights.biases[1:]))
        keys.append([rotated(head, position, theta) for head in key])
        values.append(value)
    output = []
    for n, head in enumerate(query):
        k = n * len(keys[0]) // len(query)
        turned = rotated(head, last, theta)
        logits = np.array([turned @ key[k] / math.sqrt(size) for key in keys])
        share = np.exp(logits - logits.max())
        output.append(sum(p * value[k] for p, value in zip(share / share.sum(), values)))
    return np.array(output)
