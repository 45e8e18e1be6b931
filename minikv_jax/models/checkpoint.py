"""A model's tensors under our names: which stored tensor each is, and whether all of them are there and fit."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from jax.typing import DTypeLike

from minikv_jax.errors import CheckpointError, UnsupportedModelError
from minikv_jax.models.config import ModelConfig
from minikv_jax.models.stored import BLOCK_VALUES, DTYPES, Source, Stored
from minikv_jax.models.wording import listed

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
    "router": "num_experts, hidden_size",
    **dict.fromkeys(("expert_gate", "expert_up"), "moe_intermediate_size, hidden_size"),
    "expert_down": "hidden_size, moe_intermediate_size",
    **dict.fromkeys(("query_norm", "key_norm"), "head_dim"),
    **dict.fromkeys(("gate", "up"), "intermediate_size, hidden_size"),
    "down": "hidden_size, intermediate_size",
}
# Two copies of one matrix at different precision differ by 4 to 7 % in published files; separate heads by over 100 %.
_TIED_DIFFERENCE = 0.15


def parameter_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a checkpoint's tensors, largest first: their temporaries come while memory is empty."""
    d, f, h = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_heads * h, config.num_kv_heads * h
    yield "head", (d, config.vocab_size)
    if not config.tie_word_embeddings:
        yield "embedding", (config.vocab_size, d)
    yield "norm", (d,)
    layer: dict[str, tuple[int, ...]] = {"attention_norm": (d,), "query": (d, q), "key": (d, kv), "value": (d, kv)}
    if config.query_key_norm:
        layer |= {"query_norm": (h,), "key_norm": (h,)}
    layer |= {"output": (q, d), "mlp_norm": (d,)}
    if config.experts is None:
        layer |= {"gate": (d, f), "up": (d, f), "down": (f, d)}
    else:
        e, f = config.experts.count, config.experts.size
        layer |= {"router": (d, e), "expert_gate": (e, d, f), "expert_up": (e, d, f), "expert_down": (e, f, d)}
    if config.query_key_value_bias:
        layer |= {"query_bias": (q,), "key_bias": (kv,), "value_bias": (kv,)}
    for i in range(config.num_layers):
        for name, shape in layer.items():
            yield f"layers.{i}.{name}", shape


@dataclass(frozen=True)
class Checkpoint:
    """A model's files, checked but not read yet.

    Attributes:
        path: the folder or GGUF file.
        config: sizes and switches of the model.
        left_out: names of the tensors that belong to a part which is not loaded, such as one for images.
    """

    path: Path
    config: ModelConfig
    _sources: Mapping[str, tuple[Source, ...]]
    left_out: tuple[str, ...] = ()

    def stored_bytes(self) -> dict[str, int]:
        """Bytes of the tensors in files, by the type they are stored in."""
        sizes: dict[str, int] = {}
        for stored in (source.stored for sources in self._sources.values() for source in sources):
            sizes[stored.encoding] = sizes.get(stored.encoding, 0) + stored.rows * stored.row_bytes
        return sizes

    def tensors(self, dtype: DTypeLike = np.float32) -> Iterator[tuple[str, np.ndarray]]:
        """Reads the parameters one at a time, the largest first.

        Args:
            dtype: float32, bfloat16 or float16.

        Yields:
            `(name, array)` with the names and shapes of `parameter_shapes(self.config)`: `head` `[D, V]`, `embedding`
            `[V, D]` (untied models only), `norm` `[D]`, and for every layer i `layers.i.attention_norm` `[D]`,
            `layers.i.query` `[D, N*H]`, `layers.i.key` and `value` `[D, K*H]`, `output` `[N*H, D]`, `mlp_norm` `[D]`,
            `gate` and `up` `[D, F]`, `down` `[F, D]`, with biases `query_bias` `[N*H]`, `key_bias`, `value_bias`
            `[K*H]`, with norms of heads `query_norm` and `key_norm` `[H]`. Experts are, in place of `gate`, `up` and
            `down`, `router` `[D, E]`, `expert_gate` and `expert_up` `[E, D, F]`, `expert_down` `[E, F, D]`.

        Raises:
            CheckpointError: if a file changed since it was opened, or holds NaN, infinity or what `dtype` cannot.
            TypeError: for another dtype.
        """
        target = float_dtype(dtype)
        for name, shape in parameter_shapes(self.config):
            try:
                array = _load(self._sources[name], shape, target)
            except OSError as error:
                raise CheckpointError(f"Cannot read {self.path}: {error}") from error
            yield name, array


