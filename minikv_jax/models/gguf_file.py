"""GGUF files: their metadata and their list of tensors."""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minikv_jax.errors import CheckpointError, UnsupportedModelError, shortened
from minikv_jax.models.checkpoint import Checkpoint, Names, paired, settle_tie
from minikv_jax.models.config import ModelConfig
from minikv_jax.models.entries import Entries
from minikv_jax.models.families import FAMILIES
from minikv_jax.models.folding import scales
from minikv_jax.models.foreign import refuse_other_contents
from minikv_jax.models.gguf_config import multipliers
from minikv_jax.models.gguf_header import read_header
from minikv_jax.models.rope import RopeScaling
from minikv_jax.models.stored import DTYPES, QUANTIZED, Stored
from minikv_jax.models.wording import listed

_MAX_PARTS = 1000  # ten times as many as the largest published models have


def read_gguf_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The key-value pairs of a GGUF file, or of the first part of one that was split: numbers and short texts as Python
    values, the others still `Unread`.

    Raises:
        CheckpointError: if the file is missing, is not GGUF, or is damaged.
    """
    path = Path(path)
    try:
        refuse_other_contents(path)
        return read_header(_parts(path, read_header(path).metadata)[0]).metadata
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error}") from error


def open_gguf(path: Path) -> Checkpoint:
    parts = _parts(path, read_header(path).metadata)
    metadata, stored = _read_gguf(parts[0])
    for part in parts[1:]:
        for name, tensor in _read_gguf(part)[1].items():
            if name in stored:
                raise CheckpointError(f"Tensor {shortened(name)} is in {stored[name].path} and in {part.name}.")
            stored[name] = tensor
    try:
        config = ModelConfig.from_gguf(metadata)
    except (CheckpointError, UnsupportedModelError) as error:
        raise type(error)(f"{path}: {error}") from error
    ends = {"embedding": "token_embd.weight", "norm": "output_norm.weight", "head": "output.weight"}
    config, ends = settle_tie(config, stored, ends)
    config = config.replace(
        tie_word_embeddings=config.tie_word_embeddings and ends["embedding"] in stored,
        query_key_value_bias=config.query_key_value_bias or "blk.0.attn_q.bias" in stored,
        rope_scaling=_rope_scaling(config, stored.get("rope_freqs.weight")),
    )
    ignored = {"rope_freqs.weight"} | ({"token_embd.weight"} if config.tie_word_embeddings else set())
    family = FAMILIES[config.architecture]
    names = Names(ends, family.gguf_layer, "blk")
    folded = scales(multipliers(metadata), config.head_dim, config.tie_word_embeddings)
    return paired(path, config, stored, names, ignored, "gguf" in family.interleaved, folded)


def _parts(path: Path, metadata: Mapping[str, Any]) -> list[Path]:
    """All files of a model that llama.cpp split, the first one first; the file itself where it is whole."""
    count = Entries(metadata, f"{path}: GGUF metadata").integer("split.count", 1)
    if count in (0, 1):
        return [path]
    named = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", path.name)
    if named is None or int(named[2]) != count or count > _MAX_PARTS:
        raise CheckpointError(
            f"{path} is one of {count} parts, which llama.cpp calls NAME-00001-of-{count:05}.gguf and so on: give the "
            "parts back their names, or merge them (llama-gguf-split --merge)."
        )
    parts = [path.with_name(f"{named[1]}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise CheckpointError(f"{path} is one of {count} parts, of which {listed(missing)} are missing beside it.")
    for part in parts:
        refuse_other_contents(part)
    return parts


def _read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    from gguf import GGMLQuantizationType

    header, size = read_header(path), path.stat().st_size
    alignment = Entries(header.metadata, f"{path}: GGUF metadata").integer("general.alignment", 32)
    if not 0 < alignment <= 1 << 20:
        raise CheckpointError(f"{path}: general.alignment must be a positive integer, got {alignment}.")
    start = -(-header.end // alignment) * alignment
    stored: dict[str, Stored] = {}
    for info in header.tensors:
        name = shortened(info.name)
        if info.name in stored:
            raise CheckpointError(f"{path}: tensor {name} is listed twice.")
        try:
            encoding = GGMLQuantizationType(info.kind).name
        except ValueError:
            encoding = f"number {info.kind}"
        if encoding not in (*DTYPES, *QUANTIZED):
            raise UnsupportedModelError(
                f"{path}: tensor {name} has type {encoding}; supported: {', '.join((*DTYPES, *QUANTIZED))}."
            )
        tensor = Stored(path, start + info.offset, info.shape, encoding)
        try:
            end = tensor.offset + tensor.rows * tensor.row_bytes
        except ValueError as error:
            raise CheckpointError(f"{path}: tensor {name}: {error}.") from error
        if end > size:
            raise CheckpointError(
                f"{path} is cut off: tensor {name} ends at byte {end}, the file at {size}. Download it again."
            )
        stored[info.name] = tensor
    return header.metadata, stored


def _rope_scaling(config: ModelConfig, divisors: Stored | None) -> RopeScaling | None:
    """The scaling in the metadata, or the one that a tensor of divisors holds."""
    if divisors is None:
        return config.rope_scaling
    found = _llama3_scaling(divisors, config)
    if found is not None and config.rope_scaling is not None:
        raise UnsupportedModelError(
            f"{divisors.path}: both the metadata and the tensor rope_freqs.weight scale rotary embeddings; supported: "
            "one of them."
        )
    return found or config.rope_scaling


def _llama3_scaling(stored: Stored, config: ModelConfig) -> RopeScaling | None:
    """Recovers llama3 rope scaling from the per-frequency divisors, all that a GGUF file keeps of it."""
    if math.prod(stored.shape) != config.head_dim // 2:
        raise CheckpointError(
            f"{stored.path}: tensor 'rope_freqs.weight' has shape {stored.shape}, expected ({config.head_dim // 2},)."
        )
    with open(stored.path, "rb") as file:
        divisors = stored.read(file, 0, stored.rows).astype(np.float64).reshape(-1)
    if np.all(divisors == 1):
        return None
    factor, low, high, original = float(f"{divisors.max():.6g}"), 1.0, 4.0, 8192  # as in every published Llama 3
    with np.errstate(all="ignore"):
        wavelengths = 2 * np.pi * config.rope_theta ** (np.arange(divisors.size) * 2 / config.head_dim)
        smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
        expected = 1 / ((1 - smooth) / factor + smooth)
    if not np.allclose(divisors, expected, rtol=1e-3):
        raise UnsupportedModelError(
            f"{stored.path}: the rotary divisors in rope_freqs.weight are not those of Llama 3 (low_freq_factor {low}, "
            f"high_freq_factor {high}, original context {original}); use the model's safetensors instead."
        )
    return RopeScaling("llama3", factor, low, high, original)
