"""Reads safetensors folders and GGUF files tensor by tensor, and builds a model from them.

Every tensor comes out under one name and in one layout, whatever the file: projections are `[in, out]` (the transpose
of Hugging Face's, and faster on CPUs), query and key rows are in the half-split order of `rotate_half`. Files are read
with plain reads rather than memory maps, in blocks of a few MB, so loading needs little more memory than the weights.

Nothing in a file is trusted: every count and offset is checked against the file's size before anything is allocated.
"""

import json
import math
import os
import struct
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

from minikv_jax.errors import CheckpointError, UnsupportedModelError
from minikv_jax.models.config import ModelConfig, RopeScaling, token_ids

if TYPE_CHECKING:
    from minikv_jax.models.llama import Llama

Progress = Callable[[int, int], None]

_BLOCK_VALUES = 1 << 20  # values decoded at once: large enough for numpy, small beside any model
_MAX_JSON = 100_000_000  # bytes; the safetensors format's own limit for its header
_MAX_ITEMS = 1 << 22  # entries of one list in a GGUF header; the largest vocabularies have 1 << 18
_DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_GGUF_QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
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
        # Damaged data may hold infinities, which pass through; a finite value too large for float16 does not.
        with open(stored.path, "rb") as file, np.errstate(all="ignore"):
            for start in range(0, rows, step):
                stop = min(start + step, rows)
                block = stored.read(file, start, stop)
                converted = block.astype(dtype, copy=False)
                if dtype == np.float16 and not np.array_equal(np.isfinite(block), np.isfinite(converted)):
                    raise CheckpointError(
                        f"{stored.path}: tensor {self.name!r} has values beyond float16's 65504; use dtype bfloat16."
                    )
                if self.transposed:
                    out[:, start:stop] = converted.T
                else:
                    out[start:stop] = converted
        if len(stored.shape) == 1:
            out = out.reshape(stored.shape)
        if self.interleaved_heads:
            out = _half_split(out, self.interleaved_heads)
        return out


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
            CheckpointError: if a file changed since it was opened, or a value does not fit float16.
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
    """Checks a checkpoint's headers without reading its weights.

    Args:
        path: a Hugging Face folder (config.json with model.safetensors, or shards and their index), or a GGUF file.

    Returns:
        The configuration and the tensors, every name and shape checked.

    Raises:
        CheckpointError: if files are missing, truncated or damaged, are pickles, or do not fit the configuration.
        UnsupportedModelError: if the model is sound but of a kind this library cannot run.
    """
    path = Path(path).expanduser()
    try:
        if path.is_dir():
            return _open_folder(path)
        if not path.exists():
            raise CheckpointError(f"{path} does not exist; expected a Hugging Face folder or a GGUF file.")
        _refuse_pickle(path)
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


def _refuse_pickle(path: Path) -> None:
    """Pickles can run any code when opened, so they are refused unopened: by name, and by content under any name."""
    with open(path, "rb") as file:
        start = file.read(9)
    beginnings = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    # The length of a safetensors header may begin with the same bytes (640 is 80 02); its JSON then follows at once.
    is_safetensors = start[4:] == b"\0\0\0\0{"
    if path.suffix in _PICKLE_SUFFIXES or (start.startswith(beginnings) and not is_safetensors):
        raise CheckpointError(
            f"{path} is a pickle or zip checkpoint, which can run code when opened and is never loaded. Convert it to "
            "safetensors (transformers: model.save_pretrained(folder)) and pass that folder."
        )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; a Hugging Face folder needs it. Download the model again.")
    if path.stat().st_size > _MAX_JSON:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes, far too many for a JSON description.")
    return _parse_json(path.read_bytes(), str(path))


def _parse_json(raw: bytes, source: str) -> dict[str, Any]:
    try:
        value = json.loads(raw, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} is not valid JSON ({error}). Download the model again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{source} must hold a JSON object, not a {type(value).__name__}.")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(values := dict(pairs)) < len(pairs):
        raise ValueError("a key occurs twice")
    return values


# ------------------------------------------------------------------------------------------------- Hugging Face folders