def _load(sources: tuple[Source, ...], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """One matrix or vector, or a stack of matrices, each read into its place."""
    if len(shape) < 3:
        return sources[0].load(dtype)
    stack = np.empty(shape, dtype)
    for i, source in enumerate(sources):
        stack[i] = source.load(dtype)
    return stack


def settle_tie(
    config: ModelConfig, stored: Mapping[str, Stored], names: Mapping[str, str]
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


def _are_one_matrix(a: Stored, b: Stored) -> bool:
    if a.shape != b.shape or 0 in a.shape:
        return False
    exact = a.encoding in DTYPES and b.encoding in DTYPES
    # Copies at two precisions are compared row by row, which takes decoding: 64 rows tell one matrix from two.
    step = max(1, BLOCK_VALUES // a.columns) if exact else 1
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


@dataclass(frozen=True)
class Names:
    """What a format calls our parameters: `ends` those outside layers, `layer` those of one, after `prefix` and number.

    Parameters that are called the same lie in one stored matrix, one after another, in our order.
    """

    ends: Mapping[str, str]
    layer: Mapping[str, str]
    prefix: str

    def of(self, name: str, shape: tuple[int, ...]) -> Iterator[str]:
        """The stored tensor of a parameter, or of a stack that is stored one by one each of its matrices'."""
        if name in self.ends:
            yield self.ends[name]
            return
        _, i, part = name.split(".")
        stored = f"{self.prefix}.{i}.{self.layer[part]}"
        yield from map(stored.format, range(shape[0])) if "{}" in stored else [stored]


def paired(
    path: Path,
    config: ModelConfig,
    stored: Mapping[str, Stored],
    names: Names,
    ignored: set[str],
    interleaved: bool = False,
    scales: Mapping[str, float] | None = None,
) -> Checkpoint:
    """Pairs every parameter with a stored tensor and checks that names and shapes fit.

    `ignored` are the stored tensors that nobody needs; of an `interleaved` file the rows of queries and keys are in
    pairs of neighbours, and `scales` says by our names what else to multiply.
    """
    # Lazily, and only the first few: a damaged layer count could ask for billions.
    wanted = (theirs for parameter in parameter_shapes(config) for theirs in names.of(*parameter))
    missing = list(islice((name for name in wanted if name not in stored), 5))
    if missing:
        ends = "" if config.tie_word_embeddings else " and a head of its own (tie_word_embeddings is false)"
        raise CheckpointError(
            f"{path}: tensors are missing: {listed(missing)}. Expected for a {config.architecture!r} model with "
            f"{config.num_layers} layers{ends if names.ends['head'] in missing else ''}; download the model again."
        )
    together: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for name, shape in parameter_shapes(config):
        for theirs in names.of(name, shape):
            together.setdefault(theirs, []).append((name, shape))
    heads = {"query": config.num_heads, "key": config.num_kv_heads} if interleaved else {}
    found: dict[str, list[Source]] = {}
    for theirs, parameters in together.items():
        for name, source in _sources(theirs, stored[theirs], parameters, heads):
            scale = (scales or {}).get(name.split(".")[-1], 1.0)
            found.setdefault(name, []).append(replace(source, scale=scale))
    sources = {name: tuple(found[name]) for name, _ in parameter_shapes(config)}
    for name, shape in parameter_shapes(config):
        if len(shape) == 3 and len(sources[name]) != shape[0]:
            raise CheckpointError(
                f"{path}: {len(sources[name])} experts are stored for {name}, the configuration wants {shape[0]}."
            )
    if unexpected := sorted(set(stored) - set(together) - ignored):
        raise UnsupportedModelError(
            f"{path}: tensors that a {config.architecture!r} model with {config.num_layers} layers has no place for: "
            f"{listed(unexpected)}."
        )
    return Checkpoint(path, config, sources)


def _sources(
    theirs: str, tensor: Stored, parameters: list[tuple[str, tuple[int, ...]]], heads: Mapping[str, int]
) -> Iterator[tuple[str, Source]]:
    """Where each of the parameters lies in the stored tensor that holds them all; of a stack, each of its matrices that
    lie there."""
    if len(parameters[0][1]) == 3:
        yield from _stacked(theirs, tensor, *parameters[0])
        return
    transposed = {name: len(shape) == 2 and name != "embedding" for name, shape in parameters}
    theirs_of = {name: shape[::-1] if transposed[name] else shape for name, shape in parameters}
    rows = [shape[0] for shape in theirs_of.values()]
    expected = (sum(rows), *next(iter(theirs_of.values()))[1:])
    if tensor.shape != expected:
        sizes = " + ".join(_SIZES[name.split(".")[-1]] for name in theirs_of)
        raise CheckpointError(
            f"{tensor.path}: tensor {theirs!r} has shape {tensor.shape}, the configuration wants {expected} ({sizes})."
        )
    for i, name in enumerate(theirs_of):
        part = tensor if len(rows) == 1 else tensor.part(sum(rows[:i]), sum(rows[: i + 1]))
        yield name, Source(theirs, part, transposed[name], heads.get(name.split(".")[-1].removesuffix("_bias"), 0))


def _stacked(theirs: str, tensor: Stored, name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Source]]:
    """The matrices of a stack that a stored tensor holds: one of them, or all."""
    count, columns, rows = shape
    if tensor.shape not in ((rows, columns), (count, rows, columns)):
        raise CheckpointError(
            f"{tensor.path}: tensor {theirs!r} has shape {tensor.shape}, the configuration wants {(rows, columns)} for "
            f"an expert ({_SIZES[name.split('.')[-1]]})."
        )
    for start in range(0, tensor.rows, rows):
        yield name, Source(theirs, tensor.part(start, start + rows), True, 0)


def float_dtype(dtype: DTypeLike) -> np.dtype:
    target = np.dtype(dtype)
    if target not in DTYPES.values():
        raise TypeError(f"Weights are loaded as float32, bfloat16 or float16, not {target}.")
    return target
