"""Hugging Face folders: config.json, and the headers of the safetensors files beside it."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

from minikv_jax.errors import CheckpointError, UnsupportedModelError, shortened
from minikv_jax.models.checkpoint import Checkpoint, Names, paired, settle_tie
from minikv_jax.models.config import ModelConfig
from minikv_jax.models.entries import Entries
from minikv_jax.models.families import FAMILIES, Wrapper
from minikv_jax.models.folding import scales
from minikv_jax.models.foreign import refuse_other_contents, refuse_other_folders
from minikv_jax.models.hf_config import multipliers, wrapper_of
from minikv_jax.models.json_text import parse_json, read_json
from minikv_jax.models.stored import DTYPES, Stored


def open_folder(folder: Path) -> Checkpoint:
    refuse_other_folders(folder)
    entries = read_json(folder / "config.json")
    try:
        config = ModelConfig.from_hf(entries)
    except (CheckpointError, UnsupportedModelError) as error:
        raise type(error)(f"{folder}: {error}") from error
    generation = folder / "generation_config.json"
    if generation.is_file():  # lists more ways to end than config.json does, for chat models
        ends = Entries(read_json(generation), str(generation)).token_ids("eos_token_id")
        config = config.replace(eos_token_ids=ends or config.eos_token_ids)
    single = folder / "model.safetensors"
    stored: dict[str, Stored] = {}
    for file in [single] if single.is_file() else _shards(folder / "model.safetensors.index.json"):
        for name, tensor in _safetensors_header(file).items():
            if name in stored:
                raise CheckpointError(f"Tensor {shortened(name)} is in {stored[name].path} and in {file.name}.")
            stored[name] = tensor
    stored, left_out = _language_model(folder, stored, wrapper_of(entries))
    _refuse_other_names(folder, stored)
    ends = {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
    ignored = {name for name in stored if name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        ignored |= {ends["head"], ends["embedding"]}
        config, ends = settle_tie(config, stored, ends)
    family = FAMILIES[config.architecture]
    names = Names(ends, family.hf_layer, "model.layers")
    folded = scales(multipliers(entries), config.head_dim, config.tie_word_embeddings)
    checkpoint = paired(folder, config, stored, names, ignored, "hf" in family.interleaved, folded)
    return replace(checkpoint, left_out=tuple(sorted(left_out)))


def _language_model(
    folder: Path, stored: dict[str, Stored], wrapper: Wrapper | None
) -> tuple[dict[str, Stored], set[str]]:
    """The language model's tensors, as if it had been saved by itself, and the names of those that are left out."""
    if wrapper is None:
        return stored, set()
    left_out = {name for name in stored if name.removeprefix("model.").startswith(wrapper.left_out)}
    # transformers saved `language_model.model.layers`, and since its version 4.52 `model.language_model.layers`.
    ours = {
        name.removeprefix("language_model.").replace("model.language_model.", "model.", 1): tensor
        for name, tensor in stored.items()
        if name not in left_out
    }
    if len(ours) + len(left_out) < len(stored):
        raise CheckpointError(f"{folder} holds tensors of its language model twice, under two kinds of names.")
    return ours, left_out


def _refuse_other_names(folder: Path, stored: Mapping[str, Stored]) -> None:
    """Names the prefix of the tensors where it is another than a causal language model's."""
    ours, common = "model.", "layers.0.input_layernorm.weight"
    prefixes = [name.removesuffix(common) for name in stored if name.endswith(common)]
    if not prefixes or ours in prefixes:
        return
    raise CheckpointError(
        f"{folder} holds tensors named like {shortened(prefixes[0] + common)}, expected {ours + common!r}: this is a "
        "base model without its head, a wrapped model or a part of a larger one. Save the language model by itself "
        "(transformers: AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder))."
    )


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map must be an object from tensor names to file names.")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if Path(shard).name != shard or not shard.isprintable() or len(shard) > 255:
            raise CheckpointError(
                f"{index} names the shard {shortened(shard)}; expected a plain file name in the same folder."
            )
        if not (index.parent / shard).is_file():
            raise CheckpointError(f"{index} needs {shortened(shard)}, which is missing. Download the model again.")
    return [index.parent / shard for shard in shards]


def _safetensors_header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file: 8 bytes of length, a JSON header, then the data without gaps."""
    refuse_other_contents(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise CheckpointError(
                f"{path} ({size} bytes) is cut off or not a safetensors file: its first 8 bytes ask for a header of "
                f"{length} bytes. Download it again."
            )
        header = parse_json(file, length, f"The header of {path}")
    header.pop("__metadata__", None)
    spans: list[tuple[int, int]] = []
    tensors: dict[str, Stored] = {}
    for name, entry in header.items():
        shape, (begin, end) = _safetensors_entry(path, name, entry)
        spans.append((begin, end))
        tensors[name] = Stored(path, 8 + length + begin, shape, entry["dtype"])
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise CheckpointError(f"{path}: the header leaves a gap or an overlap at byte {position} of the data.")
        position = end
    if position != size - 8 - length:
        raise CheckpointError(
            f"{path} holds {size - 8 - length} bytes of data, its header describes {position}: the file is cut off or "
            "damaged. Download it again."
        )
    return tensors


def _safetensors_entry(path: Path, name: str, entry: Any) -> tuple[tuple[int, ...], tuple[int, int]]:
    entry = entry if isinstance(entry, dict) else {}
    shape, span = entry.get("shape"), entry.get("data_offsets")
    if not (_are_sizes(shape) and len(shape) <= 8 and _are_sizes(span) and len(span) == 2):
        raise CheckpointError(
            f"{path}: the header's entry for tensor {shortened(name)} is damaged: {shortened(entry, 200)}"
        )
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UnsupportedModelError(
            f"{path}: tensor {shortened(name)} has dtype {shortened(dtype)}; supported: {', '.join(DTYPES)}. Convert "
            "the checkpoint."
        )
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if span[1] - span[0] != expected:
        raise CheckpointError(
            f"{path}: tensor {shortened(name)} of shape {tuple(shape)} and dtype {dtype} needs {expected} bytes, the "
            f"header gives it {span[1] - span[0]}. The file is damaged."
        )
    return tuple(shape), (span[0], span[1])


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)
