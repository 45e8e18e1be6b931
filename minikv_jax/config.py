"""What a compressed cache is made of: frozen, hashable values that travel through `jax.jit` as static data.

Every method in this field is one sentence: **rank** the prompt's tokens, **allocate** a budget to each layer, cut the
ranking into **tiers**, give each tier a **codec** (or drop it), hold it in a **basis**, and say how new tokens flow
**in**. `presets.py` is the table of such sentences.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
from jaxtyping import Array, Float

from minikv_jax.basis import Basis, PowersOfTwo, Quantized
from minikv_jax.checks import check_types, require
from minikv_jax.codec import Codec
from minikv_jax.errors import PromptError
from minikv_jax.inflow import Inflow
from minikv_jax.latent import Latent, Weights
from minikv_jax.sharing import KVSharer
from pallas_kernels.two_pass_attention.common import ScoreRows

# A share of the prompt (float, int(N * share) tokens) or a number of tokens (int).
type Amount = float | int


def require_amount(name: str, amount: Amount) -> None:
    """Refuses, by ConfigError, a share that is none."""
    if isinstance(amount, float):
        require(0.0 <= amount <= 1.0, f"{name}={amount} is a share of the prompt: give a number from 0.0 to 1.0.")
    require(amount >= 0, f"{name}={amount}: give a share or a number of tokens.")


@dataclasses.dataclass(frozen=True)
class Rank:
    """Which tokens matter: the order in which tiers are filled.

    Attributes:
        by: "position" prefers newer tokens; "attention" those that received most attention from all of the prompt's
            queries (H2O, arXiv 2306.14048; MiniKV Algorithm 1); "last_queries" from its last ones alone (SnapKV,
            arXiv 2404.14469).
        queries: how many count, for "last_queries".
        pooling: scores are pooled over this many neighbouring tokens (odd; 1: not).
        pool: "avg" or "max".
        normalize: divide a score by the number of queries that can see the token (ZipCache, arXiv 2405.14256).
        value_norm: multiply a score by the length of the token's value (VATP, arXiv 2406.12335).
        attention_weight: below 1, scores are mixed with how well a token survives its codec, both scaled to 0..1 over
            the layer (Q-Hitter's lambda).
        protected: tokens chosen by attention alone before the mix decides (Q-Hitter) or others merge (KVMerger).
    """

    by: Literal["position", "attention", "last_queries"] = "position"
    queries: int = 0
    pooling: int = 1
    pool: Literal["avg", "max"] = "avg"
    normalize: bool = False
    value_norm: bool = False
    attention_weight: float = 1.0
    protected: Amount = 0

    def __post_init__(self):
        check_types(self)
        counts = self.by == "last_queries"
        require(counts == (self.queries > 0), f"queries={self.queries} goes with by='last_queries', above 0.")
        require(self.pooling >= 1 and self.pooling % 2 == 1, f"pooling={self.pooling}: give an odd number of tokens.")
        require(0 <= self.attention_weight <= 1, f"attention_weight={self.attention_weight}: give 0 to 1.")
        require_amount("protected", self.protected)


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
    """

    heavy: Amount = 1.0
    recent: Amount = 0.0
    budget: Amount | None = None
    sinks: int = 0
    pyramid_depth: float | None = None
    pyramid_beta: int | None = None

    def __post_init__(self):
        check_types(self)
        require_amount("heavy", self.heavy)
        require_amount("recent", self.recent)
        require(self.sinks >= 0, f"sinks={self.sinks}: give a number of tokens.")
        if self.budget is not None:
            require_amount("budget", self.budget)
            require(self.budget > 0, f"budget={self.budget}: nothing would be kept.")
        else:
            require(self.heavy + self.recent + self.sinks > 0, "heavy and recent are both 0: nothing would be kept.")
        depth, beta = self.pyramid_depth, self.pyramid_beta
        require(depth is None or depth >= 1, f"pyramid_depth={depth}: give None or a number of at least 1.")
        require(
            depth is None or (isinstance(self.heavy, float) and self.budget is None),
            "pyramid_depth shapes a heavy share: give heavy as a float and no budget.",
        )
        require(
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


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """What one layer does with its tokens. Static; `cache.LayerCache` is its state.

    Attributes:
        rank, allocation: choose the tokens of the first tier.
        codec: of the first tier.
        rest: codec of a second tier, of all other tokens; None drops them.
        basis: linear maps in which keys and values are held, in their order.
        inflow: how new tokens come in, and what leaves.
        latent: what rows are, where the layer caches latents; `CacheConfig.with_latents` says it.
    """

    inflow: Inflow
    rank: Rank = Rank()
    allocation: Allocation = Allocation()
    codec: Codec = Codec()  # noqa: RUF009, a frozen value like the others
    rest: Codec | None = None
    basis: tuple[Basis, ...] = ()
    latent: Latent | None = None

    def __post_init__(self):
        check_types(self)
        require(self.rest is None or not self.rest.dense, "A second tier is for fewer than 16 bits: give it those.")
        for basis in self.basis:
            basis.check(self.codecs)
        self.inflow.check(self)
        if self.latent is not None:
            self._check_latents()

    def _check_latents(self) -> None:
        # A row's place says at which position its key is rotated.
        require(
            not self.selects and self.rest is None and self.inflow.grows and not self.first_encoded,
            "Keys are rebuilt from latents at the position of their row: every token must stay, in one tier.",
        )
        reads = any(codec.balance or codec.key_feedback != "none" for codec in self.codecs)
        require(
            not (self.bases or reads),
            "Queries do not meet latents, so no basis, balance or feedback of theirs is for latents, nor metadata of 8 "
            "bits: leave them away.",
        )

    def replace(self, **changes) -> "Method":
        """A copy with some fields changed, as `dataclasses.replace`."""
        return dataclasses.replace(self, **changes)

    @property
    def codecs(self) -> tuple[Codec, ...]:
        """Those of all tiers."""
        return (self.codec,) if self.rest is None else (self.codec, self.rest)

    @property
    def bases(self) -> tuple[Basis, ...]:
        """The basis, and units of powers of two where some tier has 8-bit metadata, whose range is small."""
        small = any(not codec.dense and codec.metadata_dtype == "float8_e4m3fn" for codec in self.codecs)
        if not small or any(isinstance(basis, PowersOfTwo) for basis in self.basis):
            return self.basis
        early = tuple(basis for basis in self.basis if not isinstance(basis, Quantized))
        return (*early, PowersOfTwo(), *(basis for basis in self.basis if isinstance(basis, Quantized)))

    @property
    def program(self) -> "Method":
        """What compiled code depends on: the method less its amounts, for budgets are numbers given to it."""
        sinks = self.allocation.sinks
        kept = Allocation(heavy=0, recent=1, sinks=sinks) if self.selects else Allocation(sinks=sinks)
        return self.replace(allocation=kept)

    @property
    def selects(self) -> bool:
        """Whether some tokens of a prompt may stay outside the first tier."""
        return not self.allocation.keeps_everything

    @property
    def keeps_all_as_it_is(self) -> bool:
        """Whether a prompt's cache is its keys and values."""
        plain = self.codec.dense and not self.codec.key_drop and not self.basis and self.rest is None
        return plain and self.inflow.grows and not self.inflow.waits and not self.selects

    def tier_rows(self, key: Float[Array, "..."], value: Float[Array, "..."]) -> tuple[Array, Array]:
        """Of rows of a dense window what tiers hold of them: latents, where rows carry more."""
        return (key, value) if self.latent is None else self.latent.split(key, value)

    def row_sizes(self, heads: int, head_size: int) -> tuple[int, int, int]:
        """Heads of the rows that tiers hold, and their sizes in keys and in values, for a model's heads."""
        return (heads, head_size, head_size) if self.latent is None else (1, self.latent.keys, self.latent.values)

    @property
    def first_encoded(self) -> int:
        """Tokens at a text's start that are never encoded."""
        return self.inflow.first_encoded(self)

    @property
    def score_rows(self) -> ScoreRows:
        """Rows of the prompt whose attention is summed (`two_pass_attention`)."""
        if not (self.selects or self.inflow.scored) or self.rank.by == "position":
            return 0
        return "all" if self.rank.by == "attention" else self.rank.queries


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """A method, and how much room its cache has. Hashable and static: pass it straight through `jax.jit`.

    Attributes:
        name: of the method.
        method: of every layer that `layers` does not name.
        layers: (layer, method) of those that have one of their own, counted from 0. A few layers, often one, do the
            looking up of single tokens, and need more bits than all others (KVTuner, arXiv 2502.04420); some lose
            little by fewer tokens (DuoAttention, arXiv 2410.10819, lets heads keep first and newest tokens only).
        dtype: of dense rows; None: the model's own.
        prompt_capacity: longest prompt; None: as long as the token array given to `prefill`.
        generated_capacity: tokens that can follow the prompt.
        weights: what the model's weights must have been made into (`models.made`).
    """

    name: str
    method: Method
    layers: tuple[tuple[int, Method], ...] = ()
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    prompt_capacity: int | None = None
    generated_capacity: int = 512
    weights: Weights | None = None

    def __post_init__(self):
        check_types(self)
        prompt, generated = self.prompt_capacity, self.generated_capacity
        require(prompt is None or prompt >= 1, f"prompt_capacity={prompt}: give at least 1 token.")
        require(generated >= 1, f"generated_capacity={generated}: give at least 1 token.")
        named = [layer for layer, _ in self.layers]
        require(all(layer >= 0 for layer in named), f"layers={named}: layers are counted from 0.")
        require(len(set(named)) == len(named), f"layers={named}: give each layer one method.")

    def replace(self, **changes) -> "CacheConfig":
        """A copy with some fields changed. Fields of a `Method` are changed in those of all layers."""
        own = {field.name for field in dataclasses.fields(self)}
        of_method = {name: changes.pop(name) for name in [*changes] if name not in own}
        if of_method:
            changes["method"] = dataclasses.replace(changes.get("method", self.method), **of_method)
            layers = changes.get("layers", self.layers)
            changes["layers"] = tuple((i, dataclasses.replace(method, **of_method)) for i, method in layers)
        return dataclasses.replace(self, **changes)

    def of_layer(self, layer: int) -> Method:
        """The method of a layer."""
        return dict(self.layers).get(layer, self.method)

    @property
    def needs_latents(self) -> bool:
        """Whether what its layers cache are latents."""
        return self.weights is not None and self.weights.assumed(1, 1, 1) is not None

    def source(self, layer: int) -> int:
        """The layer whose keys and values a layer reads: its own but where layers share them."""
        return self.weights.source(layer) if isinstance(self.weights, KVSharer) else layer

    def sources(self, held: int) -> list[int]:
        """`source` of every layer of a model so many of whose layers hold their own."""
        more = len(self.weights.layers) if isinstance(self.weights, KVSharer) else 0
        return [self.source(i) for i in range(held + more)]

    def with_latents(self, latents: Sequence[Latent | None]) -> "CacheConfig":
        """The config for layers that cache these latents."""
        methods = [self.of_layer(i).replace(latent=latent) for i, latent in enumerate(latents)]
        own = tuple((i, method) for i, method in enumerate(methods) if method != methods[0])
        return dataclasses.replace(self, method=methods[0], layers=own)

    def for_prompts(self, longest: int) -> "CacheConfig":
        """The config with its prompt capacity filled in, for prompts up to so many tokens.

        Raises:
            PromptError: the capacity is smaller.
        """
        capacity = self.prompt_capacity or longest
        if longest > capacity:
            raise PromptError(
                f"A prompt of {longest} tokens is longer than prompt_capacity={capacity}: shorten it or raise that."
            )
        return self.replace(prompt_capacity=capacity)

    def check_model(self, head_size: int, layers: int) -> None:
        """Refuses models that a method cannot run in.

        Args:
            head_size: of keys and values.
            layers: that the model has.

        Raises:
            ConfigError: heads that some method cannot hold, or a method for a layer that is not there.
        """
        whole = not self.needs_latents or all(method.latent is not None for method in self.methods)
        require(whole, f"{self.name} caches latents, which a model gives whose weights {self.name} has changed.")
        for method in self.methods:
            for size in method.row_sizes(1, head_size)[1:]:
                self._check_head(method, size)
        beyond = [i for i, _ in self.layers if i >= layers]
        require(not beyond, f"This model has {layers} layers, counted from 0, and none numbered {beyond}.")

    def _check_head(self, method: Method, head_size: int) -> None:
        group = head_size & -head_size
        require(
            all(basis.takes(head_size) for basis in method.bases),
            f"{self.name} rotates keys and values, which takes a head size that is a power of two, not {head_size}. "
            f"These run here: mikv, minikv:group_size={group}, kivi:group_size={group}, and methods that only evict.",
        )
        for codec in method.codecs:
            groups = [codec.value_group] + ([codec.key_group] if codec.key_axis == "channels" else [])
            require(
                codec.fits(head_size), f"Groups of {groups} channels must divide the model's head size of {head_size}."
            )

    @property
    def methods(self) -> tuple[Method, ...]:
        """Those of all layers, each once."""
        return tuple(dict.fromkeys((self.method, *(method for _, method in self.layers))))

    @property
    def program(self) -> "CacheConfig":
        """What compiled code depends on: the config less its name and amounts."""
        layers = tuple((i, method.program) for i, method in self.layers)
        return dataclasses.replace(self, name="", method=self.method.program, layers=layers)
