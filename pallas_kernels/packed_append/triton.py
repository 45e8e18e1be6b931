"""Appending to a packed cache on CUDA GPUs from Ampere on, in Triton through jax-triton.

Why. A window of W dense rows is encoded once every W tokens. Written as a condition, the host must read it from the
device before it can launch what comes next, in every layer of every step: the queue of launches runs dry, and a step
costs more for asking than for encoding. Written as masked work it costs the encoding every time. Here each program
reads its sequence's own counters and leaves at once if its window is not full: one launch instead of about six, nothing
for the host to wait for, and all arrays are changed in place (`input_output_aliases`).

    program (head, 0): keys, with queries if rotated             program (head, 1): values

    new row -> window row `window_length`
    window full?  no: done
                  yes: rows -> min, max of each group -> scale, minimum (stored) -> codes -> scratch
                                                                                                      |
                       the run of codes starts anywhere in a block:                                   v
                       block    |..........oooooo|oooooooooo......|    bytes carry tokens that lie P apart (layout.py),
                                           ^ start                     so every byte of a touched block is read, the
                                                                       run's fields replaced, and written back

Codes go through scratch memory (one byte each, 16 KiB a head) because groups and bytes cut the run differently.

The limit. A step in which nothing is full moves two rows a head: the launch is all it costs. A flush of 128 rows of 128
channels reads 64 KiB, and writes 16 KiB, a head; it runs once in 128 steps, so its 2 B K programs need not be fast.

Where rows are held rotated, each program rotates what it loads: as products of their own, with what scales them, they
would be three launches more. A step without a flush is the time that loads and shuffles take one after the other, so
loads come before anything that waits, and each warp writes the row it has, be it a query or the window's.

With feedback between channels (`key_coupling`) those take turns: the scales of eight are searched at once, then each is
rounded, and what that leaves is added to all channels behind it, in registers. A flush of 64 rows of 128 channels is
then a chain of 128 such additions of 64 x 128 numbers, and takes as long as that chain, however few heads there are.
Two warps share a scheduler and wait for one another's instructions, so those are few: tiles have one layout throughout
(a warp keeps its tokens, sums over channels are shuffles), divisions do without the branch for numbers that cannot
occur, and the triangle, folded and in the metadata's dtype, is spread out as float32 first. Read where it lies, each
warp makes an address and a conversion of each byte for itself, for each eight channels: two fifths of all
instructions.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import triton_call
from pallas_kernels.packed_append.arguments import Appended, Options, Rotation, Run
from pallas_kernels.packed_decode.layout import PackedTensor
from pallas_kernels.packed_decode.triton import decline_format, kinds, knows_float8

_DTYPES = ("float32", "bfloat16", "float16")


def decline(rows: tuple[Array, ...], keys: PackedTensor, values: PackedTensor, key_count: int) -> str | None:
    """Why these arguments cannot run here; None when they can."""
    if keys.group_axis != "tokens" or key_count % keys.group_size:
        return f"{key_count} keys in groups of {keys.group_size} {keys.group_axis}: whole groups of tokens run"
    if any(x.dtype.name not in _DTYPES for x in rows):
        return f"rows of {[x.dtype.name for x in rows]}: {_DTYPES} run"
    return decline_format(keys, values)


def _require(rows, keys: PackedTensor, values: PackedTensor, key_count: int, options: Options) -> None:
    reason = decline(rows, keys, values, key_count) or triton_call.decline()
    if options.key_channels is not None:
        reason = "packed keys of some channels alone have no kernel"
    if options.integer_zero:
        reason = "minima that are whole numbers of scales have no kernel"
    if reason is not None:
        raise NotImplementedError(reason)


def constants(keys: PackedTensor, values: PackedTensor, options: Options, float8: bool) -> dict:
    """The kernels' compile-time numbers that say how keys and values are stored; `float8`: the chip knows it."""
    kind = kinds(float8)
    return dict(
        H=keys.head_size,
        KBITS=keys.bits,
        KGROUP=keys.group_size,
        KKIND=kind[keys.scale.dtype.name],
        KCLIP=tuple(map(float, options.key_clip)),
        KFACTOR=options.key_factor is not None,
        KFEEDBACK=options.key_coupling is not None,
        VBITS=values.bits,
        VGROUP=values.group_size,
        VKIND=kind[values.scale.dtype.name],
        VCLIP=tuple(map(float, options.value_clip)),
    )


def _optional(keys: PackedTensor, options: Options, instead: Array) -> list[Array]:
    """The keys' factor and coupling; `instead` of one that is not there, a pointer that is never followed."""
    factor, coupling = options.key_factor, options.key_coupling
    factor = instead if factor is None else factor.astype(jnp.float32)
    return [factor, *([instead] if coupling is None else _arrays(coupling.astype(keys.scale.dtype)))]


