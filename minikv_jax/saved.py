"""Caches in files: one safetensors file of arrays, and a manifest that says what they are.

The manifest has the format's version, the method, the number of sequences, a checksum of the arrays and, where they
were given, hashes of the model's weights and of the tokenizer. Shapes are not trusted: they are those that a cache of
this method has in the model it is loaded for.
"""

import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from minikv_jax import inputs, outputs
from minikv_jax.basis import Basis
from minikv_jax.cache import KVCache, shared_by
from minikv_jax.codec import Codec
from minikv_jax.config import Allocation, CacheConfig, Method, Rank
from minikv_jax.errors import CheckpointError, ConfigError, MiniKVError, shortened
from minikv_jax.inflow import Inflow
from minikv_jax.model import Params, as_model
from minikv_jax.prefill import cache_spec

FORMAT = 1
_KEY, _TOKENS = "minikv_cache", "tokens"
_MOST_SEQUENCES = 1 << 16


def save(
    cache: KVCache,
    path: str | os.PathLike[str],
    params: Params | None = None,
    tokenizer: Any = None,
    tokens: Int[Array, "B T"] | None = None,
) -> None:
    """Writes a cache into a file, bit for bit and in one step: after a kill there is the old file or the new.

    Args:
        cache: of sequences that share no prefix: save the prefix, and fork it after loading.
        path: of the file; its folder is made.
        params: the model. With it the file holds a hash of the weights, and is refused for other ones.
        tokenizer: likewise; one of transformers.
        tokens: [B, T] what was read, for `saved_tokens`.

    Raises:
        ConfigError: a fork, a tokenizer of another library, a path that cannot be written.
        PromptError: tokens of another shape or dtype.
    """
    if not isinstance(cache, KVCache):
        raise ConfigError(f"save was given a {type(cache).__name__}: give a cache.")
    if shared_by(cache):
        raise ConfigError("These sequences share a prefix: save the prefix, and fork it again after loading.")
    outputs.require_file(Path(path), "The file")
    arrays = {name: np.asarray(x) for name, x in _named(jax.device_get(cache)).items()}
    if tokens is not None:
        ids = np.asarray(inputs.integers(tokens, "tokens", "B T"))
        if ids.shape[0] != cache.lengths.shape[0]:
            raise ConfigError(f"tokens {ids.shape} are not those of {cache.lengths.shape[0]} sequences: give [B, T].")
        arrays[_TOKENS] = ids
    arrays = {name: _storable(x) for name, x in arrays.items()}
    manifest = {
        "format": FORMAT,
        "config": _encoded(cache.config),
        "sequences": cache.lengths.shape[0],
        "checksum": _checksum(arrays),
        "weights": None if params is None else hash_of_weights(params),
        "tokenizer": None if tokenizer is None else hash_of_tokenizer(tokenizer),
    }
    from safetensors.numpy import save_file

    with outputs.in_one_step(Path(path)) as scratch:
        save_file(arrays, scratch, {_KEY: json.dumps(manifest, allow_nan=False)})


