"""minikv_plus, the default: MiniKV's cache with what measurement adds to it."""

import dataclasses
from typing import Literal

from minikv_jax.basis import Balance, Hadamard
from minikv_jax.block import Block
from minikv_jax.checks import require
from minikv_jax.codec import Codec
from minikv_jax.config import Allocation, CacheConfig, Method, Rank
from minikv_jax.registry import row


@row
def minikv_plus(
    heavy: float = 1.0,
    recent: float = 0.25,
    key_bits: int = 2,
    value_bits: int = 2,
    group_size: int = 64,
    value_group: int | None = None,
    residual: int = 128,
    sinks: int = 4,
    keeps: int | None = None,
    important: float = 0.0,
    precise: tuple[int, ...] = (),
    brief: tuple[int, ...] = (),
    brief_share: float = 0.5,
    feedback: Literal["none", "prompt", "all"] = "all",
    balance: bool = True,
) -> CacheConfig:
    """MiniKV's cache with what measurement adds to it: every token in 2.25 bits, or fewer tokens in fewer bytes.

    The first tokens stay dense and out of all groups; keys and values are rotated before they are encoded (QuaRot,
    arXiv 2404.00456), the ranges of their groups searched for the least squared error, scales and minima kept in 8 bits
    so that groups of 64 cost a quarter bit; errors of keys are made up for between channels as the prompt's queries
    allow (`Codec.key_feedback`).

    Args:
        heavy: share of the prompt kept for the attention it received; with `recent` at or above 1 all of it is kept.
        recent: share of the prompt kept because it is newest.
        key_bits, value_bits: 3 for keys halves what error is left, for half a bit.
        group_size: tokens that share a scale of keys; with a short window it must be small.
        value_group: channels that share a scale of values; by default `group_size`.
        residual: tokens of the window, whose older ones are encoded when it is full.
        sinks: first tokens that stay dense.
        keeps: newest tokens that always stay dense; by default half of the window, where that is whole groups.
        important: share of the prompt, by what its last 256 queries attend to, that takes 4 bits in a tier of its own.
            A sixteenth leaves four fifths of the error for an eighth of a bit. All other tokens must be kept.
        precise: layers whose keys and values take 4 bits. `minikv calibrate` finds the few that pay it back.
        brief, brief_share: layers that keep this share of the prompt, half for attention and half newest; likewise.
        feedback: "all", of the "prompt" or "none": which keys are encoded with feedback. For those of new tokens a
            layer holds about as many bytes as H tokens take.
        balance: scale channels against what reads them before they are rotated (`basis.Balance`): without it the error
            depends on how a model happens to hold its keys, by a hundredfold.
    """
    if keeps is None:
        keeps = residual // 2 if group_size > 0 and residual % (2 * group_size) == 0 else 0
    mild = (0.95, 0.9, 0.85)
    codec = Codec(
        key_bits, value_bits, group_size, group_size if value_group is None else value_group,
        metadata_dtype="float8_e4m3fn", key_clip=mild, value_clip=mild, key_feedback=feedback,
    )  # fmt: skip
    method = Method(
        rank=Rank(by="attention"),
        allocation=Allocation(heavy=heavy, recent=recent, sinks=sinks),
        codec=codec,
        basis=(Balance(group_size), Hadamard()) if balance else (Hadamard(),),
        inflow=Block(residual, keeps, exact_sinks=True),
    )
    if important:
        method = _important_apart(method, important, not (precise or brief))
    return CacheConfig("minikv_plus", method, _own_layers(method, precise, brief, brief_share))


def _finer(codec: Codec) -> Codec:
    return dataclasses.replace(codec, key_bits=4, value_bits=4)


def _important_apart(method: Method, share: float, alike: bool) -> Method:
    """The method with a share of the prompt in a tier of 4 bits, and all other tokens in the tier that it has."""
    kept = method.allocation
    require(
        kept.keeps_everything,
        f"important={share} keeps the other tokens too: leave heavy={kept.heavy} and recent={kept.recent} at 1 "
        "together.",
    )
    require(alike, "precise and brief layers keep their tokens in one tier: leave important at 0 with them.")
    first = Allocation(heavy=share, recent=0.0, sinks=kept.sinks)
    rank = Rank(by="last_queries", queries=256)
    return method.replace(rank=rank, allocation=first, codec=_finer(method.codec), rest=method.codec)


def _own_layers(method: Method, precise: tuple[int, ...], brief: tuple[int, ...], share: float):
    """The layers of the method that are precise, brief or both."""
    require(0 <= share <= 1, f"brief_share={share} is a share of the prompt: give a number from 0.0 to 1.0.")
    layers = {i: method.replace(codec=_finer(method.codec)) for i in precise}
    for i in brief:
        shorter = Allocation(heavy=share / 2, recent=share / 2, sinks=method.allocation.sinks)
        layers[i] = layers.get(i, method).replace(allocation=shorter)
    return tuple(sorted(layers.items(), key=lambda item: item[0]))
