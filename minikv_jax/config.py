"""What a compressed cache is made of: frozen, hashable parts that travel through `jax.jit` as static data.

Every method in this field is one sentence: **rank** the prompt's tokens, **allocate** a budget to each layer, cut the
ranking into **tiers**, give each tier a **codec** (or drop it), and keep a dense **window** of the newest tokens.
`presets.py` is the table of such sentences.
"""

import dataclasses
import types
import typing
from typing import Any, Literal

import jax

from minikv_jax.errors import ConfigError, shortened
from pallas_kernels.packed_decode.layout import BLOCK, SUPPORTED_BITS, GroupAxis

# A share of the prompt (float, int(N * share) tokens) or a number of tokens (int).
type Amount = float | int
# Consecutive numbers that share a scale: a count, or a part of the head.
type GroupSize = int | Literal["half_head", "head"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def check_types(part: Any) -> None:
    """Refuses fields of a dataclass that are not what their annotations say: 1.5 tokens, True bits, an unknown choice.

    Raises:
        ConfigError: naming the field, its value and what it takes.
    """
    for name, wanted in typing.get_type_hints(type(part)).items():
        value = getattr(part, name)
        _require(_is_a(value, wanted), f"{name}={shortened(value)}: give {_described(wanted)}.")


def _is_a(value: Any, wanted: Any) -> bool:
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if isinstance(wanted, typing.TypeAliasType):
        return _is_a(value, wanted.__value__)
    if origin in (types.UnionType, typing.Union):
        return any(_is_a(value, one) for one in arguments)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_a(x, arguments[0]) for x in value)
    if wanted is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, wanted) and not (wanted is int and isinstance(value, bool))


_PLAIN_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a string",
    types.NoneType: "None",
}


def _described(wanted: Any) -> str:
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if isinstance(wanted, typing.TypeAliasType):
        return _described(wanted.__value__)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(_described, arguments))
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin is tuple:
        return f"a tuple, each {_described(arguments[0])}"
    return _PLAIN_WORDS.get(wanted, f"a {wanted.__name__}")


def _require_amount(name: str, amount: Amount) -> None:
    if isinstance(amount, float):
        _require(0.0 <= amount <= 1.0, f"{name}={amount} is a share of the prompt: give a number from 0.0 to 1.0.")
    _require(amount >= 0, f"{name}={amount}: give a share or a number of tokens.")


@dataclasses.dataclass(frozen=True)
class Rank:
    """Which tokens matter: the order in which tiers are filled.

    Attributes:
        by: "position" prefers newer tokens; "attention" those that received most attention from all of the prompt's
            queries (H2O, arXiv 2306.14048; MiniKV Algorithm 1); "window" from its last `window` queries (SnapKV,
            arXiv 2404.14469).
        window: queries that count, for "window".
        pooling: scores are pooled over this many neighbouring tokens (odd; 1: not).
        pool: "avg" or "max".
        normalize: divide a score by the number of queries that can see the token (ZipCache, arXiv 2405.14256).
        value_norm: multiply a score by the length of the token's value (VATP, arXiv 2406.12335).
        attention_weight: below 1, scores are mixed with how well a token survives its codec, both scaled to 0..1 over
            the layer (Q-Hitter's lambda).
        protected: tokens chosen by attention alone before the mix decides (Q-Hitter).
    """

    by: Literal["position", "attention", "window"] = "position"
    window: int = 0
    pooling: int = 1
    pool: Literal["avg", "max"] = "avg"
    normalize: bool = False
    value_norm: bool = False
    attention_weight: float = 1.0
    protected: Amount = 0

    def __post_init__(self):
        check_types(self)
        _require((self.by == "window") == (self.window > 0), f"window={self.window} goes with by='window', above 0.")
        _require(self.pooling >= 1 and self.pooling % 2 == 1, f"pooling={self.pooling}: give an odd number of tokens.")
        _require(0 <= self.attention_weight <= 1, f"attention_weight={self.attention_weight}: give 0 to 1.")
        _require_amount("protected", self.protected)