def load_cache(path: str | os.PathLike[str], params: Params, tokenizer: Any = None) -> KVCache:
    """The cache in a file that `save` wrote, for a model. The file is mapped into memory while it is read.

    Args:
        path: of the file.
        params: the model.
        tokenizer: the model's, if the file is to be refused for another one.

    Raises:
        CheckpointError: no such file, a damaged one, or one of another version, model or tokenizer, or of a method that
            is not known here.
    """
    manifest, arrays = _opened(Path(path))
    arrays.pop(_TOKENS, None)
    config = _config(path, manifest)
    for what, given, hashed in (("weights", params, hash_of_weights), ("tokenizer", tokenizer, hash_of_tokenizer)):
        if given is not None and manifest[what] is not None and manifest[what] != hashed(given):
            raise CheckpointError(f"{path} was saved with another model's {what}: read the prompt again with this one.")
    try:
        like = cache_spec(params, config, manifest["sequences"])
    except MiniKVError as error:
        raise CheckpointError(f"{path} was saved from another model, and does not fit this one: {error}") from None
    named = _named(like)
    if missing := sorted(named.keys() ^ arrays.keys()):
        raise CheckpointError(f"{path} was saved from another model: only one of both has {shortened(missing[0])}.")
    leaves = [_restored(path, name, arrays[name], spec) for name, spec in named.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def saved_tokens(path: str | os.PathLike[str]) -> Int[np.ndarray, "B T"] | None:
    """The token ids that were saved with a cache, int32; None where none were.

    Raises:
        CheckpointError: no such file, or a damaged one.
    """
    tokens = _opened(Path(path))[1].get(_TOKENS)
    if tokens is not None and (tokens.ndim != 2 or tokens.dtype != np.int32):
        raise CheckpointError(f"{path} is damaged: its tokens are {tokens.dtype} {tokens.shape}.")
    return tokens


# ---- arrays --------------------------------------------------------------------------------------------------------


def _named(tree: Any) -> dict[str, Any]:
    """Every array of a cache, by its place in it."""
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _storable(x: np.ndarray) -> np.ndarray:
    """The array, or the bytes of one whose dtype NumPy itself does not have (bfloat16, float8)."""
    x = np.ascontiguousarray(x)
    return x if x.dtype.kind in "biuf" else x.view(np.uint8)


def _restored(path, name: str, x: np.ndarray, like: jax.ShapeDtypeStruct) -> Array:
    wanted = _storable(np.empty((0, *like.shape[1:]), like.dtype))
    if (x.dtype, x.shape) != (wanted.dtype, (*like.shape[:1], *wanted.shape[1:])):
        raise CheckpointError(
            f"{path} was saved from another model: at {name} it holds {x.dtype} {x.shape}, a cache of this model "
            f"{like.dtype} {like.shape}."
        )
    return jnp.array(x.view(like.dtype).reshape(like.shape))  # a copy: caches are made to be donated


def _checksum(arrays: Mapping[str, np.ndarray]) -> int:
    checksum = 0
    for name in sorted(arrays):
        checksum = zlib.crc32(arrays[name].reshape(-1).view(np.uint8), zlib.crc32(name.encode(), checksum))
    return checksum


def _opened(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The manifest and the arrays of a file.

    Raises:
        CheckpointError: no such file, one that `save` did not write, or that is damaged.
    """
    from safetensors import SafetensorError, safe_open

    from minikv_jax.models.refusing import refusing

    if not path.is_file():
        raise CheckpointError(f"{path} is no file: give one that `save` or `minikv prompt` wrote.")
    damaged = f"{path} is no saved cache, or a damaged one: save it again"
    with refusing(damaged, SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        with safe_open(path, framework="np") as file:
            manifest = json.loads(file.metadata()[_KEY])
            version = manifest["format"]
            if version != FORMAT or isinstance(version, bool):
                raise CheckpointError(f"{path} has format {shortened(version)}, not {FORMAT}: save the cache again.")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
        count = manifest["sequences"]
        if type(count) is not int or not 1 <= count <= _MOST_SEQUENCES:
            raise CheckpointError(f"{path} is damaged: it claims {shortened(count)} sequences.")
        if manifest["checksum"] != _checksum(arrays):
            raise CheckpointError(f"{path} is damaged: its arrays are not those that were saved. Save it again.")
        if missing := {"config", "weights", "tokenizer"} - manifest.keys():
            raise CheckpointError(f"{path} is damaged: its manifest has no {min(missing)}. Save it again.")
    return manifest, arrays


# ---- methods -------------------------------------------------------------------------------------------------------


def _encoded(value: Any) -> Any:
    """A config as JSON: each part is its class's name and its fields."""
    if dataclasses.is_dataclass(value):
        fields = {name: _encoded(field) for name, field in vars(value).items()}
        return {"part": type(value).__name__, **fields}
    return [_encoded(x) for x in value] if isinstance(value, tuple) else value


def _parts() -> dict[str, type]:
    """The classes that configs are made of: those of this library, and what has been derived from them."""
    found, waiting = [CacheConfig, Method, Rank, Allocation, Codec], [Inflow, Basis]
    while waiting:
        found.append(waiting.pop())
        waiting += found[-1].__subclasses__()
    return {part.__name__: part for part in found}


def _decoded(value: Any, parts: Mapping[str, type]) -> Any:
    if isinstance(value, list):
        return tuple(_decoded(x, parts) for x in value)
    if not isinstance(value, dict):
        return value
    fields = {name: _decoded(x, parts) for name, x in value.items() if name != "part"}
    if value.get("part") not in parts:
        raise ConfigError(f"it has a part {shortened(value.get('part'))}, which is not known here")
    return parts[value["part"]](**fields)


def _config(path, manifest: Mapping[str, Any]) -> CacheConfig:
    import minikv_jax.presets  # noqa: F401, whose methods' parts are then known

    try:
        config = _decoded(manifest["config"], _parts())
    except (MiniKVError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} was saved with a method that this version does not have: {error}") from None
    if not isinstance(config, CacheConfig) or config.prompt_capacity is None:
        raise CheckpointError(f"{path} is damaged: its method is {shortened(manifest['config'])}.")
    return config


# ---- hashes --------------------------------------------------------------------------------------------------------


def hash_of_weights(params: Params) -> str:
    """A hash of a model's weights, in the dtype in which they are held; computed where they are."""
    found = [(x.shape, str(x.dtype), np.asarray(_fingerprint(x)).tolist()) for x in jax.tree.leaves(as_model(params))]
    return hashlib.sha256(repr(found).encode()).hexdigest()


@jax.jit
def _fingerprint(x: Array) -> Int[Array, "2"]:
    """Two sums over all bits of an array, modulo 2**32, that depend on their places."""
    width = jnp.dtype(x.dtype).itemsize
    bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16}.get(width, jnp.uint32))
    bits = bits.reshape(-1).astype(jnp.uint32) + jnp.uint32(1)
    place = jax.lax.iota(jnp.uint32, bits.size) * jnp.uint32(2654435761) | jnp.uint32(1)
    mixed = (bits ^ (bits >> 15)) * jnp.uint32(2246822519)
    return jnp.stack([jnp.sum(bits * place), jnp.sum((mixed ^ (mixed >> 13)) * place)])


def hash_of_tokenizer(tokenizer: Any) -> str:
    """A hash of a tokenizer of transformers: its whole pipeline and its chat template.

    Raises:
        ConfigError: a tokenizer of another library.
    """
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ConfigError(f"A {type(tokenizer).__name__} has no tokenizers.Tokenizer to hash: give a fast tokenizer.")
    text = tokenizer.backend_tokenizer.to_str() + repr(tokenizer.chat_template)
    return hashlib.sha256(text.encode()).hexdigest()
