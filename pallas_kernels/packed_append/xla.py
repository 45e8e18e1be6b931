"""Appending to a packed cache in plain XLA: the reference, and the path of CPUs and of codecs without a kernel.

A window is encoded under a condition, which a CPU takes for next to nothing; see triton.py for what it costs a GPU.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import quantize
from pallas_kernels.hadamard import rotate, times_channels, times_unit
from pallas_kernels.packed_append.arguments import Appended, Options, Rotation, Run
from pallas_kernels.packed_decode.layout import PackedTensor
from pallas_kernels.packed_rows import write_codes
from pallas_kernels.quantize import Codes
from pallas_kernels.rows import put_row


def _per_head(x: Int[Array, "B"], heads: int) -> Int[Array, "B K"]:
    return jnp.broadcast_to(x[:, None], (x.shape[0], heads))


def encode_new_keys(rows: Float[Array, "B K S H"], keys: PackedTensor, options: Options) -> Codes:
    """Rows as `keys` are stored; with feedback between channels where there is a coupling."""
    if options.key_channels is not None:
        rows = jnp.take_along_axis(rows, options.key_channels[:, :, None], axis=-1)
    if options.key_factor is not None:
        rows = rows.astype(jnp.float32) * options.key_factor[:, :, None]
    dtype, clip = keys.scale.dtype.name, options.key_clip
    if options.key_coupling is None:
        return quantize.encode(rows, keys.bits, keys.group_size, keys.group_axis, dtype, clip, options.integer_zero)
    coupling = quantize.unfold(options.key_coupling)
    return quantize.encode_with_feedback(rows, coupling, keys.bits, keys.group_size, dtype, clip)


def encode_new_values(rows: Float[Array, "B K S H"], values: PackedTensor, options: Options) -> Codes:
    """Rows as `values` are stored."""
    dtype = values.scale.dtype.name
    return quantize.encode(
        rows, values.bits, values.group_size, values.group_axis, dtype, options.value_clip, options.integer_zero
    )


def _rotated(key, value, rotation: Rotation):
    """New rows [B, K, 1, H] and their queries [B, 1, N, H] as rows are held."""
    key, value = (jnp.swapaxes(x, 1, 2) for x in (key, value))
    query = rotation.query
    if rotation.key_balance is not None and rotation.value_balance is not None:
        query = times_channels(query, 1 / rotation.key_balance)
        key, value = times_channels(key, rotation.key_balance), times_channels(value, rotation.value_balance)
    # One product for all three: a launch costs more than its work.
    heads = query.shape[2], query.shape[2] + key.shape[2]
    together = jnp.concatenate((query, key, value), axis=2)
    query, key, value = jnp.split(rotate(together).astype(together.dtype), heads, axis=2)
    query = times_unit(query, rotation.key_unit)
    key, value = times_unit(key, 1 / rotation.key_unit), times_unit(value, 1 / rotation.value_unit)
    return query, jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)


def packed_append(
    new_key: Float[Array, "B K 1 H"],
    new_value: Float[Array, "B K 1 H"],
    accept: Bool[Array, "B"],
    window_key: Float[Array, "B K W H"],
    window_value: Float[Array, "B K W H"],
    window_length: Int[Array, "B"],
    keys: PackedTensor,
    values: PackedTensor,
    length: Int[Array, "B"],
    *,
    first: int,
    keeps: int,
    options: Options,
    rotation: Rotation | None,
) -> Appended:
    query = None
    if rotation is not None:
        query, new_key, new_value = _rotated(new_key, new_value, rotation)
    heads, window = window_key.shape[1:3]
    slot = _per_head(window_length, heads)
    window_key, window_value = (
        put_row(rows, slot, new, accept) for rows, new in ((window_key, new_key), (window_value, new_value))
    )
    window_length = window_length + accept.astype(jnp.int32)
    full = window_length == window
    last = window - keeps

    def flush(window_key, window_value, window_length, keys, values, length):
        start = _per_head(length, heads)
        count = jnp.where(full, last - first, 0)
        new_keys = encode_new_keys(window_key[:, :, first:last], keys, options)
        new_values = encode_new_values(window_value[:, :, first:last], values, options)
        return (
            _moved(window_key, full, first, keeps),
            _moved(window_value, full, first, keeps),
            window_length - count,
            write_codes(keys, new_keys, start, full),
            write_codes(values, new_values, start, full),
            length + count,
        )

    changed = jax.lax.cond(
        full.any(), flush, lambda *same: same, window_key, window_value, window_length, keys, values, length
    )
    return Appended(*changed, query=query)


def _moved(rows: Float[Array, "B K W H"], full: Bool[Array, "B"], first: int, keeps: int) -> Float[Array, "B K W H"]:
    """Windows whose newest `keeps` rows lie at row `first`, where they were full."""
    if keeps == 0:
        return rows
    moved = rows.at[:, :, first : first + keeps].set(rows[:, :, rows.shape[2] - keeps :])
    return jnp.where(full[:, None, None, None], moved, rows)


def packed_write(
    key: Run, value: Run, keys: PackedTensor, values: PackedTensor, *, options: Options
) -> tuple[PackedTensor, PackedTensor]:
    heads = key.rows.shape[1]

    def taken(run: Run) -> Float[Array, "B K count H"]:
        rows = run.first[:, None] + jnp.arange(run.count, dtype=jnp.int32)[None]
        return jnp.take_along_axis(run.rows, rows[:, None, :, None], axis=2, mode="clip")

    def write_keys(keys):
        return write_codes(keys, encode_new_keys(taken(key), keys, options), _per_head(key.start, heads), key.when)

    # Keys fill whole windows, rarely; a value leaves in every step.
    keys = jax.lax.cond(key.when.any(), write_keys, lambda keys: keys, keys)
    codes = encode_new_values(taken(value), values, options)
    return keys, write_codes(values, codes, _per_head(value.start, heads), value.when)
