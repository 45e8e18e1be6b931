"""Codecs: how a tier stores keys and values, and the way from numbers to codes and back."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from minikv_jax import channels
from minikv_jax.checks import check_types, require
from pallas_kernels import quantize
from pallas_kernels.packed_decode.layout import BLOCK, SUPPORTED_BITS, GroupAxis
from pallas_kernels.quantize import Codes

# Consecutive numbers that share a scale: a count, or a part of the head.
type GroupSize = int | Literal["half_head", "head"]
type MetadataDtype = Literal["float16", "bfloat16", "float8_e4m3fn"]


@dataclasses.dataclass(frozen=True)
class Codec:
    """How a tier stores its keys and values.

    Attributes:
        key_bits: 1, 2, 3, 4 or 8; 16 stores the cache's dense dtype and has no groups.
        value_bits: as key_bits. Both are 16 or neither is.
        key_group: numbers that share a scale and a minimum.
        value_group: likewise, over the channels of one token.
        key_axis: "tokens" groups consecutive kept tokens of one channel (KIVI, MiniKV), "channels" consecutive
            channels of one token (MiKV).
        metadata_dtype: of scales and minima.
        balance: divide key channels by how loud they are next to the queries', and multiply the queries (MiKV
            equations 2-4).
        key_clip: shrink factors of a group's range to try; the one with the smallest squared error is kept.
        value_clip: likewise for values.
        key_feedback: whether rounding errors of key channels are made up for in the channels after them, as far as the
            prompt's queries can tell (GPTQ, arXiv 2210.17323, with queries in the place of a layer's inputs): "none",
            of the "prompt", where it costs no memory, or of "all" keys: for those of new tokens a tier keeps half a
            matrix [H, H] a head, in the metadata's dtype, of what the prompt's queries were.
        integer_zero: the minimum is a whole number of scales (Q-Hitter's quantiser).
        key_drop: share of a head's key channels that are left out, those that the prompt's last queries use least
            (`channels`, ThinK).
    """

    key_bits: int = 16
    value_bits: int = 16
    key_group: GroupSize = 16
    value_group: GroupSize = 16
    key_axis: GroupAxis = "tokens"
    metadata_dtype: MetadataDtype = "float16"
    balance: bool = False
    key_clip: tuple[float, ...] = ()
    value_clip: tuple[float, ...] = ()
    key_feedback: Literal["none", "prompt", "all"] = "none"
    integer_zero: bool = False
    key_drop: float = 0.0

    def __post_init__(self):
        check_types(self)
        for name, bits in (("key_bits", self.key_bits), ("value_bits", self.value_bits)):
            require(bits in (*SUPPORTED_BITS, 16), f"{name}={bits}: choose one of {(*SUPPORTED_BITS, 16)}.")
        require(
            (self.key_bits == 16) == (self.value_bits == 16),
            f"key_bits={self.key_bits} and value_bits={self.value_bits}: 16 bits go for both or for neither.",
        )
        for name, size in (("key_group", self.key_group), ("value_group", self.value_group)):
            require(isinstance(size, str) or size >= 1, f"{name}={size}: give at least 1.")
        over_tokens = not self.dense and self.key_axis == "tokens"
        require(
            not over_tokens or (isinstance(self.key_group, int) and BLOCK % self.key_group == 0),
            f"key_group={self.key_group} over tokens must divide {BLOCK}.",
        )
        for name, factors in (("key_clip", self.key_clip), ("value_clip", self.value_clip)):
            require(all(0 < f <= 1 for f in factors), f"{name}={factors}: factors lie above 0 and at most at 1.")
        require(
            self.key_feedback == "none" or (over_tokens and not self.integer_zero),
            "key_feedback goes from channel to channel: give key_axis='tokens', and no integer_zero.",
        )
        clipped = bool(self.key_clip or self.value_clip)
        plain = not (self.balance or clipped or self.integer_zero)
        require(plain or not self.dense, "balance, clip and integer_zero need fewer than 16 bits.")
        require(0 <= self.key_drop < 1, f"key_drop={self.key_drop}: give a share from 0.0 to below 1.0.")

    @property
    def dense(self) -> bool:
        return self.key_bits == 16

    @property
    def token_group(self) -> int:
        """Tokens that can only be encoded together."""
        return self.key_group if isinstance(self.key_group, int) and self.grouped_over_tokens else 1

    @property
    def grouped_over_tokens(self) -> bool:
        return not self.dense and self.key_axis == "tokens"

    def fits(self, head_size: int) -> bool:
        """Whether the groups over channels divide a head."""
        if self.dense:
            return True
        width = self.key_channels(head_size)
        over_channels = self.key_axis == "channels"
        keys_fit = not over_channels or width % group_size(self.key_group, width) == 0
        return keys_fit and head_size % group_size(self.value_group, head_size) == 0

    def key_channels(self, head_size: int) -> int:
        """Channels that are held of each key."""
        return channels.kept(head_size, self.key_drop)


def group_size(size: GroupSize, head_size: int) -> int:
    """Numbers in a group of rows of `head_size` channels."""
    if isinstance(size, int):
        return size
    return {"head": head_size, "half_head": head_size // 2}[size]


def each_token(bits: int, group: GroupSize) -> Codec:
    """Every token on its own, in groups of so many channels; 16 bits are dense."""
    return Codec() if bits == 16 else Codec(bits, bits, group, group, "channels")


# (bits, group size, group axis, tokens last) of keys or of values.
type Layout = tuple[int, int, GroupAxis, bool]


def key_layout(codec: Codec, width: int) -> Layout:
    """That of keys of so many channels."""
    return codec.key_bits, group_size(codec.key_group, width), codec.key_axis, False


def value_layout(codec: Codec, width: int) -> Layout:
    """That of values of so many channels."""
    return codec.value_bits, group_size(codec.value_group, width), "channels", True


def encode_keys(
    codec: Codec,
    key: Float[Array, "B K S H"],
    balance: Float[Array, "B K H"] | None,
    coupling: Float[Array, "B K H H"] | None = None,
) -> Codes:
    """Codes of keys; with feedback where there is a `coupling` (`quantize.coupling_of`)."""
    bits, group, axis, _ = key_layout(codec, key.shape[-1])
    if balance is not None:
        key = key.astype(jnp.float32) * balance[:, :, None]
    if coupling is None:
        return quantize.encode(key, bits, group, axis, codec.metadata_dtype, codec.key_clip, codec.integer_zero)
    return quantize.encode_with_feedback(key, coupling, bits, group, codec.metadata_dtype, codec.key_clip)


def encode_values(codec: Codec, value: Float[Array, "B K S H"]) -> Codes:
    """Codes of values."""
    bits, group, axis, _ = value_layout(codec, value.shape[-1])
    return quantize.encode(value, bits, group, axis, codec.metadata_dtype, codec.value_clip, codec.integer_zero)


def decode(
    codec: Codec, keys: Codes, values: Codes, balance: Float[Array, "B K C"] | None
) -> tuple[Float[Array, "B K S C"], Float[Array, "B K S H"]]:
    """Keys and values as attention effectively sees them, float32."""
    layouts = key_layout(codec, keys.codes.shape[-1]), value_layout(codec, values.codes.shape[-1])
    key, value = (quantize.decode(codes, group, axis) for codes, (_, group, axis, _) in zip((keys, values), layouts))
    return key if balance is None else key / balance[:, :, None], value


def through(
    codec: Codec, key: Float[Array, "B K S H"], value: Float[Array, "B K S V"]
) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S V"]]:
    """Keys and values as the codec gives them back, float32."""
    return decode(codec, encode_keys(codec, key, None), encode_values(codec, value), None)


def coupling(
    codec: Codec, balance: Float[Array, "B K H"] | None, moment: Float[Array, "B K H H"]
) -> Float[Array, "B K H H"] | None:
    """That of the moment of the queries as they meet the stored keys, if the codec wants feedback."""
    if codec.key_feedback == "none":
        return None
    if balance is not None:
        moment = moment / (balance[..., None] * balance[..., None, :])
    return quantize.coupling_of(moment)
