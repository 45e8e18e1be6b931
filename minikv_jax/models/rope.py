"""Rotary frequencies, and how they are stretched for contexts longer than the pretraining one."""

import math
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np

from minikv_jax.errors import UnsupportedModelError, shortened
from minikv_jax.models.entries import is_number


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than the pretraining one.

    `linear` divides every frequency by `factor`. `llama3` divides those whose wavelength exceeds
    `original_max_position_embeddings / low_freq_factor`, keeps those below
    `original_max_position_embeddings / high_freq_factor`, and blends in between.

    Raises:
        UnsupportedModelError: for another kind, or values that are missing or not positive.
    """

    kind: Literal["llama3", "linear"]
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("llama3", "linear"):
            raise UnsupportedModelError(
                f"Rope scaling of type {shortened(self.kind)} is not supported; supported: 'default', 'linear', "
                "'llama3'."
            )
        needed = ["factor"]
        if self.kind == "llama3":
            needed += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
        for name in needed:
            value = getattr(self, name)
            if not is_number(value) or value <= 0:
                raise UnsupportedModelError(
                    f"Rope scaling {self.kind!r}: {name} must be a positive number, got {shortened(value)}."
                )
        if self.kind == "llama3" and (self.high_freq_factor or 0) <= (self.low_freq_factor or 0):
            raise UnsupportedModelError(
                f"Rope scaling 'llama3': high_freq_factor ({self.high_freq_factor}) must exceed "
                f"low_freq_factor ({self.low_freq_factor})."
            )


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Rotary frequencies in radians a position, [head_dim / 2] float32, with LLaMA 3.1's or linear scaling applied."""
    frequency = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return frequency.astype(np.float32)
    if scaling.kind == "linear":
        return (frequency / scaling.factor).astype(np.float32)
    # LLaMA 3.1: waves longer than the original context are stretched by the factor, short ones stay, and those in
    # between are blended by how many of their periods fit the original context.
    numbers = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings
    low, high, original = cast(tuple[float, float, int], numbers)  # which llama3 always has
    blend = (original * frequency / (2 * math.pi) - low) / (high - low)
    blend = np.clip(blend, 0.0, 1.0)
    return ((1 - blend) * frequency / scaling.factor + blend * frequency).astype(np.float32)
