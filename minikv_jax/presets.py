"""The methods, one row each. A row is a value: change a knob with the arguments, anything else with `.replace`."""

import dataclasses
import functools
from typing import Literal

from minikv_jax.append import Append
from minikv_jax.basis import Balance, Basis, Hadamard
from minikv_jax.block import Block
from minikv_jax.checks import require
from minikv_jax.codec import Codec, MetadataDtype, each_token
from minikv_jax.config import Allocation, Amount, CacheConfig, Method, Rank
from minikv_jax.evict import Evict
from minikv_jax.inflow import Inflow
from minikv_jax.latent import CSKV, LoRC
from minikv_jax.merge import Merge
from minikv_jax.newest import Newest
from minikv_jax.registry import METHODS, by_name, parse, parse_one, row, with_settings
from minikv_jax.ring import Ring
from minikv_jax.sharing import KVSharer
from minikv_jax.tova import Tova

__all__ = ["METHODS", "by_name", "parse", "parse_one", "with_settings"]  # beside the methods themselves


@row
def full() -> CacheConfig:
    """Everything, in the model's dtype: what the others are measured against."""
    return CacheConfig("full", Method(inflow=Append()))


@row
def streaming_llm(sinks: int = 4, recent: Amount = 512) -> CacheConfig:
    """StreamingLLM (arXiv 2309.17453): the first tokens and the newest ones; the oldest of these leaves at each step.

    Keys keep the rotary positions of the text.
    """
    kept = Allocation(heavy=0, recent=recent, sinks=sinks)
    return CacheConfig("streaming_llm", Method(allocation=kept, inflow=Evict("before")))


@row
def h2o(heavy: Amount = 0.1, recent: Amount = 0.1, persistent: bool = False, sinks: int = 0) -> CacheConfig:
    """H2O (arXiv 2306.14048, Algorithm 1): most attended and newest tokens; each step gives up the least attended.

    `persistent` fixes the choice after the prompt and keeps all new tokens.
    """
    kept = Allocation(heavy=heavy, recent=recent, sinks=sinks)
    return CacheConfig("h2o", Method(rank=Rank(by="attention"), allocation=kept, inflow=_giving_up(not persistent)))


def _giving_up(each_step: bool) -> Inflow:
    return Evict() if each_step else Append()


@row
def tova(budget: Amount = 2048) -> CacheConfig:
    """TOVA (arXiv 2401.06104, section 3): what the newest query attends to; each step gives up what it wants least.

    Each key/value head chooses by the attention of its own queries; the paper averages over all heads of a layer.
    """
    return CacheConfig(
        "tova", Method(rank=Rank(by="last_queries", queries=1), allocation=Allocation(budget=budget), inflow=Tova())
    )


@row
def snapkv(
    budget: Amount = 2048, window: int = 32, pooling: int = 5, pool: Literal["avg", "max"] = "avg"
) -> CacheConfig:
    """SnapKV (arXiv 2404.14469, Listing 1): what the prompt's last queries attend to, pooled, and those last tokens."""
    rank = _observed(window, pooling, pool)
    return CacheConfig(
        "snapkv", Method(rank=rank, allocation=Allocation(budget=budget, recent=window), inflow=Append())
    )


def _observed(window: int, pooling: int, pool: Literal["avg", "max"]) -> Rank:
    require(window >= 1, f"window={window}: give at least 1 query.")
    return Rank(by="last_queries", queries=window, pooling=pooling, pool=pool)


