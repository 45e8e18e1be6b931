"""What a compressed cache is made of: frozen, hashable parts that travel through `jax.jit` as static data.

Every method in this field is one sentence: **rank** the prompt's tokens, **allocate** a budget to each layer, cut the
ranking into **tiers**, give each tier a **codec** (or drop it), and keep a dense **window** of the newest tokens.
`presets.py` is the table of such sentences.
"""

import dataclasses
from typing import Literal

import jax

from minikv_jax.errors import ConfigError
from pallas_kernels.packed_decode.layout import BLOCK, SUPPORTED_BITS, GroupAxis


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclasses.dataclass(frozen=True)
class Rank:
    """Which tokens matter: the order in which tiers are filled.

    Attributes:
        by: "position" keeps the text's order (nothing is ranked); "attention" ranks by the attention a token received
            from the prompt's queries (H2O, arXiv 2306.14048; MiniKV, arXiv 2411.18077, Algorithm 1).
    """

    by: Literal["position", "attention"] = "position"


@dataclasses.dataclass(frozen=True)
class Allocation:
    """How many of N prompt tokens each layer's first tier takes: int(N * heavy) by rank plus int(N * recent) newest.

    Attributes:
        heavy: share chosen by rank among the tokens outside the recent ones.
        recent: share of newest tokens that are always taken.
        pyramid_depth: None gives every layer the same. A depth d lets the heavy share fall linearly over the layers
            from 2 * heavy - heavy / d to heavy / d, with mean `heavy` (MiniKV section 3.2; the paper's code has 7).
    """

    heavy: float = 1.0
    recent: float = 0.0
    pyramid_depth: float | None = None

    def __post_init__(self):
        for name in ("heavy", "recent"):
            share = getattr(self, name)
            _require(0.0 <= share <= 1.0, f"{name}={share} is a share of the prompt: give a number from 0 to 1.")
        _require(self.heavy + self.recent > 0, "heavy and recent are both 0: nothing would be kept.")
        depth = self.pyramid_depth
        _require(depth is None or depth >= 1, f"pyramid_depth={depth}: give None or a number of at least 1.")

    @property
    def keeps_everything(self) -> bool:
        return self.pyramid_depth is None and self.heavy + self.recent >= 1


@dataclasses.dataclass(frozen=True)
class Codec:
    """How a tier stores its keys and values.

    Attributes:
        key_bits: 1, 2, 3, 4 or 8; 16 stores the model's own dtype and has no groups.
        value_bits: as key_bits. Both are 16 or neither is.
        key_group: numbers that share a scale and a minimum; divides 128 over tokens, the head size over channels.
        value_group: likewise.
        key_axis: "tokens" groups consecutive kept tokens of one channel (KIVI, MiniKV), "channels" consecutive
            channels of one token.
        metadata_dtype: of scales and minima.
    """

    key_bits: int = 16
    value_bits: int = 16
    key_group: int = 16
    value_group: int = 16
    key_axis: GroupAxis = "tokens"
    metadata_dtype: str = "float16"

    def __post_init__(self):
        for name in ("key_bits", "value_bits"):
            bits = getattr(self, name)
            _require(bits in (*SUPPORTED_BITS, 16), f"{name}={bits}: choose one of {(*SUPPORTED_BITS, 16)}.")
        _require(
            (self.key_bits == 16) == (self.value_bits == 16),
            f"key_bits={self.key_bits} and value_bits={self.value_bits}: 16 bits go for both or for neither.",
        )
        for name in ("key_group", "value_group"):
            _require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}: give at least 1.")
        _require(
            self.dense or self.key_axis == "channels" or BLOCK % self.key_group == 0,
            f"key_group={self.key_group} over tokens must divide {BLOCK}.",
        )
        _require(
            self.metadata_dtype in ("float16", "bfloat16", "float8_e4m3fn"),
            f"metadata_dtype={self.metadata_dtype!r}: choose float16, bfloat16 or float8_e4m3fn.",
        )

    @property
    def dense(self) -> bool:
        return self.key_bits == 16

    @property
    def token_group(self) -> int:
        """Tokens that can only be encoded together."""
        return 1 if self.dense or self.key_axis == "channels" else self.key_group


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """A method, and how much room its cache has. Hashable and static: pass it straight through `jax.jit`.

    Attributes:
        name: of the method.
        rank, allocation: choose the tokens of the first tier.
        codec: of the first tier; tokens outside it are dropped.
        window: newest tokens kept in 16 bits until this many can be encoded together. None where the codec is dense.
        dtype: of dense rows, the window's included; None: the model's own.
        prompt_capacity: longest prompt; None: as long as the token array given to `prefill`.
        generated_capacity: tokens that can follow the prompt.
    """

    name: str
    rank: Rank = Rank()
    allocation: Allocation = Allocation()
    codec: Codec = Codec()
    window: int | None = None
    dtype: str | None = None
    prompt_capacity: int | None = None
    generated_capacity: int = 512

    def __post_init__(self):
        for name in ("prompt_capacity", "generated_capacity"):
            tokens = getattr(self, name)
            _require(tokens is None or tokens >= 1, f"{name}={tokens}: give at least 1 token.")
        _require(
            self.dtype in (None, "float32", "bfloat16", "float16"),
            f"dtype={self.dtype!r}: choose float32, bfloat16 or float16, or None for the model's own.",
        )
        if self.codec.dense:
            _require(self.window is None, f"window={self.window}: a dense cache has no window to encode, give None.")
            return
        _require(
            self.window is not None and self.window >= 1, f"window={self.window}: an encoded cache needs one of >= 1."
        )
        group = self.codec.token_group
        _require(
            self.window % group == 0, f"window={self.window} must be a multiple of the key group of {group} tokens."
        )

    def replace(self, **changes) -> "CacheConfig":
        """A copy with some fields changed, as `dataclasses.replace`."""
        return dataclasses.replace(self, **changes)

    @property
    def needs_scores(self) -> bool:
        return self.rank.by == "attention" and not self.allocation.keeps_everything
