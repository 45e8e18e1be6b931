"""What a run will take of a device's memory, from shapes alone, and the longest prompt that fits."""

import dataclasses
import math
import re

from minikv_jax.config import CacheConfig
from minikv_jax.errors import ConfigError, shortened
from minikv_jax.models.checkpoint import parameter_shapes
from minikv_jax.models.config import ModelConfig
from minikv_jax.report import planned_report

# Beside weights, cache and one layer: what prompts of up to 32,768 tokens took on a GPU (`peak_over_planned` in
# examples/results/e2e.json).
WORKSPACE = 256 << 20
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes of a run in bfloat16: of the weights, of the caches of the whole batch, of the dense keys and values of the
    layer that is compressed, and of what the programs need beside them."""

    weights: int
    cache: int
    layer: int
    workspace: int = WORKSPACE

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.layer + self.workspace


def plan(model: ModelConfig, config: CacheConfig, prompt: int, generated: int, batch: int = 1) -> Plan:
    """What prompts of `prompt` tokens and answers of `generated` ones take, `batch` of them at once.

    Raises:
        ConfigError: numbers of tokens or sequences that are none, or a method that the model cannot run.
    """
    if batch < 1:
        raise ConfigError(f"batch={batch}: give a whole number of sequences, at least 1.")
    size = 2  # of bfloat16
    return Plan(
        weights=size * sum(math.prod(shape) for _, shape in parameter_shapes(model)),
        cache=batch * planned_report(model, config, prompt, generated).total.bytes_held,
        layer=batch * size * 2 * prompt * model.num_kv_heads * model.head_dim,
    )


def longest_prompt(model: ModelConfig, config: CacheConfig, memory: int, generated: int, batch: int = 1) -> int:
    """The most tokens of a prompt that fit `memory` bytes and the model's positions; 0: none do."""
    low, high = 0, model.max_position_embeddings - generated
    while low < high:
        middle = (low + high + 1) // 2
        if plan(model, config, middle, generated, batch).total <= memory:
            low = middle
        else:
            high = middle - 1
    return max(low, 0)


def bytes_of(text: str) -> int:
    """Bytes of a memory's size as people write it: 24GB, 80GiB, 512 MiB.

    Raises:
        ConfigError: it is no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if found is None or found[2] not in _UNITS:
        raise ConfigError(f"{shortened(text)} is no size of a memory: write it as 24GB or 80GiB.")
    return int(float(found[1]) * _UNITS[found[2]])