@row
def think(
    drop: float = 0.4,
    base: Literal["snapkv", "h2o", "full"] = "snapkv",
    budget: Amount = 2048,
    window: int = 32,
    recent: int = 32,
    bits: int = 16,
    group_size: int = 32,
    residual: int = 128,
) -> CacheConfig:
    """ThinK (arXiv 2407.21018): each head leaves out the key channels that the prompt's last 32 queries use least.

    Args:
        drop: share of the channels, rounded down to what leaves a multiple of 8.
        base: the rank of tokens; "h2o" as its choice after the prompt, half of it newest; "full" keeps all of them.
        budget: tokens that the base keeps.
        window: queries of `snapkv`.
        recent: newest tokens whose keys stay whole.
        bits: of what is left of keys, and of values; 16 keeps them dense.
        group_size, residual: as in `minikv`, for fewer bits.
    """
    half = budget / 2 if isinstance(budget, float) else budget // 2
    method = {
        "full": Method(inflow=Append()),
        "h2o": h2o(half, half, persistent=True).method,
        "snapkv": snapkv(budget, window).method,
    }[base]
    inflow = Newest(recent) if bits == 16 else Block(residual, recent)
    return CacheConfig(
        "think", method.replace(codec=Codec(bits, bits, group_size, group_size, key_drop=drop), inflow=inflow)
    )


@row
def pyramidkv(
    budget: int = 2048, window: int = 32, pooling: int = 5, pool: Literal["avg", "max"] = "avg", beta: int = 20
) -> CacheConfig:
    """PyramidKV (arXiv 2406.02069, section 3.2): SnapKV with budgets that fall from layer to layer."""
    rank = _observed(window, pooling, pool)
    kept = Allocation(budget=budget, recent=window, pyramid_beta=beta)
    return CacheConfig("pyramidkv", Method(rank=rank, allocation=kept, inflow=Append()))


@row
def kvmerger(
    budget: float = 0.5,
    heavy: float = 0.12,
    recent: float = 0.17,
    threshold: float = 0.75,
    sigma: float | None = None,
    values: Literal["sum", "mean"] = "sum",
    whole: tuple[int, ...] = (),
) -> CacheConfig:
    """KVMerger (arXiv 2407.08454): neighbours with like keys become one, weighted by their distance.

    Args:
        budget: share of the prompt that is left.
        heavy: share of the prompt that attention saves from merging.
        recent: newest share of the prompt, which stays as it is.
        threshold, sigma, values: see `merge.Merge`.
        whole: layers that keep everything.
    """
    require(0 <= recent <= budget, f"recent={recent} is a part of budget={budget}: give from 0 to that.")
    require(budget > 0, f"budget={budget}: nothing would be kept.")
    kept = Allocation(budget=budget, recent=recent / budget)
    rank = Rank(by="attention", protected=heavy)
    method = Method(rank=rank, allocation=kept, inflow=Merge(threshold, sigma, values))
    everything = tuple((i, method.replace(allocation=Allocation())) for i in sorted(whole))
    return CacheConfig("kvmerger", method, everything)


@row
def int8() -> CacheConfig:
    """Every token in 8 bits, one scale for each token and head: what serving engines offer beside dense caches."""
    return CacheConfig("int8", _each_token(8))


def _each_token(bits: int) -> Method:
    """Every token on its own, with one scale a head."""
    return Method(codec=each_token(bits, "head"), inflow=Append())


@row
def quarot(bits: int = 4) -> CacheConfig:
    """QuaRot's cache (arXiv 2404.00456): every token rotated, in 4 bits with a scale. Not for large key biases."""
    return CacheConfig("quarot", _each_token(bits).replace(basis=(Hadamard(),)))


@row
def qhitter(
    heavy: Amount = 0.15, recent: Amount = 0.05, protected: Amount = 0.07, attention_weight: float = 0.5, bits: int = 4
) -> CacheConfig:
    """Q-Hitter (MLSys 2024, section 3): H2O that prefers what survives 4 bits. Not for large key biases."""
    method = Method(
        rank=Rank(by="attention", attention_weight=attention_weight, protected=protected),
        allocation=Allocation(heavy=heavy, recent=recent),
        codec=Codec(bits, bits, "head", "head", "channels", integer_zero=True),
        inflow=Evict(),
    )
    return CacheConfig("qhitter", method)