def _arrays(*trees: PackedTensor | Array) -> list[Array]:
    """All arrays. Triton knows no float8 on older chips: there it gets bytes, which costs XLA a copy."""
    leaves = jax.tree.leaves(trees)
    if knows_float8():
        return leaves
    return [jax.lax.bitcast_convert_type(x, jnp.uint8) if x.dtype.itemsize == 1 else x for x in leaves]


def _restored(arrays: list[Array], like: tuple[PackedTensor, PackedTensor]) -> tuple[PackedTensor, PackedTensor]:
    leaves, structure = jax.tree.flatten(like)
    arrays = [x if x.dtype == y.dtype else jax.lax.bitcast_convert_type(x, y.dtype) for x, y in zip(arrays, leaves)]
    return jax.tree.unflatten(structure, arrays)


def _scratch(b: int, heads: int, head_size: int, options: Options, *counts: int) -> list[jax.ShapeDtypeStruct]:
    """Memory for codes of runs of `counts` rows, and for the coupling unfolded."""
    codes = [jax.ShapeDtypeStruct((b, heads, count, head_size), jnp.uint8) for count in counts]
    unfolded = (1,) if options.key_coupling is None else (b, heads, head_size, head_size)
    return [*codes, jax.ShapeDtypeStruct(unfolded, jnp.float32)]


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
    b, heads, window, h = window_key.shape
    queries = [] if rotation is None else [jnp.swapaxes(rotation.query, 1, 2)]
    rows = (new_key, new_value, *queries, window_key, window_value)
    count = window - first - keeps
    if window_key.dtype != window_value.dtype:
        raise NotImplementedError(f"windows of {window_key.dtype} and {window_value.dtype}: those of one dtype run")
    _require(rows, keys, values, count, options)
    from pallas_kernels.packed_append import _triton_kernels as kernels

    changed = [window_key, window_value, *_arrays(keys, values)]
    counters = [x.astype(jnp.int32) for x in (accept, window_length, length)]
    # As one array XLA finishes all (rotary embedding, rounding) in one launch.
    new_rows = jnp.concatenate([new_key, new_value, *queries], axis=1)
    units, balances = ([None] * 2, [None] * 2) if rotation is None else (rotation[1:3], rotation[3:])
    # Not cast here: that would be a launch for each. What is not there is a pointer that is never followed.
    scales = [counters[0] if x is None else x for x in (*units, *balances)]
    inputs = [new_rows, *scales, *counters, *_optional(keys, options, counters[0]), *changed]
    scratch = _scratch(b, heads, h, options, count, count)
    query = jax.ShapeDtypeStruct((1,) if rotation is None else rotation.query.shape, new_rows.dtype)
    window_key, window_value, *packed, _, _, _, query = triton_call.call(
        *inputs,
        -heads,
        -keys.codes.shape[2],
        kernel=kernels.append_kernel,
        out_shape=[*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in changed), *scratch, query],
        grid=(b * heads, 2),
        num_warps=8,
        input_output_aliases={len(inputs) - len(changed) + i: i for i in range(len(changed))},
        QUERIES=0 if rotation is None else rotation.query.shape[2] // heads,
        BALANCED=balances[0] is not None,
        WINDOW=window,
        FIRST=first,
        KEEPS=keeps,
        **constants(keys, values, options, knows_float8()),
    )
    keys, values = _restored(packed, (keys, values))
    # Not the kernel's work: XLA counts for all layers in one launch, and needs no copy of what a kernel returned.
    full = accept & (window_length + 1 == window)
    window_length = jnp.where(full, first + keeps, window_length + accept)
    length = jnp.where(full, length + count, length)
    query = None if rotation is None else query
    return Appended(window_key, window_value, window_length, keys, values, length, query)


def packed_write(
    key: Run,
    value: Run,
    keys: PackedTensor,
    values: PackedTensor,
    *,
    options: Options,
) -> tuple[PackedTensor, PackedTensor]:
    b, heads, _, h = key.rows.shape
    _require((key.rows, value.rows), keys, values, key.count, options)
    from pallas_kernels.packed_append import _triton_kernels as kernels

    changed = _arrays(keys, values)
    inputs = []
    for run in (key, value):
        inputs += [run.rows, *(x.astype(jnp.int32) for x in (run.first, run.start, run.when))]
    inputs += _optional(keys, options, inputs[1])
    packed = triton_call.call(
        *inputs,
        *changed,
        -heads,
        -keys.codes.shape[2],
        kernel=kernels.write_kernel,
        out_shape=[
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in changed),
            *_scratch(b, heads, h, options, key.count, value.count),
        ],
        grid=(b * heads, 2),
        num_warps=8,
        input_output_aliases={len(inputs) + i: i for i in range(len(changed))},
        KROWS=key.rows.shape[2],
        KCOUNT=key.count,
        VROWS=value.rows.shape[2],
        VCOUNT=value.count,
        **constants(keys, values, options, knows_float8()),
    )
    return _restored(packed[:6], (keys, values))