def _open_folder(folder: Path) -> Checkpoint:
    files = _safetensors_files(folder)
    entries = _read_json(folder / "config.json")
    try:
        config = ModelConfig.from_hf(entries)
    except (CheckpointError, UnsupportedModelError) as error:
        raise type(error)(f"{folder}: {error}") from error
    generation = folder / "generation_config.json"
    if generation.is_file():  # lists more ways to end than config.json does, for chat models
        ends = token_ids(_read_json(generation).get("eos_token_id"), f"{generation}: eos_token_id")
        config = config.replace(eos_token_ids=ends or config.eos_token_ids)
    stored: dict[str, _Stored] = {}
    for file in files:
        for name, tensor in _safetensors_header(file).items():
            if name in stored:
                raise CheckpointError(f"Tensor {name!r} is in {stored[name].path.name} and in {file.name}.")
            stored[name] = tensor
    names = {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
    ignored = {name for name in stored if name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        names["head"] = "model.embed_tokens.weight"
        ignored.add("lm_head.weight")
    return _checkpoint(folder, config, stored, names, _HF_LAYER, "model.layers", ignored)


def _safetensors_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        return _shards(index)
    found = sorted(entry.name for entry in folder.iterdir())
    gguf = [name for name in found if name.endswith(".gguf")]
    pickles = [name for name in found if name.endswith(_PICKLE_SUFFIXES)]
    expected = f"{folder} has no model.safetensors and no model.safetensors.index.json"
    if gguf:
        raise CheckpointError(f"{expected}; pass the GGUF file itself: {folder / gguf[0]}")
    if pickles:
        raise CheckpointError(
            f"{expected}, only {', '.join(pickles[:3])}: pickles can run code when opened and are never loaded. "
            "Convert them to safetensors (transformers: model.save_pretrained(folder)) and pass that folder."
        )
    raise CheckpointError(f"{expected}; it holds {', '.join(found[:8]) or 'nothing'}. Download the model again.")


def _shards(index: Path) -> list[Path]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map must be an object from tensor names to file names.")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if Path(shard).name != shard or "\0" in shard:
            raise CheckpointError(f"{index} names the shard {shard!r}; expected a plain file name in the same folder.")
        if not (index.parent / shard).is_file():
            raise CheckpointError(f"{index} needs {shard}, which is missing. Download the model again.")
    return [index.parent / shard for shard in shards]


def _safetensors_header(path: Path) -> dict[str, _Stored]:
    """The tensors of a safetensors file: 8 bytes of length, a JSON header, then the data without gaps."""
    _refuse_pickle(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, _MAX_JSON):
            raise CheckpointError(
                f"{path} ({size} bytes) is cut off or not a safetensors file: its first 8 bytes ask for a header of "
                f"{length} bytes. Download it again."
            )
        header = _parse_json(file.read(length), f"The header of {path}")
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
        raise CheckpointError(f"{path}: the header's entry for tensor {name!r} is damaged: {str(entry)[:200]}")
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise UnsupportedModelError(
            f"{path}: tensor {name!r} has dtype {dtype!r}; supported: {', '.join(_DTYPES)}. Convert the checkpoint."
        )
    expected = math.prod(shape) * _DTYPES[dtype].itemsize
    if span[1] - span[0] != expected:
        raise CheckpointError(
            f"{path}: tensor {name!r} of shape {tuple(shape)} and dtype {dtype} needs {expected} bytes, the header "
            f"gives it {span[1] - span[0]}. The file is damaged."
        )
    return tuple(shape), (span[0], span[1])


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


# ------------------------------------------------------------------------------------------------------------- GGUF


def read_gguf_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The key-value pairs of a GGUF file, as Python values.

    Raises:
        CheckpointError: if the file is missing, is not GGUF, or is damaged.
    """
    path = Path(path)
    try:
        _refuse_pickle(path)
        with open(path, "rb") as file:
            return _gguf_metadata(_Cursor(file, path))[0]
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error}") from error


def _open_gguf(path: Path) -> Checkpoint:
    metadata, stored = _read_gguf(path)
    if metadata.get("split.count", 1) not in (0, 1):
        raise CheckpointError(
            f"{path} is one of {metadata['split.count']} parts; merge them first (llama-gguf-split --merge)."
        )
    try:
        config = ModelConfig.from_gguf(metadata)
    except (CheckpointError, UnsupportedModelError) as error:
        raise type(error)(f"{path}: {error}") from error
    tied = _is_tied(stored)
    config = config.replace(
        tie_word_embeddings=tied,
        query_key_value_bias=config.query_key_value_bias or "blk.0.attn_q.bias" in stored,
        rope_scaling=_llama3_scaling(stored["rope_freqs.weight"], config)
        if "rope_freqs.weight" in stored
        else config.rope_scaling,
    )
    names = {"embedding": "token_embd.weight", "norm": "output_norm.weight", "head": "output.weight"}
    ignored = {"rope_freqs.weight"}
    if tied:
        # Where a file holds both, the copy for the head is the more precise one, and serves look-ups too.
        names["head"] = "output.weight" if "output.weight" in stored else "token_embd.weight"
        ignored.add("token_embd.weight")
    heads = {"query": config.num_heads, "key": config.num_kv_heads} if config.architecture == "llama" else {}
    return _checkpoint(path, config, stored, names, _GGUF_LAYER, "blk", ignored, heads)


def _read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, _Stored]]:
    from gguf import GGMLQuantizationType

    size = path.stat().st_size
    stored: dict[str, _Stored] = {}
    with open(path, "rb") as file:
        cursor = _Cursor(file, path)
        metadata, tensor_count = _gguf_metadata(cursor)
        entries = [_gguf_tensor_info(cursor) for _ in range(cursor.count(tensor_count, 8 + 4 + 8 + 4 + 8))]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
            raise CheckpointError(f"{path}: general.alignment must be a positive integer, got {alignment!r}.")
        start = -(-cursor.position // alignment) * alignment
    for name, shape, kind, offset in entries:
        if name in stored:
            raise CheckpointError(f"{path}: tensor {name!r} is listed twice.")
        try:
            encoding = GGMLQuantizationType(kind).name
        except ValueError:
            encoding = f"number {kind}"
        if encoding not in (*_DTYPES, *_GGUF_QUANTIZED):
            raise UnsupportedModelError(
                f"{path}: tensor {name!r} has type {encoding}; supported: {', '.join((*_DTYPES, *_GGUF_QUANTIZED))}."
            )
        tensor = _Stored(path, start + offset, shape, encoding)
        try:
            end = tensor.offset + tensor.rows * tensor.row_bytes
        except ValueError as error:
            raise CheckpointError(f"{path}: tensor {name!r}: {error}.") from error
        if end > size:
            raise CheckpointError(
                f"{path} is cut off: tensor {name!r} ends at byte {end}, the file at {size}. Download it again."
            )
        stored[name] = tensor
    return metadata, stored


class _Cursor:
    """Reads little-endian values from a file, and never past its end."""

    def __init__(self, file: BinaryIO, path: Path):
        self.file = file
        self.path = path
        self.position = 0
        self.size = os.fstat(file.fileno()).st_size

    def take(self, length: int) -> bytes:
        if length > self.size - self.position:
            raise self.cut_off(f"{length} bytes")
        self.position += length
        return self.file.read(length)

    def value(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self, count: int, least_bytes: int) -> int:
        """`count`, if that many items of at least so many bytes can still follow."""
        if count > _MAX_ITEMS or count * least_bytes > self.size - self.position:
            raise self.cut_off(f"{count} items")
        return count

    def string(self) -> str:
        raw = self.take(self.value("Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: the header holds text that is not UTF-8 ({error}).") from error

    def cut_off(self, wanted: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is cut off or damaged: its header asks for {wanted} at byte {self.position} of {self.size}. "
            "Download it again."
        )


_GGUF_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_GGUF_STRING, _GGUF_ARRAY = 8, 9


def _gguf_metadata(cursor: _Cursor) -> tuple[dict[str, Any], int]:
    """The key-value pairs, and how many tensors are listed after them."""
    magic = cursor.take(min(4, cursor.size))
    if magic != b"GGUF":
        raise CheckpointError(f"{cursor.path} is not a GGUF file: it begins with {magic!r}, expected b'GGUF'.")
    version = cursor.value("I")
    if version not in (2, 3):
        raise CheckpointError(
            f"{cursor.path} has GGUF version {version}; supported: 2 and 3, little-endian. Convert the model again."
        )
    tensor_count, count = cursor.value("Q"), cursor.value("Q")
    metadata: dict[str, Any] = {}
    for _ in range(cursor.count(count, 8 + 4 + 1)):
        key = cursor.string()
        if key in metadata:
            raise CheckpointError(f"{cursor.path}: the header holds {key!r} twice.")
        metadata[key] = _gguf_value(cursor, cursor.value("I"), key)
    return metadata, tensor_count


def _gguf_value(cursor: _Cursor, kind: int, key: str) -> Any:
    if kind in _GGUF_SCALARS:
        return cursor.value(_GGUF_SCALARS[kind])
    if kind == _GGUF_STRING:
        return cursor.string()
    item, count = (cursor.value("I"), cursor.value("Q")) if kind == _GGUF_ARRAY else (None, 0)
    if item == _GGUF_STRING:
        return [cursor.string() for _ in range(cursor.count(count, 8))]
    if item in _GGUF_SCALARS:
        code = _GGUF_SCALARS[item]
        raw = cursor.take(cursor.count(count, 1) * struct.calcsize("<" + code))
        return list(struct.unpack(f"<{count}{code}", raw))
    raise CheckpointError(f"{cursor.path}: the value of {key!r} has the unknown type {kind if item is None else item}.")


def _gguf_tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape (slowest axis first), type number, and offset into the data."""
    name = cursor.string()
    axes = cursor.value("I")
    if not 1 <= axes <= 4:
        raise CheckpointError(f"{cursor.path}: tensor {name!r} has {axes} axes, expected 1 to 4.")
    shape = tuple(cursor.value("Q") for _ in range(axes))[::-1]
    return name, shape, cursor.value("I"), cursor.value("Q")


def _is_tied(stored: Mapping[str, _Stored]) -> bool:
    """Whether head and embedding are one matrix. Some files hold it twice, quantized differently: then look inside."""
    head, embedding = stored.get("output.weight"), stored.get("token_embd.weight")
    if head is None or embedding is None:
        return head is None
    if head.shape != embedding.shape or 0 in head.shape:
        return False
    difference = norm = 0.0
    with open(head.path, "rb") as file, np.errstate(all="ignore"):
        for row in range(0, head.rows, max(1, head.rows // 64)):
            ours = head.read(file, row, row + 1).astype(np.float32)
            theirs = embedding.read(file, row, row + 1).astype(np.float32)
            difference += float(np.square(ours - theirs).sum())
            norm += float(np.square(ours).sum())
    return difference <= _TIED_DIFFERENCE**2 * norm


def _llama3_scaling(stored: _Stored, config: ModelConfig) -> RopeScaling | None:
    """Recovers llama3 rope scaling from the per-frequency divisors, all that a GGUF file keeps of it."""
    if math.prod(stored.shape) != config.head_dim // 2:
        raise CheckpointError(
            f"{stored.path}: tensor 'rope_freqs.weight' has shape {stored.shape}, expected ({config.head_dim // 2},)."
        )
    with open(stored.path, "rb") as file:
        divisors = stored.read(file, 0, stored.rows).astype(np.float64).reshape(-1)
    if np.all(divisors == 1):
        return config.rope_scaling
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

    # Lazily, and at most nine: a damaged layer count could ask for billions.
    missing = list(islice((n for n in map(stored_name, _names(config)) if n not in stored), 9))
    if missing:
        raise CheckpointError(
            f"{path}: tensors are missing: {_some(missing)}. Expected for a {config.architecture!r} model with "
            f"{config.num_layers} layers; download the model again."
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
                f"{tensor.path}: tensor {theirs!r} has shape {tensor.shape}, the configuration wants {expected}."
            )
        heads = interleaved.get(name.split(".")[-1].removesuffix("_bias"), 0)
        sources[name] = _Source(theirs, tensor, transposed, heads)
    unexpected = sorted(set(stored) - {source.name for source in sources.values()} - ignored)
    if unexpected:
        raise UnsupportedModelError(
            f"{path}: tensors that a {config.architecture!r} model with {config.num_layers} layers has no place for: "
            f"{_some(unexpected)}."
        )
    return Checkpoint(path, config, sources)


def _names(config: ModelConfig) -> Iterator[str]:
    return (name for name, _ in parameter_shapes(config))


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:8])
    return shown if len(names) <= 8 else f"{shown} and more"
