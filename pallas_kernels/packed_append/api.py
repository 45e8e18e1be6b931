"""New tokens into a dense window and, when it is full, as codes into the packed segment behind it: in place."""

from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dispatch import Implementation, first_that_accepts
from pallas_kernels.packed_append import triton, xla
from pallas_kernels.packed_append.arguments import Appended, Options, Rotation, Run
from pallas_kernels.packed_decode.layout import PackedTensor

_APPEND = {"triton": triton.packed_append, "xla": xla.packed_append}
_WRITE = {"triton": triton.packed_write, "xla": xla.packed_write}
_DEFAULT = ("triton", "xla")
PLAIN = Options()


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
    first: int = 0,
    keeps: int = 0,
    options: Options = PLAIN,
    rotation: Rotation | None = None,
    implementation: Implementation = None,
) -> Appended:
    """Appends one token to the window of every accepting sequence, and encodes the windows that are full with it.

    Codes are value = code * scale + minimum with scale = (max - min) / (2**bits - 1) of each group, computed in float32
    against scale and minimum as they are stored (KIVI, arXiv 2402.02750, equation 1). Metadata shorter than float16 is
    also tried rounded outwards, so that codes reach the whole range. A full window's rows from `first`
    on, but for the last `keeps`, become tokens `length` and on of the segment; those move to row `first`, behind which
    the window then ends. Donate what changes: under `jit` it is then changed in place.

    Args:
        new_key, new_value: [B, K, 1, H].
        accept: [B]; other sequences stay as they are.
        window_key, window_value: [B, K, W, H] dense rows, of which `window_length` [B] < W are there.
        keys, values: packed (`layout.py`), with `length` [B] tokens; a multiple of the keys' group.
        first: rows of the window that are never encoded; static.
        keeps: rows that stay dense when the others are encoded, at most half of those behind `first`; static.
        options: `key_clip` and `value_clip` are shrink factors of a group's range to try beside 1; the one with the
            smallest squared error is kept. `key_factor` [B, K, H] multiplies keys before they are encoded.
            `key_coupling` [B, K, H / 2, H], a folded triangle (`pallas_kernels.quantize.fold`) in the metadata's dtype,
            says how the rounding error of each channel of a key is added to later ones. With `integer_zero` a minimum
            is a whole number of scales (Q-Hitter). With `key_channels` [B, K, C] the packed keys have these channels of
            the window's alone, and factors and couplings are of C channels; "xla" alone does so.
        rotation: the new rows, and the `query` [B, 1, N, H] with them, are as a model gives them, and those held are
            rotated (`pallas_kernels.hadamard.rotate`) and in units of their head, `key_unit` and `value_unit` [B, K],
            powers of two. With `key_balance` and `value_balance` [B, K, H], powers of two likewise, their channels are
            multiplied by these before they are rotated, and those of the query divided by the keys'.
        implementation: None, "triton", "xla", or a sequence of names to try; None is Triton on a CUDA device where it
            accepts the formats, else XLA.

    Returns:
        What changed, and with `rotation` the query as it meets the keys held: balanced, rotated, times their unit.

    Raises:
        ValueError: shapes that contradict each other.
        NotImplementedError: a named implementation cannot run these arguments.
    """
    b, heads, window, h = window_key.shape
    if window_key.shape != window_value.shape or not new_key.shape == new_value.shape == (b, heads, 1, h):
        raise ValueError(
            f"new key {new_key.shape} and value {new_value.shape} do not fit windows {window_key.shape} and "
            f"{window_value.shape}."
        )
    _check(keys, values, options, window_key.shape, accept, window_length, length)
    if rotation is not None:
        _check_rotation(rotation, b, heads, h)
    if not 0 <= first < window:
        raise ValueError(f"first={first} must be a row of the window of {window}.")
    if not 0 <= 2 * keeps <= window - first:
        raise ValueError(f"keeps={keeps} must be at most half of the {window - first} rows behind first={first}.")
    return first_that_accepts(
        "packed_append", _APPEND, implementation, _DEFAULT,
        new_key, new_value, accept, window_key, window_value, window_length, keys, values, length,
        first=first, keeps=keeps, options=options, rotation=rotation,
    )  # fmt: skip


def packed_write(
    key: Run,
    value: Run,
    keys: PackedTensor,
    values: PackedTensor,
    *,
    options: Options = PLAIN,
    implementation: Implementation = None,
) -> tuple[PackedTensor, PackedTensor]:
    """Encodes a run of dense keys, and one of dense values, into packed ones. Codes and options as `packed_append`.

    Args:
        key: its start and count are multiples of the keys' group.
        value: a run of any count.
        keys, values: packed; changed in place where they are donated.

    Raises:
        ValueError: shapes that contradict each other.
        NotImplementedError: a named implementation cannot run these arguments.
    """
    for run in (key, value):
        _check(keys, values, options, run.rows.shape, run.first, run.start, run.when)
        if not 0 < run.count <= run.rows.shape[2]:
            raise ValueError(f"A run of {run.count} does not fit {run.rows.shape[2]} rows.")
    return first_that_accepts(
        "packed_write", _WRITE, implementation, _DEFAULT,
        key, value, keys, values, options=options,
    )  # fmt: skip


def _check_rotation(rotation: Rotation, b: int, heads: int, h: int) -> None:
    query, *units = rotation[:3]
    balances = rotation[3:]
    if query.ndim != 4 or (query.shape[0], query.shape[1], query.shape[3]) != (b, 1, h) or query.shape[2] % heads:
        raise ValueError(f"Query {query.shape} must be [B, 1, N, H] for {b} sequences, {heads} heads of size {h}.")
    if any(unit.shape != (b, heads) for unit in units):
        raise ValueError(f"Units {[unit.shape for unit in units]} must be [B, K]={(b, heads)}.")
    shapes = [None if x is None else x.shape for x in balances]
    if shapes not in ([None, None], [(b, heads, h)] * 2):
        raise ValueError(f"Balances {shapes} must both be [B, K, H]={(b, heads, h)}, or None.")
    if h & (h - 1):
        raise ValueError(f"Rows of {h} channels: the Hadamard rotation needs a power of two.")


def _check(
    keys: PackedTensor, values: PackedTensor, options: Options, rows: tuple[int, ...], *per_sequence: Array
) -> None:
    b, heads, _, h = rows
    given = options.key_factor, options.key_coupling, options.key_channels
    factor, coupling, channels = (None if x is None else x.shape for x in given)
    width = h if channels is None else channels[-1]
    if channels not in (None, (b, heads, width)):
        raise ValueError(f"key_channels {channels} must be [B, K, C] of {(b, heads)} heads.")
    if factor not in (None, (b, heads, width)):
        raise ValueError(f"key_factor {factor} must be {(b, heads, width)}.")
    if coupling not in (None, (b, heads, width // 2, width)):
        raise ValueError(f"key_coupling {coupling} must be {(b, heads, width // 2, width)}.")
    for packed, own in ((keys, width), (values, h)):
        if packed.codes.shape[:2] != (b, heads) or packed.head_size != own:
            raise ValueError(f"Rows {rows} do not fit codes {packed.codes.shape} of head size {packed.head_size}.")
    if any(x.shape != (b,) for x in per_sequence):
        raise ValueError(f"Counters {[x.shape for x in per_sequence]} must be [B]={(b,)}.")