@row
def kivi(
    key_bits: int = 2,
    value_bits: int = 2,
    group_size: int = 32,
    residual: int = 128,
    balance: bool = False,
    rotate: bool = False,
    metadata_dtype: MetadataDtype = "float16",
    clip: tuple[float, ...] = (),
) -> CacheConfig:
    """KIVI (arXiv 2402.02750, section 4): every token; keys per channel, values per token, the newest dense."""
    groups = {"key_group": group_size, "value_group": group_size, "metadata_dtype": metadata_dtype}
    codec = Codec(key_bits, value_bits, **groups, balance=balance and not rotate, key_clip=clip, value_clip=clip)
    return CacheConfig("kivi", Method(codec=codec, basis=_rotation(rotate, balance, group_size), inflow=Ring(residual)))


def _rotation(wanted: bool, balanced: bool, group: int) -> tuple[Basis, ...]:
    """The rotation if it is wanted, of balanced keys; without it the codec balances."""
    return (Balance(group), Hadamard())[not balanced :] if wanted else ()


@row
def minikv(
    heavy: float = 0.25,
    recent: float = 0.25,
    bits: int = 2,
    group_size: int = 16,
    residual: int = 128,
    pyramid_depth: float | None = None,
    *,
    key_bits: int | None = None,
    sinks: int = 0,
    normalize: bool = False,
    pooling: int = 1,
    value_norm: bool = False,
    balance: bool = False,
    rotate: bool = False,
    metadata_dtype: MetadataDtype = "float16",
    clip: tuple[float, ...] = (),
    per_head: bool = False,
) -> CacheConfig:
    """MiniKV (arXiv 2411.18077, Algorithm 1): most attended and newest tokens in 2 bits, fixed after the prompt.

    Args:
        heavy: share of the prompt kept for the attention it received.
        recent: share of the prompt kept because it is newest.
        bits: of keys and values; 16 keeps them dense.
        group_size: tokens (keys) or channels (values) that share a scale.
        residual: tokens of the window that is encoded as one when it is full.
        pyramid_depth: None: the same budget in every layer; 7 is the paper's pyramid.
        key_bits: of keys, where they differ from values.
        sinks: first tokens that are always kept, on top of the others.
        normalize, pooling, value_norm: of the scores, see `Rank`. Not in the paper, as all that follows.
        metadata_dtype, clip, balance: see `Codec`.
        rotate: Hadamard rotation of keys and values; with `balance`, of balanced ones (`basis.Balance`).
        per_head: budgets that differ between the heads of a layer (AdaKV, arXiv 2407.11550). Refused: a layer's heads
            share one array, so a head with fewer tokens would free nothing.
    """
    require(
        not per_head,
        "per_head budgets are not supported: the heads of a layer share one array, so tokens taken from one head "
        "would only be masked and no memory freed. Use budgets per layer (pyramid_depth, pyramid_beta).",
    )
    codec = Codec(bits if key_bits is None else key_bits, bits, key_clip=clip, value_clip=clip)
    groups = {"key_group": group_size, "value_group": group_size, "metadata_dtype": metadata_dtype}
    method = Method(
        rank=Rank(by="attention", normalize=normalize, pooling=pooling, value_norm=value_norm),
        allocation=Allocation(heavy=heavy, recent=recent, sinks=sinks, pyramid_depth=pyramid_depth),
        codec=dataclasses.replace(codec, **groups, balance=balance and not rotate),
        basis=_rotation(rotate, balance, group_size),
        inflow=Append() if bits == 16 else Block(residual),
    )
    return CacheConfig("minikv" if pyramid_depth is None else "minikv_pyramid", method)


@row
def minikv_pyramid(
    heavy: float = 0.25, recent: float = 0.25, bits: int = 2, group_size: int = 16, residual: int = 128
) -> CacheConfig:
    """MiniKV with the layer-wise pyramid of its section 3.2, depth 7: early layers keep more."""
    return minikv(heavy, recent, bits, group_size, residual, pyramid_depth=7)


