"""What a model is and how large, said before its weights are read, or downloaded."""

import math
import os
from dataclasses import dataclass

from minikv_jax.models import hf_hub
from minikv_jax.models.checkpoint import parameter_shapes
from minikv_jax.models.config import ModelConfig
from minikv_jax.models.hub import given_path, locate
from minikv_jax.models.weights import open_checkpoint


@dataclass(frozen=True)
class Description:
    """What would be loaded.

    Attributes:
        config: its sizes and switches.
        parameters: how many numbers it has.
        stored: bytes of its weights in files, by type; none where only a description was looked at.
        left_out: how many tensors of other parts than the language model are left out.
    """

    config: ModelConfig
    parameters: int
    stored: dict[str, int]
    left_out: int


def describe(path_or_name: str | os.PathLike[str]) -> Description:
    """Checks a model as loading would, without reading weights; of one on the hub its config.json alone is looked at.

    Args:
        path_or_name: as for `load`.

    Raises:
        CheckpointError, UnsupportedModelError: as `load` does, for what shows without the weights.
    """
    remote = hf_hub.parsed(os.fspath(path_or_name))
    if remote is not None and remote.file is None and not os.path.exists(given_path(path_or_name)):
        config = hf_hub.description(remote)[0]
        return Description(config, _parameters(config), {}, 0)
    checkpoint = open_checkpoint(locate(path_or_name))
    return Description(
        checkpoint.config, _parameters(checkpoint.config), checkpoint.stored_bytes(), len(checkpoint.left_out)
    )


def _parameters(config: ModelConfig) -> int:
    return sum(math.prod(shape) for _, shape in parameter_shapes(config))
