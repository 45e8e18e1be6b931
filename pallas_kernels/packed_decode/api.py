"""Attention of a few new tokens over the segments of a cache, packed or dense, one by one or all together."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast, overload

from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation, check_softmax, first_that_accepts, without_soft_cap
from pallas_kernels.hadamard import rotate_back
from pallas_kernels.packed_decode import triton, xla
from pallas_kernels.packed_decode.layout import PackedTensor
from pallas_kernels.partial import Partial, merge_partials, with_sinks


def _mosaic_gpu(*args, **kwargs):
    try:  # on the first call: programs without a GPU never pay for the import
        from pallas_kernels.packed_decode import mosaic_gpu
    except ImportError as error:
        raise NotImplementedError(f"this JAX has no Pallas Mosaic GPU ({error})") from error
    return mosaic_gpu.packed_decode_attention(*args, **kwargs)


_PACKED = {
    "mosaic_gpu": without_soft_cap(_mosaic_gpu),
    "triton": without_soft_cap(triton.packed_decode_attention),
    "xla": xla.packed_decode_attention,
}
_DENSE = {"triton": without_soft_cap(triton.dense_decode_attention), "xla": xla.dense_decode_attention}
_DEFAULT = ("triton", "xla")


class Part(NamedTuple):
    """One segment, and the queries that meet it: as `packed_decode_attention` and `dense_decode_attention` take them.

    Segments may hold keys in different bases (balanced, rotated, some channels alone), so each has its own queries.
    """

    query: Float[Array, "B T N C"]
    keys: PackedTensor | Float[Array, "B K S C"]
    values: PackedTensor | Float[Array, "B K S H"]
    lengths: Int[Array, "..."]


# A Part whose keys, and so its values, are of one kind.
type _Packed = tuple[Array, PackedTensor, PackedTensor, Array]
type _Dense = tuple[Array, Array, Array, Array]


def packed_decode_attention(
    query: Float[Array, "B T N C"],
    keys: PackedTensor,
    values: PackedTensor,
    lengths: Int[Array, "B"] | Int[Array, "B K"],
    *,
    scale: float | None = None,
    return_logits: bool = False,
    soft_cap: float | None = None,
    implementation: Implementation = None,
) -> Partial | tuple[Partial, Float[Array, "B T N S"]]:
    """Partial attention over packed keys and values: every query sees the first `lengths` tokens of its sequence.

    Codes are unpacked on the way; no dequantised copy of the segment exists. What lies beyond a length is never read
    into a result.

    Args:
        query: [B, T, N, C], T new tokens; any float dtype. N is a multiple of K.
        keys: packed keys of C channels, layout of `layout.py`.
        values: packed values of H channels; C differs from H where keys are held narrower.
        lengths: tokens held, per sequence or per sequence and key/value head; 0 <= length <= capacity.
        scale: of the logits; default H ** -0.5.
        return_logits: also return the scaled logits of every token, float32; beyond a length they mean nothing. With
            the log-sum-exp of all segments they are the attention row that H2O and MiKV add up.
        soft_cap: c bounds logits x by c tanh(x / c), before anything else sees them; "xla" alone does so.
        implementation: None, "triton", "mosaic_gpu" (Hopper, 2 bits), "xla", or a sequence of names to try; None is
            Triton on a CUDA device where it accepts the format, else XLA.

    Returns:
        Float32 `Partial`, to be joined with other segments by `merge_partials`; with `return_logits` also the logits.

    Raises:
        ValueError: shapes that contradict each other.
        NotImplementedError: a named implementation cannot run these arguments.
    """
    part = _checked_packed(Part(query, keys, values, lengths))
    return _dispatch("packed_decode_attention", _PACKED, implementation, part, scale, return_logits, soft_cap)


def dense_decode_attention(
    query: Float[Array, "B T N C"],
    key: Float[Array, "B K S C"],
    value: Float[Array, "B K S H"],
    lengths: Int[Array, "B"] | Int[Array, "B T"] | Int[Array, "B T K"],
    *,
    scale: float | None = None,
    return_logits: bool = False,
    soft_cap: float | None = None,
    implementation: Implementation = None,
) -> Partial | tuple[Partial, Float[Array, "B T N S"]]:
    """Partial attention over dense keys and values; query t of a sequence sees the first `lengths[b, t]` rows.

    Args:
        query: [B, T, N, C].
        key: [B, K, S, C], head-major, the layout of a cache.
        value: [B, K, S, H]; C differs from H where keys are held narrower.
        lengths: visible rows, per sequence, per query or per query and key/value head; 0 <= length <= S.
        scale: of the logits; default H ** -0.5.
        return_logits: as in `packed_decode_attention`.
        soft_cap: c bounds logits x by c tanh(x / c), before anything else sees them; "xla" alone does so.
        implementation: None, "triton", "xla", or a sequence of names to try, as in `packed_decode_attention`.

    Returns:
        Float32 `Partial`; with `return_logits` also the logits.

    Raises:
        ValueError: shapes that contradict each other.
        NotImplementedError: a named implementation cannot run these arguments.
    """
    part = _checked_dense(Part(query, key, value, lengths))
    return _dispatch("dense_decode_attention", _DENSE, implementation, part, scale, return_logits, soft_cap)


@overload
def partial_attention(part: Part, *, return_logits: Literal[False] = False, **options: Any) -> Partial: ...
@overload
def partial_attention(
    part: Part, *, return_logits: Literal[True], **options: Any
) -> tuple[Partial, Float[Array, "B T N S"]]: ...
def partial_attention(part: Part, **options: Any) -> Partial | tuple[Partial, Float[Array, "B T N S"]]:
    """Partial attention over one segment, packed or dense; options are those of the two functions above."""
    if isinstance(part.keys, PackedTensor):
        return packed_decode_attention(*cast(_Packed, part), **options)
    return dense_decode_attention(*cast(_Dense, part), **options)


def decode_attention(
    parts: Sequence[Part],
    *,
    scale: float | None = None,
    return_logits: bool = False,
    rotated: Float[Array, "B K"] | None = None,
    balanced: Float[Array, "B K H"] | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    implementation: Implementation = None,
) -> tuple[Array, ...]:
    """Softmax attention over several segments as one: what `merge_partials` makes of their partials.

    On a CUDA device one or two segments take a launch each and one that joins all their shares; a small dense window
    behind the last of them goes along in its launch, if that one is packed. XLA joins what is more than that.

    Args:
        parts: the segments; all queries have one dtype and, but for channels, one shape. Values are of one head size.
        scale: of the logits; default H ** -0.5.
        return_logits: also return the logits of the first part, as `packed_decode_attention` does.
        rotated: values are held rotated (`pallas_kernels.hadamard.rotate`) in these units of their head: the output is
            rotated back, and times them. H is then a power of two.
        balanced: channels of values were multiplied by these powers of two before they were rotated: what is rotated
            back is divided by them. Goes with `rotated`.
        soft_cap: as `packed_decode_attention`.
        sinks: [N] logits that take a share of each query's attention and have no value; part of the log-sum-exp.
        implementation: None, "triton", "xla", or a sequence of names to try. None is Triton for all segments together
            where it accepts them, else each segment by what suits it.

    Returns:
        output [B, T, N, H] in the query's dtype and natural log-sum-exp [B, T, N] float32; with `return_logits` also
        the logits [B, T, N, S].

    Raises:
        ValueError: no parts, or shapes that contradict each other.
        NotImplementedError: a named implementation cannot run these arguments.
    """
    if not parts:
        raise ValueError("decode_attention needs at least one segment.")
    parts = [_checked_packed(p) if isinstance(p.keys, PackedTensor) else _checked_dense(p) for p in parts]
    if len({(p.query.shape[:3], p.query.dtype, _head_size(p)) for p in parts}) > 1:
        found = [(p.query.shape, str(p.query.dtype), _head_size(p)) for p in parts]
        raise ValueError(f"all queries and head sizes of values must be alike, not {found}.")
    if rotated is not None or balanced is not None:
        _check_rotated(rotated, balanced, parts[0])
    check_softmax(soft_cap, sinks, parts[0].query.shape[2])
    together = {
        "triton": without_soft_cap(triton.decode_attention),
        "xla": lambda *args, **options: _one_by_one(*args, **options, implementation="xla"),
        "one by one": _one_by_one,
    }
    default = ("triton", "one by one")
    scale = _head_size(parts[0]) ** -0.5 if scale is None else scale
    output, lse, *logits = first_that_accepts(
        "decode_attention", together, implementation, default,
        parts, scale=scale, return_logits=return_logits, rotated=rotated, balanced=balanced,
        soft_cap=soft_cap,
    )  # fmt: skip
    if sinks is not None:
        output, lse = with_sinks(output, lse, sinks)
    return output, lse, *logits


def _one_by_one(
    parts,
    *,
    scale: float,
    return_logits: bool,
    rotated: Float[Array, "B K"] | None,
    balanced: Float[Array, "B K H"] | None,
    soft_cap: float | None,
    implementation: Implementation = None,
):
    partials, logits = [], None
    for i, part in enumerate(parts):
        options: dict[str, Any] = {"scale": scale, "soft_cap": soft_cap, "implementation": implementation}
        if return_logits and i == 0:
            partial, logits = partial_attention(part, return_logits=True, **options)
        else:
            partial = partial_attention(part, **options)
        partials.append(partial)
    output, lse = merge_partials(partials)
    output = output.astype(parts[0].query.dtype)
    if rotated is not None:
        output = rotate_back(output, rotated, balanced)
    return (output, lse, logits) if return_logits else (output, lse)


def _check_rotated(units: Array | None, balances: Array | None, part: Part) -> None:
    b, _, n, _ = part.query.shape
    h = _head_size(part)
    if units is None:
        raise ValueError("balanced goes with rotated: give the units of the heads too.")
    if units.ndim != 2 or units.shape[0] != b or n % units.shape[1] or h & (h - 1):
        raise ValueError(f"rotated {units.shape} must be [B, K] of query {part.query.shape}, whose H is a power of 2.")
    if balances is not None and balances.shape != (*units.shape, h):
        raise ValueError(f"balanced {balances.shape} must be [B, K, H]={(*units.shape, h)}.")


def _dispatch(name: str, implementations, chosen: Implementation, part: Part, scale, return_logits: bool, soft_cap):
    check_softmax(soft_cap, None, part.query.shape[2])
    scale = _head_size(part) ** -0.5 if scale is None else scale
    return first_that_accepts(
        name, implementations, chosen, _DEFAULT, *part, scale=scale, return_logits=return_logits, soft_cap=soft_cap
    )


def _head_size(part: Part) -> int:
    """That of values, and of the model: keys may be held narrower."""
    return part.values.head_size if isinstance(part.values, PackedTensor) else part.values.shape[-1]


def _checked_packed(part: Part) -> Part:
    query, keys, values, lengths = cast(_Packed, part)
    b, _, n, h = query.shape
    heads = _check("keys", keys, h)
    if _check("values", values, values.head_size) != heads or keys.codes.shape[:3] != values.codes.shape[:3]:
        raise ValueError(f"keys {keys.codes.shape} and values {values.codes.shape} must agree in [B, K, blocks].")
    if keys.codes.shape[0] != b or n % heads:
        raise ValueError(f"query {query.shape} does not fit keys of batch {keys.codes.shape[0]} and {heads} heads.")
    if lengths.shape not in ((b,), (b, heads)):
        raise ValueError(f"lengths {lengths.shape} must be [B]={(b,)} or [B, K]={(b, heads)}.")
    return part


def _checked_dense(part: Part) -> Part:
    query, key, value, lengths = cast(_Dense, part)
    b, t, n, h = query.shape
    heads = key.shape[1]
    if key.shape[:3] != value.shape[:3] or key.shape[0] != b or key.shape[3] != h or n % heads:
        raise ValueError(f"query {query.shape}, key {key.shape} and value {value.shape} do not fit together.")
    if lengths.shape not in ((b,), (b, t), (b, t, heads)):
        raise ValueError(f"lengths {lengths.shape} must be [B], [B, T] or [B, T, K] for query {query.shape}.")
    return part


def _check(name: str, packed: PackedTensor, head_size: int) -> int:
    if packed.head_size != head_size:
        raise ValueError(f"{name} have head size {packed.head_size}, the query {head_size}.")
    if packed.scale.shape != packed.zero.shape or packed.scale.shape[:3] != packed.codes.shape[:3]:
        raise ValueError(
            f"{name}: codes {packed.codes.shape}, scale {packed.scale.shape} and zero {packed.zero.shape} "
            "must agree in [B, K, blocks]."
        )
    return packed.codes.shape[1]
