"""What `minikv doctor` says: device, versions, which kernels run here and why others do not, and known weights."""

import importlib.metadata
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from minikv_jax import __version__
from minikv_jax.models.hub import installed_models
from pallas_kernels.packed_append.api import packed_append
from pallas_kernels.packed_decode.api import packed_decode_attention
from pallas_kernels.packed_decode.layout import BLOCK, PackedTensor
from pallas_kernels.two_pass_attention.api import two_pass_attention

PACKAGES = ("jax", "jaxlib", "flax", "transformers", "tokenizers", "triton", "jax-triton", "matplotlib")
_HEADS, _QUERY_HEADS, _HEAD_SIZE = 2, 8, 128


class Findings(NamedTuple):
    """
    Attributes:
        device: as JAX names it, with its platform and how many there are.
        versions: of this library, Python and packages; None for packages that are not installed.
        kernels: by operation and implementation, why it does not run here; None: it runs. The first that runs is the
            one taken by default.
        models: known by name, and the path of the weights; None where they are not there yet.
    """

    device: str
    versions: dict[str, str | None]
    kernels: dict[str, dict[str, str | None]]
    models: Mapping[str, Path | None]


def examine() -> Findings:
    """Looks at this machine; nothing is compiled, run or downloaded."""
    devices = jax.devices()
    return Findings(
        device=f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        versions={"minikv-jax": __version__, "python": platform.python_version()}
        | {name: _version(name) for name in PACKAGES},
        kernels={
            "prefill attention with scores": _tried(_prefill, ("mosaic_gpu", "triton", "xla")),
            "decode attention over codes": _tried(_decode, ("triton", "mosaic_gpu", "xla")),
            "append and encode": _tried(_append, ("triton", "xla")),
        },
        models=installed_models(),
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _tried(operation: Callable[[str], object], implementations: tuple[str, ...]) -> dict[str, str | None]:
    """Why each implementation declines the operation; None: it does not."""
    return {name: _reason(operation, name) for name in implementations}


def _reason(operation: Callable[[str], object], name: str) -> str | None:
    try:
        jax.eval_shape(lambda: operation(name))
    except NotImplementedError as reason:
        return str(reason).partition(f"{name}: ")[2] or str(reason)
    return None


def _rows(tokens: int, heads: int = _HEADS) -> jax.Array:
    return jnp.zeros((1, tokens, heads, _HEAD_SIZE), jnp.bfloat16)


def _prefill(name: str):
    return two_pass_attention(_rows(BLOCK, _QUERY_HEADS), _rows(BLOCK), _rows(BLOCK), implementation=name)


def _packed() -> tuple[PackedTensor, PackedTensor]:
    """Keys and values in two bits, groups of 64, as `minikv_plus` holds them."""
    scale, codes = jnp.zeros((1, _HEADS, 1, 2, BLOCK), jnp.float16), jnp.zeros((1, _HEADS, 1, 32, BLOCK), jnp.uint8)
    keys = PackedTensor(codes, scale, scale, 2, 64, "tokens", False)
    return keys, PackedTensor(codes.mT, scale, scale, 2, 64, "channels", True)


def _decode(name: str):
    lengths = jnp.full(1, BLOCK, jnp.int32)
    return packed_decode_attention(_rows(1, _QUERY_HEADS), *_packed(), lengths, implementation=name)


def _append(name: str):
    new, window = (jnp.zeros((1, _HEADS, rows, _HEAD_SIZE), jnp.bfloat16) for rows in (1, BLOCK))
    zero, accept = jnp.zeros(1, jnp.int32), jnp.ones(1, bool)
    return packed_append(new, new, accept, window, window, zero, *_packed(), zero, implementation=name)
