"""Reads safetensors folders and GGUF files tensor by tensor, and builds a model from them.

Every tensor comes out under one name and in one layout, whatever the file: projections are `[in, out]` (the transpose
of Hugging Face's, and faster on CPUs), query and key rows are in the half-split order of `rotate_half`. Files are read
with plain reads rather than memory maps, in blocks of a few MB, so loading needs little more memory than the weights.

Nothing in a file is trusted: every count and offset is checked against the file's size before anything is allocated.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeGuard

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from minikv_jax.errors import CheckpointError, UnsupportedModelError, shortened
from minikv_jax.models.config import ModelConfig, RopeScaling
from minikv_jax.models.entries import Entries
from minikv_jax.models.gguf_header import read_header
from minikv_jax.models.hub import given_path
from minikv_jax.models.wording import listed, one_line

if TYPE_CHECKING:
    from minikv_jax.models.llama import Llama

Progress = Callable[[int, int], None]

_BLOCK_VALUES = 1 << 20  # values decoded at once: large enough for numpy, small beside any model
# Of a description in JSON: room for ten times the tensors of the largest model. The safetensors format allows 100 MB,
# which Python's parser would turn into GBs.
_MAX_JSON_BYTES = 1 << 21
_MAX_JSON_VALUES = 1 << 18
_DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_GGUF_QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
_LFS_POINTER = b"version https://git-lfs.github.com/"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")

_HF_LAYER = {
    "input_layernorm.weight": "attention_norm",
    "self_attn.q_proj.weight": "query",
    "self_attn.k_proj.weight": "key",
    "self_attn.v_proj.weight": "value",
    "self_attn.o_proj.weight": "output",
    "self_attn.q_proj.bias": "query_bias",
    "self_attn.k_proj.bias": "key_bias",
    "self_attn.v_proj.bias": "value_bias",
    "post_attention_layernorm.weight": "mlp_norm",
    "mlp.gate_proj.weight": "gate",
    "mlp.up_proj.weight": "up",
    "mlp.down_proj.weight": "down",
}
_GGUF_LAYER = {
    "attn_norm.weight": "attention_norm",
    "attn_q.weight": "query",
    "attn_k.weight": "key",
    "attn_v.weight": "value",
    "attn_output.weight": "output",
    "attn_q.bias": "query_bias",
    "attn_k.bias": "key_bias",
    "attn_v.bias": "value_bias",
    "ffn_norm.weight": "mlp_norm",
    "ffn_gate.weight": "gate",
    "ffn_up.weight": "up",
    "ffn_down.weight": "down",
}
# Tensors that follow each other and are one matrix (or bias) of the model, side by side, by the first one's name.
_JOINED = {
    "query": ("query_key_value", 3),
    "gate": ("gate_up", 2),
    "query_bias": ("query_key_value_bias", 3),
}
# What config.json calls the sizes of a stored tensor.
_QUERIES, _KEYS = "num_attention_heads * head_dim", "num_key_value_heads * head_dim"
_SIZES = {
    **dict.fromkeys(("head", "embedding"), "vocab_size, hidden_size"),
    **dict.fromkeys(("norm", "attention_norm", "mlp_norm"), "hidden_size"),
    "query": f"{_QUERIES}, hidden_size",
    **dict.fromkeys(("key", "value"), f"{_KEYS}, hidden_size"),
    "output": f"hidden_size, {_QUERIES}",
    "query_bias": _QUERIES,
    **dict.fromkeys(("key_bias", "value_bias"), _KEYS),
    **dict.fromkeys(("gate", "up"), "intermediate_size, hidden_size"),
    "down": "hidden_size, intermediate_size",
}
# Two copies of one matrix at different precision differ by 4 to 7 % in published files; separate heads by over 100 %.
_TIED_DIFFERENCE = 0.15


def parameter_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a checkpoint's tensors, largest first: their temporaries come while memory is empty."""
    d, f = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield "head", (d, config.vocab_size)
    if not config.tie_word_embeddings:
        yield "embedding", (config.vocab_size, d)
    yield "norm", (d,)
    layer: dict[str, tuple[int, ...]] = {"attention_norm": (d,), "query": (d, q), "key": (d, kv), "value": (d, kv)}
    layer |= {"output": (q, d), "mlp_norm": (d,), "gate": (d, f), "up": (d, f), "down": (f, d)}
    if config.query_key_value_bias:
        layer |= {"query_bias": (q,), "key_bias": (kv,), "value_bias": (kv,)}
    for i in range(config.num_layers):
        for name, shape in layer.items():
            yield f"layers.{i}.{name}", shape


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies. `shape` has the slowest axis first, as numpy's and Hugging Face's have."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    encoding: str

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        return _row_bytes(self.encoding, self.columns)

    def read(self, file: BinaryIO, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` as `[stop - start, columns]`, in the stored dtype or float32 if quantized."""
        file.seek(self.offset + start * self.row_bytes)
        raw = np.fromfile(file, np.uint8, (stop - start) * self.row_bytes)
        if raw.size < (stop - start) * self.row_bytes:
            raise CheckpointError(f"{self.path} ends early; it changed while it was being read. Load it again.")
        raw = raw.reshape(stop - start, self.row_bytes)
        if self.encoding in _DTYPES:
            return raw.view(_DTYPES[self.encoding])
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        return dequantize(raw, GGMLQuantizationType[self.encoding])


@dataclass(frozen=True)
class _Source:
    """The stored tensor behind one parameter, and what sets them apart."""

    name: str
    stored: _Stored
    transposed: bool
    interleaved_heads: int  # llama.cpp's order of rotary rows in this many heads; 0 if already half-split

    def load(self, dtype: np.dtype) -> np.ndarray:
        stored = self.stored
        rows, columns = stored.rows, stored.columns
        out = np.empty((columns, rows) if self.transposed else (rows, columns), dtype)
        step = max(1, _BLOCK_VALUES // columns)
        with open(stored.path, "rb") as file, np.errstate(all="ignore"):
            for start in range(0, rows, step):
                stop = min(start + step, rows)
                block = stored.read(file, start, stop)
                converted = block.astype(dtype, copy=False)
                if not _all_finite(converted):
                    raise self.not_finite(block, dtype)
                if self.transposed:
                    out[:, start:stop] = converted.T
                else:
                    out[start:stop] = converted
        if len(stored.shape) == 1:
            out = out.reshape(stored.shape)
        if self.interleaved_heads:
            out = _half_split(out, self.interleaved_heads)
        return out

    def not_finite(self, block: np.ndarray, dtype: np.dtype) -> CheckpointError:
        """A model with such a weight answers every prompt with nonsense, and seldom says so."""
        where = f"{self.stored.path}: tensor {shortened(self.name)}"
        if not np.isfinite(block).all():
            return CheckpointError(
                f"{where} holds NaN or infinity: the file or the model is damaged. Download it again."
            )
        largest = float(ml_dtypes.finfo(dtype).max)
        return CheckpointError(f"{where} has values beyond {dtype}'s {largest:.5g}; use dtype bfloat16 or float32.")


def _all_finite(values: np.ndarray) -> bool:
    """Looks at the bits, in which infinity and NaN are the largest: on 16 bits isfinite takes ten times as long."""
    signed, unsigned = (values.view(np.dtype(f"{kind}{values.itemsize}")) for kind in "iu")
    limits = np.array([np.inf, -np.inf], values.dtype)
    return bool(signed.max() < limits.view(signed.dtype)[0] and unsigned.max() < limits.view(unsigned.dtype)[1])


def _half_split(array: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's row order `[heads, head_dim / 2, 2]` along the last axis."""
    return array.reshape(*array.shape[:-1], heads, -1, 2).swapaxes(-1, -2).reshape(array.shape)


@dataclass(frozen=True)
class Checkpoint:
    """A model's files, checked but not read yet.

    Attributes:
        path: the folder or GGUF file.
        config: sizes and switches of the model.
    """

    path: Path
    config: ModelConfig
    _sources: Mapping[str, _Source]

    def tensors(self, dtype: DTypeLike = np.float32) -> Iterator[tuple[str, np.ndarray]]:
        """Reads the parameters one at a time, the largest first.

        Args:
            dtype: float32, bfloat16 or float16.

        Yields:
            `(name, array)` with the names and shapes of `parameter_shapes(self.config)`: `head` `[D, V]`, `embedding`
            `[V, D]` (untied models only), `norm` `[D]`, and for every layer i `layers.i.attention_norm` `[D]`,
            `layers.i.query` `[D, N*H]`, `layers.i.key` and `value` `[D, K*H]`, `output` `[N*H, D]`, `mlp_norm` `[D]`,
            `gate` and `up` `[D, F]`, `down` `[F, D]`, and with biases `query_bias` `[N*H]`, `key_bias`, `value_bias`
            `[K*H]`.

        Raises:
            CheckpointError: if a file changed since it was opened, or holds NaN, infinity or what `dtype` cannot.
            TypeError: for another dtype.
        """
        target = _float_dtype(dtype)
        for name, _ in parameter_shapes(self.config):
            try:
                array = self._sources[name].load(target)
            except OSError as error:
                raise CheckpointError(f"Cannot read {self.path}: {error}") from error
            yield name, array


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
            return _open_folder(path)
        if not os.path.exists(path):
            raise CheckpointError(f"{path} does not exist; expected a Hugging Face folder or a GGUF file.")
        _refuse_other_contents(path)
        if path.suffix == ".safetensors":
            raise CheckpointError(f"{path} is a single file; pass its folder, which must hold config.json too.")
        return _open_gguf(path)
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error}") from error


def load_model(
    path: str | os.PathLike[str], dtype: DTypeLike | None = None, progress: Progress | None = None
) -> "Llama":
    """Builds a model from a checkpoint, reading one tensor at a time so that nothing is held twice.

    Args:
        path: a Hugging Face folder or a GGUF file, as for `open_checkpoint`.
        dtype: float32, bfloat16 or float16; by default float32 on CPU and bfloat16 on other devices.
        progress: called with the bytes of weights loaded so far and in all.

    Returns:
        The model with its parameters on JAX's default device.

    Raises:
        CheckpointError, UnsupportedModelError: as `open_checkpoint` and `Checkpoint.tensors` do.
    """
    from flax import nnx

    from minikv_jax.models.llama import Llama

    checkpoint = open_checkpoint(path)
    default = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    target = _float_dtype(default if dtype is None else dtype)
    model = nnx.eval_shape(lambda: Llama(checkpoint.config, param_dtype=target, rngs=nnx.Rngs(0)))
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


def _float_dtype(dtype: DTypeLike) -> np.dtype:
    target = np.dtype(dtype)
    if target not in _DTYPES.values():
        raise TypeError(f"Weights are loaded as float32, bfloat16 or float16, not {target}.")
    return target


def _row_bytes(encoding: str, columns: int) -> int:
    """Bytes of one row; raises ValueError if the row does not divide into whole blocks."""
    if encoding in _DTYPES:
        return columns * _DTYPES[encoding].itemsize
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[encoding]]
    if columns % block:
        raise ValueError(f"rows of {columns} values do not divide into {encoding} blocks of {block}")
    return columns // block * size


def _refuse_other_contents(path: Path) -> None:
    """Pickles can run any code when opened, so they are refused unopened: by name, and by content under any name."""
    with open(path, "rb") as file:
        start = file.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        raise CheckpointError(f"{path} is a Git LFS pointer, not the file itself. Run `git lfs pull` in its folder.")
    beginnings = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    # The length of a safetensors header may begin with the same bytes (640 is 80 02); its JSON then follows at once.
    is_safetensors = start[4:9] == b"\0\0\0\0{"
    if path.suffix in _PICKLE_SUFFIXES or (start.startswith(beginnings) and not is_safetensors):
        raise CheckpointError(
            f"{path} is a pickle or zip checkpoint, which can run code when opened and is never loaded. Convert it to "
            "safetensors (transformers: model.save_pretrained(folder)) and pass that folder."
        )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; a Hugging Face folder needs it. Download the model again.")
    with open(path, "rb") as file:
        return _parse_json(file, os.fstat(file.fileno()).st_size, str(path))


def _parse_json(file: BinaryIO, length: int, source: str) -> dict[str, Any]:
    """The object in the next bytes. What is too large is refused by length and punctuation, before it is parsed."""
    raw = file.read(length) if length <= _MAX_JSON_BYTES else b""
    if length > _MAX_JSON_BYTES or sum(map(raw.count, (b",", b"[", b"{"))) > _MAX_JSON_VALUES:
        raise CheckpointError(
            f"{source} has {length} bytes, too much for the description of a model: at most {_MAX_JSON_BYTES} bytes "
            f"and {_MAX_JSON_VALUES} values are read."
        )
    try:
        value = json.loads(raw, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} is not valid JSON ({one_line(error)}). Download the model again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{source} must hold a JSON object, not a {type(value).__name__}.")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(values := dict(pairs)) < len(pairs):
        raise ValueError("a key occurs twice")
    return values


# ------------------------------------------------------------------------------------------------- Hugging Face folders


def _open_folder(folder: Path) -> Checkpoint:
    _refuse_other_folders(folder)
    entries = _read_json(folder / "config.json")
    try:
        config = ModelConfig.from_hf(entries)
    except (CheckpointError, UnsupportedModelError) as error:
        raise type(error)(f"{folder}: {error}") from error
    generation = folder / "generation_config.json"
    if generation.is_file():  # lists more ways to end than config.json does, for chat models
        ends = Entries(_read_json(generation), str(generation)).token_ids("eos_token_id")
        config = config.replace(eos_token_ids=ends or config.eos_token_ids)
    single = folder / "model.safetensors"
    stored: dict[str, _Stored] = {}
    for file in [single] if single.is_file() else _shards(folder / "model.safetensors.index.json"):
        for name, tensor in _safetensors_header(file).items():
            if name in stored:
                raise CheckpointError(f"Tensor {shortened(name)} is in {stored[name].path} and in {file.name}.")
            stored[name] = tensor
    _refuse_other_names(folder, stored)
    names = {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
    ignored = {name for name in stored if name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        ignored |= {names["head"], names["embedding"]}
        config, names = _settle_tie(config, stored, names)
    return _checkpoint(folder, config, stored, names, _HF_LAYER, "model.layers", ignored)


def _refuse_other_folders(folder: Path) -> None:
    """Says what a folder holds instead of a whole model in this format."""
    found = sorted(entry.name for entry in folder.iterdir())
    if any(name.startswith(("adapter_config.", "adapter_model.")) for name in found):
        raise CheckpointError(
            f"{folder} holds a PEFT adapter ({listed(name for name in found if name.startswith('adapter_'))}), which "
            "is not applied here. Merge it into its base model (peft: "
            "model.merge_and_unload().save_pretrained(folder)) and pass that folder; if it is merged already, remove "
            "the adapter's files."
        )
    if "model.safetensors" in found or "model.safetensors.index.json" in found:
        return
    expected = f"{folder} has no model.safetensors and no model.safetensors.index.json"
    others = [name for name in found if name.endswith(".safetensors")]
    shards = [name for name in others if name.startswith("model-") and "-of-" in name]
    pickles = [name for name in found if name.endswith(_PICKLE_SUFFIXES)]
    if shards:
        raise CheckpointError(
            f"{expected}, only the shards {listed(shards, 2)}. Download model.safetensors.index.json too: it says "
            "which shards belong together."
        )
    if any(name.startswith("consolidated") for name in others):
        raise CheckpointError(
            f"{expected}, only {listed(others, 2)}: Mistral's own format, whose tensors have other names and another "
            "order. Download the files model*.safetensors and config.json of the same repository."
        )
    if others:
        raise CheckpointError(f"{expected}, only {listed(others)}. If that is the whole model, rename it.")
    if gguf := [name for name in found if name.endswith(".gguf")]:
        raise CheckpointError(f"{expected}; pass the GGUF file itself: {folder / gguf[0]}")
    if pickles:
        raise CheckpointError(
            f"{expected}, only {listed(pickles)}: pickles can run code when opened and are never loaded. "
            "Convert them to safetensors (transformers: model.save_pretrained(folder)) and pass that folder."
        )
    raise CheckpointError(f"{expected}; it holds {listed(found) or 'nothing'}. Download the model again.")


def _refuse_other_names(folder: Path, stored: Mapping[str, _Stored]) -> None:
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
    weight_map = _read_json(index).get("weight_map")
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


def _safetensors_header(path: Path) -> dict[str, _Stored]:
    """The tensors of a safetensors file: 8 bytes of length, a JSON header, then the data without gaps."""
    _refuse_other_contents(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise CheckpointError(
                f"{path} ({size} bytes) is cut off or not a safetensors file: its first 8 bytes ask for a header of "
                f"{length} bytes. Download it again."
            )
        header = _parse_json(file, length, f"The header of {path}")
    header.pop("__metadata__", None)
    spans: list[tuple[int, int]] = []
    tensors: dict[str, _Stored] = {}
    for name, entry in header.items():
        shape, (begin, end) = _safetensors_entry(path, name, entry)
        spans.append((begin, end))
        tensors[name] = _Stored(path, 8 + length + begin, shape, entry["dtype"])
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
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise UnsupportedModelError(
            f"{path}: tensor {shortened(name)} has dtype {shortened(dtype)}; supported: {', '.join(_DTYPES)}. Convert "
            "the checkpoint."
        )
    expected = math.prod(shape) * _DTYPES[dtype].itemsize
    if span[1] - span[0] != expected:
        raise CheckpointError(
            f"{path}: tensor {shortened(name)} of shape {tuple(shape)} and dtype {dtype} needs {expected} bytes, the "
            f"header gives it {span[1] - span[0]}. The file is damaged."
        )
    return tuple(shape), (span[0], span[1])


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


# ------------------------------------------------------------------------------------------------------------- GGUF


def read_gguf_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The key-value pairs of a GGUF file: numbers and short texts as Python values, the others still `Unread`.

    Raises:
        CheckpointError: if the file is missing, is not GGUF, or is damaged.
    """
    path = Path(path)
    try:
        _refuse_other_contents(path)
        return read_header(path).metadata
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error}") from error


def _open_gguf(path: Path) -> Checkpoint:
    metadata, stored = _read_gguf(path)
    try:
        parts = Entries(metadata, "GGUF metadata").integer("split.count", 1)
        config = ModelConfig.from_gguf(metadata)
    except (CheckpointError, UnsupportedModelError) as error:
        raise type(error)(f"{path}: {error}") from error
    if parts not in (0, 1):
        raise CheckpointError(f"{path} is one of {parts} parts; merge them first (llama-gguf-split --merge).")
    names = {"embedding": "token_embd.weight", "norm": "output_norm.weight", "head": "output.weight"}
    config, names = _settle_tie(config, stored, names)
    config = config.replace(
        tie_word_embeddings=config.tie_word_embeddings and names["embedding"] in stored,
        query_key_value_bias=config.query_key_value_bias or "blk.0.attn_q.bias" in stored,
        rope_scaling=_rope_scaling(config, stored.get("rope_freqs.weight")),
    )
    ignored = {"rope_freqs.weight"} | ({"token_embd.weight"} if config.tie_word_embeddings else set())
    heads = {"query": config.num_heads, "key": config.num_kv_heads} if config.architecture == "llama" else {}
    return _checkpoint(path, config, stored, names, _GGUF_LAYER, "blk", ignored, heads)


def _read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, _Stored]]:
    from gguf import GGMLQuantizationType

    header, size = read_header(path), path.stat().st_size
    alignment = Entries(header.metadata, f"{path}: GGUF metadata").integer("general.alignment", 32)
    if not 0 < alignment <= 1 << 20:
        raise CheckpointError(f"{path}: general.alignment must be a positive integer, got {alignment}.")
    start = -(-header.end // alignment) * alignment
    stored: dict[str, _Stored] = {}
    for info in header.tensors:
        name = shortened(info.name)
        if info.name in stored:
            raise CheckpointError(f"{path}: tensor {name} is listed twice.")
        try:
            encoding = GGMLQuantizationType(info.kind).name
        except ValueError:
            encoding = f"number {info.kind}"
        if encoding not in (*_DTYPES, *_GGUF_QUANTIZED):
            raise UnsupportedModelError(
                f"{path}: tensor {name} has type {encoding}; supported: {', '.join((*_DTYPES, *_GGUF_QUANTIZED))}."
            )
        tensor = _Stored(path, start + info.offset, info.shape, encoding)
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


def _rope_scaling(config: ModelConfig, divisors: _Stored | None) -> RopeScaling | None:
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


def _llama3_scaling(stored: _Stored, config: ModelConfig) -> RopeScaling | None:
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


# ---------------------------------------------------------------------------------------------------- both formats


def _settle_tie(
    config: ModelConfig, stored: Mapping[str, _Stored], names: Mapping[str, str]
) -> tuple[ModelConfig, dict[str, str]]:
    """Whether head and embedding are one matrix, and under which name, for a model that may tie them.

    Files that hold both are common, and not all of them hold the same twice: fine-tunes with a head of their own say
    that they are tied too. Of two copies, the head's is used for both: it is the more precise one where they differ.
    """
    head, embedding = names["head"], names["embedding"]
    both = head in stored and embedding in stored
    tied = not both or _are_one_matrix(stored[head], stored[embedding])
    chosen = head if head in stored else embedding
    return config.replace(tie_word_embeddings=tied), {**names, "head": chosen}


def _are_one_matrix(a: _Stored, b: _Stored) -> bool:
    if a.shape != b.shape or 0 in a.shape:
        return False
    exact = a.encoding in _DTYPES and b.encoding in _DTYPES
    # Copies at two precisions are compared row by row, which takes decoding: 64 rows tell one matrix from two.
    step = max(1, _BLOCK_VALUES // a.columns) if exact else 1
    starts = range(0, a.rows, step if exact else max(1, a.rows // 64))
    difference = norm = 0.0
    with open(a.path, "rb") as file, open(b.path, "rb") as other, np.errstate(all="ignore"):
        for start in starts:
            stop = min(start + step, a.rows)
            ours, theirs = (x.read(f, start, stop).astype(np.float32) for x, f in ((a, file), (b, other)))
            if exact and not np.array_equal(ours, theirs):
                return False
            difference += float(np.square(ours - theirs).sum())
            norm += float(np.square(ours).sum())
    return exact or difference <= _TIED_DIFFERENCE**2 * norm


def _checkpoint(
    path: Path,
    config: ModelConfig,
    stored: Mapping[str, _Stored],
    names: Mapping[str, str],
    layer_names: Mapping[str, str],
    layer_prefix: str,
    ignored: set[str],
    interleaved: Mapping[str, int] | None = None,
) -> Checkpoint:
    """Pairs every parameter with a stored tensor and checks that names and shapes fit."""
    layer_names = {ours: theirs for theirs, ours in layer_names.items()}

    def stored_name(name: str) -> str:
        if name in names:
            return names[name]
        _, i, part = name.split(".")
        return f"{layer_prefix}.{i}.{layer_names[part]}"

    # Lazily, and only the first few: a damaged layer count could ask for billions.
    missing = list(islice((name for name in map(stored_name, _names(config)) if name not in stored), 5))
    if missing:
        ends = "" if config.tie_word_embeddings else " and a head of its own (tie_word_embeddings is false)"
        raise CheckpointError(
            f"{path}: tensors are missing: {listed(missing)}. Expected for a {config.architecture!r} model with "
            f"{config.num_layers} layers{ends if names['head'] in missing else ''}; download the model again."
        )
    interleaved = interleaved or {}
    sources: dict[str, _Source] = {}
    for name, shape in parameter_shapes(config):
        theirs = stored_name(name)
        tensor = stored[theirs]
        transposed = len(shape) == 2 and name != "embedding"
        expected = shape[::-1] if transposed else shape
        if tensor.shape != expected:
            raise CheckpointError(
                f"{tensor.path}: tensor {theirs!r} has shape {tensor.shape}, the configuration wants {expected} "
                f"({_SIZES[name.split('.')[-1]]})."
            )
        heads = interleaved.get(name.split(".")[-1].removesuffix("_bias"), 0)
        sources[name] = _Source(theirs, tensor, transposed, heads)
    if unexpected := sorted(set(stored) - {source.name for source in sources.values()} - ignored):
        raise UnsupportedModelError(
            f"{path}: tensors that a {config.architecture!r} model with {config.num_layers} layers has no place for: "
            f"{listed(unexpected)}."
        )
    return Checkpoint(path, config, sources)


def _names(config: ModelConfig) -> Iterator[str]:
    return (name for name, _ in parameter_shapes(config))
