"""Rotary frequencies, and how they are stretched for contexts longer than the pretraining one."""

import math
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np

from minikv_jax.errors import UnsupportedModelError, shortened
from minikv_jax.models.entries import is_number

KINDS = ("linear", "llama3", "yarn", "dynamic")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than the pretraining one.

    `linear` divides every frequency by `factor`. `llama3` divides those whose wavelength exceeds
    `original_max_position_embeddings / low_freq_factor`, keeps those below
    `original_max_position_embeddings / high_freq_factor`, and blends in between. `yarn` (arXiv 2309.00071, sections 3.2
    to 3.4) keeps the channels that turn `beta_fast` times or more within the original length, divides those that turn
    `beta_slow` times or less, blends in between by the channel's number, with the two borders rounded outwards unless
    `truncate` is false, and multiplies queries and keys by `attention_factor`, by default `0.1 ln(factor) + 1`.
    `dynamic` changes nothing within the original length; beyond it the frequencies would depend on a text's length, and
    the keys of a cache with them, so models end there.

    Raises:
        UnsupportedModelError: for another kind, or values that are missing or not positive.
    """

    kind: Literal["llama3", "linear", "yarn", "dynamic"]
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UnsupportedModelError(
                f"Rope scaling of type {shortened(self.kind)} is not supported; supported: 'default', "
                f"{', '.join(map(repr, KINDS))}."
            )
        needed: dict[str, float | None] = {
            "factor": self.factor,
            "beta_fast": self.beta_fast,
            "beta_slow": self.beta_slow,
        }
        if self.kind == "llama3":
            needed |= {"low_freq_factor": self.low_freq_factor, "high_freq_factor": self.high_freq_factor}
        if self.kind in ("llama3", "yarn"):
            needed["original_max_position_embeddings"] = self.original_max_position_embeddings
        if self.attention_factor is not None:
            needed["attention_factor"] = self.attention_factor
        for name, value in needed.items():
            if value is None or not is_number(value) or value <= 0:
                raise UnsupportedModelError(
                    f"Rope scaling {self.kind!r}: {name} must be a positive number, got {shortened(value)}."
                )
        if self.kind == "llama3" and (self.high_freq_factor or 0) <= (self.low_freq_factor or 0):
            raise UnsupportedModelError(
                f"Rope scaling 'llama3': high_freq_factor ({self.high_freq_factor}) must exceed "
                f"low_freq_factor ({self.low_freq_factor})."
            )
        if self.beta_fast < self.beta_slow:
            raise UnsupportedModelError(
                f"Rope scaling {self.kind!r}: beta_fast ({self.beta_fast}) must be at least beta_slow "
                f"({self.beta_slow})."
            )

    @property
    def magnitude(self) -> float:
        """What rotated queries and keys are multiplied by."""
        if self.kind != "yarn":
            return 1.0
        return self.attention_factor or yarn_magnitude(self.factor)


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """YaRN's `0.1 weight ln(factor) + 1`, of which attention's temperature is the inverse square (section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Rotary frequencies in radians a position, [head_dim / 2] float32, stretched as `scaling` says."""
    frequency = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None or scaling.kind == "dynamic":
        return frequency.astype(np.float32)
    kept = {"linear": _kept_by_linear, "llama3": _kept_by_llama3, "yarn": _kept_by_yarn}[scaling.kind]
    share = kept(frequency, theta, scaling)
    return ((1 - share) * frequency / scaling.factor + share * frequency).astype(np.float32)


def _kept_by_linear(frequency: np.ndarray, theta: float, scaling: RopeScaling) -> np.ndarray:
    return np.zeros_like(frequency)


def _kept_by_llama3(frequency: np.ndarray, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Waves longer than the original context are stretched by the factor, short ones stay, and those in between are
    blended by how many of their periods fit the original context."""
    numbers = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings
    low, high, original = cast(tuple[float, float, int], numbers)  # which llama3 always has
    return np.clip((original * frequency / (2 * math.pi) - low) / (high - low), 0.0, 1.0)


def _kept_by_yarn(frequency: np.ndarray, theta: float, scaling: RopeScaling) -> np.ndarray:
    """The same, blended by the channel's number."""
    original, channels = cast(int, scaling.original_max_position_embeddings), len(frequency)

    def channel(turns: float) -> float:
        """The channel, a fraction, that turns so often within the original context."""
        return channels * math.log(original / (2 * math.pi * turns)) / math.log(theta)

    first, last = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * channels - 1)
    last = last + 0.001 if first == last else last
    return 1 - np.clip((np.arange(channels) - first) / (last - first), 0.0, 1.0)
