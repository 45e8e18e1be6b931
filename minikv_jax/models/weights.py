"""Opens checkpoints of either format, and builds models from them.

Every tensor comes out under one name and in one layout, whatever the file: projections are `[in, out]` (the transpose
of Hugging Face's, and faster on CPUs), query and key rows are in the half-split order of `rotate_half`. Files are read
with plain reads rather than memory maps, in blocks of a few MB, so loading needs little more memory than the weights.

Nothing in a file is trusted: every count and offset is checked against the file's size before anything is allocated.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from minikv_jax.errors import CheckpointError
from minikv_jax.models.checkpoint import Checkpoint, float_dtype, parameter_shapes
from minikv_jax.models.foreign import refuse_other_contents
from minikv_jax.models.gguf_file import open_gguf
from minikv_jax.models.hf_folder import open_folder
from minikv_jax.models.hub import given_path, locate
from minikv_jax.models.wording import listed

if TYPE_CHECKING:
    from minikv_jax.models.llama import Llama

Progress = Callable[[int, int], None]

# Tensors that follow each other and are one matrix (or bias) of the model, side by side, by the first one's name.
_JOINED = {
    "query": ("query_key_value", 3),
    "gate": ("gate_up", 2),
    "query_bias": ("query_key_value_bias", 3),
    "router": ("experts.router", 1),
    "expert_gate": ("experts.gate_up", 2),
    "expert_down": ("experts.down", 1),
}


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Checks a checkpoint's headers without reading its weights, but for head and embedding where both could be tied.

    Args:
        path: a Hugging Face folder (config.json with model.safetensors, or shards and their index), or a GGUF file.

    Returns:
        The configuration and the tensors, every name and shape checked.

    Raises:
        CheckpointError: if files are missing, truncated or damaged, are pickles, or do not fit the configuration.
        UnsupportedModelError: if the model is sound but of a kind this library cannot run.
    """
    path = given_path(path)
    try:
        if path.is_dir():
            return open_folder(path)
        if not os.path.exists(path):
            raise CheckpointError(f"{path} does not exist; expected a Hugging Face folder or a GGUF file.")
        refuse_other_contents(path)
        if path.suffix == ".safetensors":
            raise CheckpointError(f"{path} is a single file; pass its folder, which must hold config.json too.")
        return open_gguf(path)
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error}") from error


def load_model(
    path: str | os.PathLike[str], dtype: DTypeLike | None = None, progress: Progress | None = None
) -> "Llama":
    """Builds a model from a checkpoint, reading one tensor at a time so that nothing is held twice.

    Args:
        path: a Hugging Face folder, a GGUF file, or a name, as for `locate`.
        dtype: float32, bfloat16 or float16; by default float32 on CPU and bfloat16 on other devices.
        progress: called with the bytes of weights loaded so far and in all.

    Returns:
        The model with its parameters on JAX's default device. A UserWarning says so where a model has other parts
        than text, which are left out.

    Raises:
        CheckpointError, UnsupportedModelError: as `open_checkpoint` and `Checkpoint.tensors` do.
    """
    from flax import nnx

    from minikv_jax.models.llama import Llama

    checkpoint = open_checkpoint(locate(path))
    if checkpoint.left_out:
        warnings.warn(
            f"{checkpoint.path}: only the language model is loaded; {len(checkpoint.left_out)} tensors of other parts "
            f"({listed(checkpoint.left_out, 2)}) are left out.",
            stacklevel=2,
        )
    default = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    target = float_dtype(default if dtype is None else dtype)
    model = nnx.eval_shape(lambda: Llama(checkpoint.config, param_dtype=target, rngs=nnx.Rngs(0)))
    whole = checkpoint.path.absolute()
    model.home = str(whole if whole.is_dir() else whole.parent)
    total = sum(math.prod(shape) for _, shape in parameter_shapes(checkpoint.config)) * target.itemsize
    done = 0
    for name, array in _as_the_model_has_them(checkpoint.tensors(target)):
        parameter = _find_parameter(model, name)
        if parameter.get_value().shape != array.shape:
            raise CheckpointError(f"{name} has shape {array.shape}; the model expects {parameter.get_value().shape}.")
        # Waiting keeps at most one host copy alive where transfers are asynchronous.
        parameter.set_value(jax.block_until_ready(jax.device_put(array)))
        done += array.nbytes
        if progress is not None:
            progress(done, total)
    return model


def _as_the_model_has_them(tensors: Iterator[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors in the order of `parameter_shapes`, those of `_JOINED` as `LlamaLayer` has them."""
    for name, array in tensors:
        layer, _, first = name.rpartition(".")
        if first in _JOINED:
            joined, count = _JOINED[first]
            others = [x for _, x in islice(tensors, count - 1)]
            name, array = f"{layer}.{joined}", np.concatenate([array, *others], axis=-1)
        yield name, array


def _find_parameter(model: Any, name: str) -> Any:
    for part in name.split("."):
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return model
