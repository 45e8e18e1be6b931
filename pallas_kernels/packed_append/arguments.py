"""What goes into the operations that write to a packed cache, and what comes back."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.packed_decode.layout import PackedTensor


class Run(NamedTuple):
    """Rows `first` .. `first + count` of dense rows, to become tokens `start` and on where `when`; `count` static."""

    rows: Float[Array, "B K R H"]
    first: Int[Array, "B"]
    start: Int[Array, "B"]
    when: Bool[Array, "B"]
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]  # nobody counts the fields of a Run


class Rotation(NamedTuple):
    """What is rotated on arrival beside the new rows, and what those held are scaled by; see `api.packed_append`.

    Both balances are there or neither is.
    """

    query: Float[Array, "B 1 N H"]
    key_unit: Float[Array, "B K"]
    value_unit: Float[Array, "B K"]
    key_balance: Float[Array, "B K H"] | None = None
    value_balance: Float[Array, "B K H"] | None = None


class Appended(NamedTuple):
    """Window and segment after a token has arrived, and its query if that was rotated."""

    window_key: Float[Array, "B K W H"]
    window_value: Float[Array, "B K W H"]
    window_length: Int[Array, "B"]
    keys: PackedTensor
    values: PackedTensor
    length: Int[Array, "B"]
    query: Float[Array, "B 1 N H"] | None = None


class Options(NamedTuple):
    """What is more than plain encoding; see `api.packed_append`."""

    key_clip: tuple[float, ...] = ()
    value_clip: tuple[float, ...] = ()
    key_factor: Float[Array, "B K C"] | None = None
    key_coupling: Float[Array, "B K half C"] | None = None
    integer_zero: bool = False
    key_channels: Int[Array, "B K C"] | None = None