from minikv_jax.plus import minikv_plus  # noqa: E402, F401, rows stand in the order of the table


@row
def mikv(
    ratio: float = 0.2,
    recent: float = 0.5,
    bits: int = 16,
    retained_bits: int = 2,
    balance: bool = True,
    persistent: bool = False,
    metadata_dtype: MetadataDtype = "float16",
) -> CacheConfig:
    """MiKV (arXiv 2402.18096, section 3): drops nothing, most tokens take 2 bits. Not for large key biases.

    Args:
        ratio: share of the prompt that is important: by accumulated attention, and the newest `recent` share of it.
        recent: see `ratio`.
        bits: of important tokens.
        retained_bits: of the others, in groups of half a head per token.
        balance: MiKV's channel balancer for the retained keys.
        persistent: fixes the choice after the prompt and keeps new tokens important; else each step demotes one.
        metadata_dtype: of scales and minima.
    """
    half = functools.partial(
        Codec, key_group="half_head", value_group="half_head", key_axis="channels", metadata_dtype=metadata_dtype
    )
    everything = ratio >= 1
    method = Method(
        rank=Rank(by="attention"),
        allocation=Allocation(budget=ratio, recent=recent),
        codec=Codec() if bits == 16 else half(bits, bits),
        rest=None if everything else half(retained_bits, retained_bits, balance=balance),
        inflow=_giving_up(not (persistent or everything)),
    )
    return CacheConfig("mikv", method)


@row
def lorc(least: float = 0.25, most: float = 0.5, bits: int = 16, group_size: int = 16) -> CacheConfig:
    """LoRC (arXiv 2410.03111): latents of low rank, wider in early layers, of which keys are rebuilt at each step.

    The model's weights are to be made into such a product first: `params = models.latent.lorc(params, least, most)`.

    Args:
        least, most: ranks of the last layer and the first, as shares of all heads' channels. What lies between follows
            from the weights; where these are not known, sizes assume the mean in every layer.
        bits: of latents, each token's in groups of `group_size` of its channels: they fall off from channel to
            channel, so neighbours are of one size.
        group_size: see `bits`.
    """
    return CacheConfig("lorc", Method(codec=each_token(bits, group_size), inflow=Append()), weights=LoRC(least, most))


@row
def kvsharer(layers: tuple[int, ...] = (), sources: tuple[int, ...] = (), base: str = "full") -> CacheConfig:
    """KVSharer (arXiv 2410.18517): some layers read an earlier layer's cache, and hold none.

    The model is to give such layers: `params = models.shared.kvsharer(params, layers, sources)`.

    Args:
        layers: those that hold nothing; `minikv calibrate --share` finds them.
        sources: the layer that each of them reads.
        base: the method of all other layers.
    """
    weights = KVSharer(layers, sources) if layers or sources else None  # none shares: the model as it is
    return dataclasses.replace(by_name(base), name="kvsharer", weights=weights)


@row
def cskv(
    keys: float = 0.5,
    values: float = 0.5,
    window: int = 32,
    bits: int = 16,
    group_size: int = 16,
    weights: str | None = None,
) -> CacheConfig:
    """CSKV (arXiv 2409.10593): latents of low rank beside the newest tokens as they are; `minikv train` improves them.

    The model is to give such latents: `params = models.latent.cskv(params, keys, values)`.

    Args:
        keys, values: ranks as shares of all heads' channels.
        window: newest tokens whose keys and values stay.
        bits, group_size: as `lorc`.
        weights: name of trained weights beside the model's; None: its own by singular values, whose error is large.
    """
    method = Method(codec=each_token(bits, group_size), inflow=Newest(window))
    return CacheConfig("cskv", method, weights=CSKV(keys, values, weights))