@dataclasses.dataclass(frozen=True)
class Allocation:
    """How many tokens of a prompt of N the first tier of each layer takes.

    Attributes:
        heavy: tokens chosen by rank outside the recent ones.
        recent: newest tokens, always taken. With `budget`, a share is one of the budget.
        budget: all of them together, instead of `heavy`.
        sinks: first tokens, always taken, on top of the others.
        pyramid_depth: a depth d lets a heavy share fall linearly over the layers from 2 heavy - heavy / d to heavy / d,
            with mean `heavy` (MiniKV section 3.2; its code has 7).
        pyramid_beta: PyramidKV's (arXiv 2406.02069) arithmetic sequence of budgets around `budget`; its code has 20.
        per_head: budgets that differ between the heads of a layer (AdaKV, arXiv 2407.11550). Refused: a layer's heads
            share one array, so a head with fewer tokens would free nothing.
    """

    heavy: Amount = 1.0
    recent: Amount = 0.0
    budget: Amount | None = None
    sinks: int = 0
    pyramid_depth: float | None = None
    pyramid_beta: int | None = None
    per_head: bool = False

    def __post_init__(self):
        check_types(self)
        _require(
            not self.per_head,
            "per_head budgets are not supported: the heads of a layer share one array, so tokens taken from one head "
            "would only be masked and no memory freed. Use budgets per layer (pyramid_depth, pyramid_beta).",
        )
        _require_amount("heavy", self.heavy)
        _require_amount("recent", self.recent)
        _require(self.sinks >= 0, f"sinks={self.sinks}: give a number of tokens.")
        if self.budget is not None:
            _require_amount("budget", self.budget)
            _require(self.budget > 0, f"budget={self.budget}: nothing would be kept.")
        else:
            _require(self.heavy + self.recent + self.sinks > 0, "heavy and recent are both 0: nothing would be kept.")
        depth, beta = self.pyramid_depth, self.pyramid_beta
        _require(depth is None or depth >= 1, f"pyramid_depth={depth}: give None or a number of at least 1.")
        _require(
            depth is None or (isinstance(self.heavy, float) and self.budget is None),
            "pyramid_depth shapes a heavy share: give heavy as a float and no budget.",
        )
        _require(
            beta is None or (beta >= 1 and self.budget is not None and isinstance(self.recent, int)),
            f"pyramid_beta={beta} shapes a budget beside a number of recent tokens: give both.",
        )

    @property
    def is_pyramid(self) -> bool:
        """Whether layers keep different numbers of tokens."""
        return self.pyramid_depth is not None or self.pyramid_beta is not None

    @property
    def keeps_everything(self) -> bool:
        if self.is_pyramid:
            return False
        if self.budget is not None:
            return isinstance(self.budget, float) and self.budget >= 1
        return sum(amount for amount in (self.heavy, self.recent) if isinstance(amount, float)) >= 1


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
    """

    key_bits: int = 16
    value_bits: int = 16
    key_group: GroupSize = 16
    value_group: GroupSize = 16
    key_axis: GroupAxis = "tokens"
    metadata_dtype: Literal["float16", "bfloat16", "float8_e4m3fn"] = "float16"
    balance: bool = False
    key_clip: tuple[float, ...] = ()
    value_clip: tuple[float, ...] = ()
    key_feedback: Literal["none", "prompt", "all"] = "none"
    integer_zero: bool = False

    def __post_init__(self):
        check_types(self)
        for name in ("key_bits", "value_bits"):
            bits = getattr(self, name)
            _require(bits in (*SUPPORTED_BITS, 16), f"{name}={bits}: choose one of {(*SUPPORTED_BITS, 16)}.")
        _require(
            (self.key_bits == 16) == (self.value_bits == 16),
            f"key_bits={self.key_bits} and value_bits={self.value_bits}: 16 bits go for both or for neither.",
        )
        for name in ("key_group", "value_group"):
            size = getattr(self, name)
            _require(isinstance(size, str) or size >= 1, f"{name}={size}: give at least 1.")
        over_tokens = not self.dense and self.key_axis == "tokens"
        _require(
            not over_tokens or (isinstance(self.key_group, int) and BLOCK % self.key_group == 0),
            f"key_group={self.key_group} over tokens must divide {BLOCK}.",
        )
        for name in ("key_clip", "value_clip"):
            factors = getattr(self, name)
            _require(all(0 < f <= 1 for f in factors), f"{name}={factors}: factors lie above 0 and at most at 1.")
        _require(
            self.key_feedback == "none" or (over_tokens and not self.integer_zero),
            "key_feedback goes from channel to channel: give key_axis='tokens', and no integer_zero.",
        )
        clipped = bool(self.key_clip or self.value_clip)
        plain = not (self.balance or clipped or self.integer_zero)
        _require(plain or not self.dense, "balance, clip and integer_zero need fewer than 16 bits.")

    @property
    def dense(self) -> bool:
        return self.key_bits == 16

    @property
    def token_group(self) -> int:
        """Tokens that can only be encoded together."""
        return self.key_group if not self.dense and self.key_axis == "tokens" else 1


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """A method, and how much room its cache has. Hashable and static: pass it straight through `jax.jit`.

    Attributes:
        name: of the method.
        rank, allocation: choose the tokens of the first tier.
        codec: of the first tier.
        retained: codec of all other tokens, and of those that a window encodes; None drops them.
        window: newest tokens kept dense until they are encoded; None: new tokens go straight into the first tier.
        window_style: "block" encodes a full window at once, before the step's attention (MiniKV); "kivi" encodes a
            full window of keys after it, and values one by one as they grow older than the window.
        window_keeps: newest tokens of a "block" window that stay dense when the others are encoded, and of a prompt.
        exact_sinks: the allocation's sinks are not encoded, nor do they stretch any group's range: they stay dense, in
            front of the window.
        rotate_keys: hold keys, and ask with queries, after a Hadamard rotation, which spreads outlier channels.
        rotate_values: likewise for values; the output is rotated back.
        precise: layers whose first tier has `precise_codec` instead. A few layers, often one, do the looking up of
            single tokens, and need more bits than all others (KVTuner, arXiv 2502.04420, gives each layer its own).
        precise_codec: of `precise` layers, with the groups of `codec`.
        brief: layers whose first tier takes the tokens of `brief_allocation` instead: those that lose little by it
            (DuoAttention, arXiv 2410.10819, lets heads keep first and newest tokens only).
        brief_allocation: of `brief` layers, with the sinks of `allocation`.
        quantized_first: a codec that a prompt's keys and values go through before any tokens are chosen. The tiers hold
            what it gives back, so that dense ones have the numbers (not the bytes) of a cache that quantises first and
            then selects codes, whose groups keep the ranges of neighbours that left.
        evict: "never": chosen tokens stay and new ones are added. "after": each step adds its attention to the scores
            and then gives up the first tier's lowest token (H2O, MiKV). "before": makes room before the step, for
            ranks by position (StreamingLLM). What is given up goes to the retained tier, or away.
        dtype: of dense rows, the window's included; None: the model's own.
        prompt_capacity: longest prompt; None: as long as the token array given to `prefill`.
        generated_capacity: tokens that can follow the prompt.
    """

    name: str
    rank: Rank = Rank()
    allocation: Allocation = Allocation()
    codec: Codec = Codec()
    retained: Codec | None = None
    window: int | None = None
    window_style: Literal["block", "kivi"] = "block"
    window_keeps: int = 0
    exact_sinks: bool = False
    rotate_keys: bool = False
    rotate_values: bool = False
    precise: tuple[int, ...] = ()
    precise_codec: Codec | None = None
    brief: tuple[int, ...] = ()
    brief_allocation: Allocation | None = None
    quantized_first: Codec | None = None
    evict: Literal["never", "before", "after"] = "never"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    prompt_capacity: int | None = None
    generated_capacity: int = 512

    def __post_init__(self):
        check_types(self)
        for name in ("prompt_capacity", "generated_capacity"):
            tokens = getattr(self, name)
            _require(tokens is None or tokens >= 1, f"{name}={tokens}: give at least 1 token.")
        _require(
            self.evict != "before" or self.rank.by == "position", "evict='before' goes with a rank by position only."
        )
        self._check_retained()
        codecs = [codec for codec in (self.codec, self.retained) if codec is not None and not codec.dense]
        _require(
            not self.rotate_keys or not any(codec.balance for codec in codecs),
            "balance and rotate_keys both even out channels, and the rotation would undo the balance: choose one.",
        )
        rotates = self.rotate_keys or self.rotate_values
        _require(bool(codecs) or not rotates, "Rotation needs a tier of fewer than 16 bits.")
        self._check_window()
        self._check_layers()

    def _check_retained(self) -> None:
        if self.retained is None:
            return
        _require(not self.retained.dense, "A retained tier is for fewer than 16 bits: give it those.")
        one_by_one = self.window is None
        _require(
            not one_by_one or self.retained.token_group == 1,
            "Without a window a retained tier takes tokens one at a time: give it key_axis='channels'.",
        )
        _require(
            one_by_one or self.retained.token_group == self.codec.token_group,
            "Tiers behind one window need the same groups of tokens.",
        )
        _require(
            one_by_one or self.rank.attention_weight == 1,
            "Tiers behind one window are ranked by attention alone: leave attention_weight at 1.",
        )

    def _check_layers(self) -> None:
        for name, other in (("precise", self.precise_codec), ("brief", self.brief_allocation)):
            layers = getattr(self, name)
            _require(all(i >= 0 for i in layers), f"{name}={layers!r}: layers are counted from 0.")
            _require(
                bool(layers) == (other is not None), f"{name}={layers} needs what these layers have, and only then."
            )
        if not (self.precise or self.brief):
            return
        _require(
            self.evict == "never" and self.retained is None and self.window_style == "block",
            "precise and brief go with methods that keep what they chose, in one tier and a window of the block style.",
        )
        if self.precise_codec is not None:
            same = ("token_group", "key_axis", "metadata_dtype", "balance", "dense")
            differ = [name for name in same if getattr(self.precise_codec, name) != getattr(self.codec, name)]
            _require(not differ, f"precise_codec must have the codec's {', '.join(differ)}.")
        if self.brief_allocation is not None:
            _require(self.brief_allocation.sinks == self.allocation.sinks, "All layers have the same number of sinks.")

    def _check_window(self) -> None:
        _require(
            not self.exact_sinks or (self.window is not None and self.window_style == "block"),
            "exact_sinks keeps sinks in the window of an encoded tier: give it a window, of the block style.",
        )
        _require(
            self.quantized_first is None or self.window_style == "block",
            "quantized_first shows what selecting codes costs; window_style='kivi' keeps every token.",
        )
        group, keeps = self.codec.token_group, self.window_keeps
        _require(
            keeps == 0 or (self.window is not None and self.window_style == "block" and 0 < keeps <= self.window // 2),
            f"window_keeps={keeps}: give at most half of a window of the block style.",
        )
        _require(keeps % group == 0, f"window_keeps={keeps} must be a multiple of the key group {group}.")
        if self.codec.dense or self.evict != "never":
            _require(self.window is None, f"window={self.window}: only tokens that are encoded together need one.")
            _require(group == 1, "A tier that gives up single tokens needs key_axis='channels'.")
            return
        window = self.window
        _require(window is not None or group == 1, f"window={window}: an encoded cache needs one of at least {group}.")
        _require(window is None or window >= 1, f"window={window}: give at least 1 token.")
        _require(window is None or window % group == 0, f"window={window} must be a multiple of the key group {group}.")
        kivi = self.window_style == "kivi"
        _require(not kivi or (window is not None and self.allocation.keeps_everything),
                 "window_style='kivi' needs a window and keeps every token.")  # fmt: skip

    def replace(self, **changes) -> "CacheConfig":
        """A copy with some fields changed, as `dataclasses.replace`."""
        return dataclasses.replace(self, **changes)

    def of_layer(self, layer: int) -> "CacheConfig":
        """The method as this layer has it: nothing is `precise` or `brief` any more."""
        if not (self.precise or self.brief):
            return self
        return self.replace(
            codec=self.precise_codec if layer in self.precise else self.codec,
            allocation=self.brief_allocation if layer in self.brief else self.allocation,
            precise=(),
            precise_codec=None,
            brief=(),
            brief_allocation=None,
        )

    @property
    def program(self) -> "CacheConfig":
        """What compiled code depends on: the method less its name and amounts, for budgets are numbers given to it."""
        sinks = self.allocation.sinks
        kept = Allocation(heavy=0, recent=1, sinks=sinks) if self.selects else Allocation(sinks=sinks)
        return self.replace(name="", allocation=kept)

    @property
    def selects(self) -> bool:
        """Whether some tokens of a prompt may stay outside the first tier."""
        return not self.allocation.keeps_everything or bool(self.brief)

    @property
    def keeps_all_as_it_is(self) -> bool:
        """Whether a prompt's cache is its keys and values."""
        plain = self.codec.dense and self.quantized_first is None and self.retained is None
        return plain and self.evict == "never" and not self.selects

    @property
    def first_encoded(self) -> int:
        """Row of a full window from which on it is encoded: exact sinks stay in front of it."""
        return self.allocation.sinks if self.exact_sinks else 0

    @property
    def small_metadata(self) -> bool:
        """Whether some tier has 8-bit metadata, whose little range needs `Units`."""
        codecs = (codec for codec in (self.codec, self.retained) if codec is not None and not codec.dense)
        return any(codec.metadata_dtype == "float8_e4m3fn" for codec in codecs)

    @property
    def score_rows(self) -> int | str:
        """Rows of the prompt whose attention is summed (`two_pass_attention`)."""
        tracked = self.evict == "after"
        if not (self.selects or tracked) or self.rank.by == "position":
            return 0
        return "all" if self.rank.by == "attention" else self.rank.window
