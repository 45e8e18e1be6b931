"""Every method as a small class: `prefill(query, key, value)`, then `step(query, key, value)` for each new token.

A step runs in one fixed order: `_arrive` (append, and whatever must happen before attention), attention over all that
is held, `_settle` (new scores, eviction, demotion, late quantisation). After each call `views()` shows what the next
attention would read before its own token is appended, and `seen` what the last step's attention did read.
"""

from dataclasses import dataclass, field
from fractions import Fraction
from typing import ClassVar

import numpy as np

from .allocation import count_of, margin, pyramid_ratios, pyramidkv_budgets, top_positions
from .attention import View, attend, causal_attention, column_sums, window_scores
from .quantiser import (
    EXACT_BITS,
    METADATA_BITS,
    damped,
    gptq,
    hadamard,
    integer_zero_roundtrip,
    on_grid,
    roundtrip_per_channel,
    roundtrip_per_token,
    searched_grid,
    short_triangle,
)


@dataclass
class Stored:
    """One token's key or value in one head, as attention reads it, and what it costs."""

    array: np.ndarray
    packed: bool = False
    code_bits: int = 0
    metadata_bits: Fraction = Fraction(0)


@dataclass
class Token:
    """One token that one head still holds."""

    position: int
    key: Stored
    value: Stored
    score: float = 0.0
    friendliness: float = 0.0
    important: bool = True


@dataclass
class Bits:
    """Bits held for K and V. The balancer and the running scores are counted apart."""

    codes: int = 0
    metadata: int = 0
    dense: int = 0
    balancer: int = 0
    scores: int = 0

    @property
    def kv(self) -> int:
        """Codes, metadata and dense numbers."""
        return self.codes + self.metadata + self.dense

    @property
    def total(self) -> int:
        """Everything."""
        return self.kv + self.balancer + self.scores


@dataclass(kw_only=True)
class Method:
    """What all methods share. Everything is kept per kv head; `per_query_head` repeats K and V to the query heads
    first (1.1).
    """

    per_query_head: bool = False
    scale: float | None = None
    metadata: str = "float16"
    dense_bits: int = 16
    heads: list[list[Token]] = field(init=False, repr=False, default_factory=list)
    seen: list[View] = field(init=False, repr=False, default_factory=list)
    received: list[np.ndarray] = field(init=False, repr=False, default_factory=list)
    prompt_length: int = field(init=False, repr=False, default=0)
    length: int = field(init=False, repr=False, default=0)
    closest_call: float = field(init=False, repr=False, default=np.inf)

    updates_scores: ClassVar[bool] = False

    # -- the two calls -----------------------------------------------------------------------------------------------

    def prefill(self, query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
        """Take the prompt, compress it, and return its exact attention `[T, N, H]`."""
        if query.ndim != 3 or key.shape != value.shape or query.shape[::2] != key.shape[::2] or not len(query):
            raise ValueError(f"wrong prompt shapes: query {query.shape}, key {key.shape}, value {value.shape}")
        if query.shape[1] % key.shape[1]:
            raise ValueError(f"{query.shape[1]} query heads do not divide over {key.shape[1]} kv heads")
        key, value = self._repeat(query, key), self._repeat(query, value)
        self.prompt_length = self.length = len(query)
        self.closest_call = np.inf
        self.seen, self.received = [], []
        self.heads = [
            [Token(t, Stored(key[t, h]), Stored(value[t, h])) for t in range(len(key))] for h in range(key.shape[1])
        ]
        self._compress(query, key, value)
        return causal_attention(query, key, value, self.scale)

    def step(self, query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
        """Take one new token and return its attention `[N, H]`."""
        if not self.heads:
            raise ValueError("call prefill before step")
        key, value = self._repeat(query, key), self._repeat(query, value)
        self._arrive(key, value)
        self.length += 1
        self.seen = self.views()
        output, self.received = attend(query, self.seen, self.scale)
        self._settle(self.received)
        return output

    # -- what a method does ------------------------------------------------------------------------------------------

    def _compress(self, query: np.ndarray, key: np.ndarray, value: np.ndarray) -> None:
        """Cut and quantise the prompt, which `heads` hold whole at the start."""

    def _arrive(self, key: np.ndarray, value: np.ndarray) -> None:
        """Append the new token; anything done before attention."""
        for h, head in enumerate(self.heads):
            head.append(Token(self.length, Stored(key[h]), Stored(value[h])))

    def _settle(self, received: list[np.ndarray]) -> None:
        """Anything done after attention."""

    # -- what a test can look at -------------------------------------------------------------------------------------

    def views(self) -> list[View]:
        """For every head: positions, and keys and values as attention reads them, oldest first."""
        return [
            View(
                np.array([token.position for token in head], int),
                np.array([token.key.array for token in head], np.float64),
                np.array([token.value.array for token in head], np.float64),
            )
            for head in self.heads
        ]

    def positions(self) -> list[list[int]]:
        """Positions held, for every head."""
        return [[token.position for token in head] for head in self.heads]

    def kept_prompt_positions(self) -> list[list[int]]:
        """Prompt positions held, for every head."""
        return [[p for p in head if p < self.prompt_length] for head in self.positions()]

    def scores(self) -> list[list[float]]:
        """Scores of the held tokens, for every head."""
        return [[token.score for token in head] for head in self.heads]

    @property
    def held(self) -> int:
        """Number of tokens held by each head."""
        return self._same(len(head) for head in self.heads)

    @property
    def packed_key_length(self) -> int:
        """Number of keys held as codes by each head."""
        return self._same(sum(token.key.packed for token in head) for head in self.heads)

    @property
    def packed_value_length(self) -> int:
        """Number of values held as codes by each head."""
        return self._same(sum(token.value.packed for token in head) for head in self.heads)

    @property
    def window_key_length(self) -> int:
        """Number of keys held dense by each head."""
        return self.held - self.packed_key_length

    @property
    def window_value_length(self) -> int:
        """Number of values held dense by each head."""
        return self.held - self.packed_value_length

    def bits(self) -> Bits:
        """Bits held now, counted from the tokens and groups themselves."""
        codes, metadata, dense, count = 0, Fraction(0), 0, 0
        for head in self.heads:
            for token in head:
                count += 1
                for stored in (token.key, token.value):
                    codes += stored.code_bits
                    metadata += stored.metadata_bits
                    dense += 0 if stored.packed else self.dense_bits * len(stored.array)
        if metadata.denominator != 1:
            raise AssertionError("a group is held in part")
        return Bits(codes, int(metadata), dense, scores=32 * count if self.updates_scores else 0)

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _repeat(self, query: np.ndarray, x: np.ndarray) -> np.ndarray:
        return np.repeat(x, query.shape[-2] // x.shape[-2], axis=-2) if self.per_query_head else x

    @staticmethod
    def _same(numbers) -> int:
        (number,) = set(numbers)
        return number

    def _top(self, scores: np.ndarray, count: int) -> list[int]:
        self.closest_call = min(self.closest_call, margin(scores, count))
        return top_positions(scores, count)

    def _lowest(self, tokens: list[Token]) -> Token:
        """The token of lowest score. Of equal scores the later position goes, as if the others had been picked by
        `_top`.
        """
        self.closest_call = min(self.closest_call, margin(np.array([t.score for t in tokens]), len(tokens) - 1))
        return min(tokens, key=lambda token: (token.score, -token.position))

    def _keep(self, h: int, kept: list[int]) -> None:
        """Hold only these prompt positions in head h, sorted by position."""
        self.heads[h] = [token for token in self.heads[h] if token.position in set(kept)]

    def _stored(self, array: np.ndarray, bits: int, group: int) -> Stored:
        """What `bits`-wide codes of this vector cost when `group` numbers share one scale and one minimum."""
        if bits == EXACT_BITS:
            return Stored(array, True, EXACT_BITS * len(array))
        return Stored(array, True, bits * len(array), Fraction(2 * METADATA_BITS[self.metadata] * len(array), group))

    def _pack_keys(self, tokens: list[Token], bits: int, group: int) -> None:
        """Quantise the keys of these neighbouring tokens per channel, in groups of `group` tokens (0.2)."""
        if tokens:
            back = roundtrip_per_channel(np.stack([t.key.array for t in tokens]), bits, group, self.metadata)
            for token, array in zip(tokens, back, strict=True):
                token.key = self._stored(array, bits, group)

    def _pack_values(self, tokens: list[Token], bits: int, group: int) -> None:
        """Quantise the values of these tokens per token, in groups of `group` channels (0.2)."""
        if tokens:
            back = roundtrip_per_token(np.stack([t.value.array for t in tokens]), bits, group, self.metadata)
            for token, array in zip(tokens, back, strict=True):
                token.value = self._stored(array, bits, group)


@dataclass(kw_only=True)
class Full(Method):
    """The uncompressed cache."""


@dataclass(kw_only=True)
class StreamingLLM(Method):
    """Section 4.5 with original rotary positions: the first `sinks` tokens and the last `recent`.

    `make_room="before"` (the source): the oldest recent token leaves before the new one is appended, so attention
    reads sinks + recent tokens, the new one included. `"after"`: attention reads one token more, and the oldest
    leaves afterwards.
    """

    sinks: int = 4
    recent: float = 512
    make_room: str = "before"
    _recent: int = field(init=False, repr=False, default=0)

    def _compress(self, query, key, value):
        n = len(key)
        self._recent = count_of(n, self.recent)
        if self._recent < 1:
            raise ValueError("StreamingLLM needs a recent window of at least one token")
        if self.make_room not in ("before", "after"):
            raise ValueError(f"make_room must be 'before' or 'after', got {self.make_room!r}")
        for h in range(len(self.heads)):
            self._keep(h, [t for t in range(n) if t < self.sinks or t >= n - self._recent])

    def _arrive(self, key, value):
        if self.make_room == "before":
            self._slide(self.sinks + self._recent - 1)
        super()._arrive(key, value)

    def _settle(self, received):
        if self.make_room == "after":
            self._slide(self.sinks + self._recent)

    def _slide(self, room: int) -> None:
        for head in self.heads:
            while len(head) > room:
                del head[self.sinks]


@dataclass(kw_only=True)
class H2O(Method):
    """Section 4.1, per kv head: the `heavy` tokens of largest accumulated attention and the last `recent`.

    Each step adds the new attention row to the scores and then, once more than heavy + recent tokens are held, evicts
    the lowest score outside the last `recent` tokens. The step's own output still reads the victim. `persistent`: no
    eviction after the prefill.
    """

    heavy: float = 0.1
    recent: float = 0.1
    persistent: bool = False
    _heavy: int = field(init=False, repr=False, default=0)
    _recent: int = field(init=False, repr=False, default=0)

    updates_scores: ClassVar[bool] = True

    def _compress(self, query, key, value):
        self._heavy, self._recent = _counts(len(key), self.heavy, self.recent)
        for h, scores in enumerate(column_sums(query, key, self.scale)):
            for token, score in zip(self.heads[h], scores, strict=True):
                token.score = score
            self._keep(h, _heavy_and_recent(self, scores, self._heavy, self._recent))

    def _settle(self, received):
        _add(self.heads, received)
        for head in self.heads:
            while not self.persistent and len(head) > self._heavy + self._recent:
                head.remove(self._lowest(head[: len(head) - self._recent]))

    def bits(self) -> Bits:
        """As counted by `Method`; frozen sets need no scores."""
        bits = super().bits()
        bits.scores = 0 if self.persistent else bits.scores
        return bits


@dataclass(kw_only=True)
class SnapKV(Method):
    """Section 4.2, per kv head: the last `window` prompt tokens and the capacity - window best of the others; once,
    at prefill.

    A capacity below the window keeps the last max(1, capacity) tokens (section 1.10).
    """

    window: int = 32
    capacity: float = 2048
    kernel: int = 5
    pooling: str = "avg"

    def _compress(self, query, key, value):
        n = len(key)
        capacity = count_of(n, self.capacity)
        if n < capacity:
            return
        if capacity < self.window:
            for h in range(len(self.heads)):
                self._keep(h, list(range(n - max(1, capacity), n)))
            return
        budget = self._budget(capacity, n)
        scores = window_scores(query, key, self.window, self.kernel, self.pooling, self.scale)
        for h in range(len(self.heads)):
            self._keep(h, self._top(scores[h], budget) + list(range(n - self.window, n)))

    def _budget(self, capacity: int, length: int) -> int:
        return capacity - self.window


@dataclass(kw_only=True)
class ThinK(SnapKV):
    """Section 5.1 on SnapKV: keys that are not among the newest `recent` held ones lose the channels of the lowest
    mean(q_c^2) mean(k_c^2), over the last 32 queries of the head's group and all kept keys.

    int(H drop) channels go, or as many fewer as make the number of the others a multiple of 8. A lost channel is 0.
    """

    drop: float = 0.4
    recent: int = 32
    channels: list[np.ndarray] = field(init=False, repr=False, default_factory=list)

    def _compress(self, query, key, value):
        super()._compress(query, key, value)
        size, group = key.shape[-1], query.shape[1] // key.shape[1]
        left = -(-(size - int(size * self.drop)) // 8) * 8
        self.channels = []
        for h, head in enumerate(self.heads):
            of_query = np.mean(query[-32:, h * group : (h + 1) * group] ** 2, axis=(0, 1))
            of_key = np.mean(np.stack([token.key.array for token in head]) ** 2, axis=0)
            self.channels.append(np.isin(np.arange(size), self._top(of_query * of_key, left)))
        self._prune()

    def _arrive(self, key, value):
        super()._arrive(key, value)
        self._prune()

    def _prune(self) -> None:
        for held, head in zip(self.channels, self.heads):
            for token in head[: -self.recent]:
                token.key = Stored(np.where(held, token.key.array, 0))


@dataclass(kw_only=True)
class PyramidKV(SnapKV):
    """Section 4.3: SnapKV's scores, and a budget that falls with the layer."""

    layer: int
    layers: int
    beta: int = 20

    def _budget(self, capacity, length):
        return pyramidkv_budgets(capacity, self.window, self.layers, length, self.beta)[self.layer]


@dataclass(kw_only=True)
class KVMerger(Method):
    """Section 5.2, to a budget: neighbours whose keys have a cosine of `threshold` or more become one token, the likest
    first, until int(N * budget) tokens are left; if these are too few, sets of the least attention leave.

    The last int(budget * recent / share) tokens and the int(N * heavy) most attended others stay alone. A set's key is
    the mean of its keys, weighted by a Gaussian of their distance from the most attended one, in whose place it stands;
    its value is the weighted mean times the set's size.
    """

    budget: float = 0.5
    heavy: float = 0.12
    recent: float = 0.17
    threshold: float = 0.75
    sigma: float | None = None
    values: str = "sum"

    def _compress(self, query, key, value):
        n = len(key)
        total = count_of(n, self.budget)
        recent = min(count_of(total, self.recent / self.budget), total)
        total, recent = (1, 1) if total == 0 else (total, recent)
        heavy = min(count_of(n, self.heavy), total - recent)
        for h, scores in enumerate(column_sums(query, key, self.scale)):
            alone = set(range(n - recent, n)) | set(self._top(scores[: n - recent], heavy))
            sets = self._sets(key[:, h], alone, n - total)
            best = self._top(np.array([scores[members].sum() for members in sets]), total - len(alone))
            kept = []
            for members in (sets[i] for i in best):
                self.closest_call = min(self.closest_call, margin(scores[members], 1))
                pivot = members[int(np.argmax(scores[members]))]
                self._merge(h, key[members, h], value[members, h], members.index(pivot), pivot)
                kept.append(pivot)
            self._keep(h, sorted(alone | set(kept)))

    def _sets(self, key: np.ndarray, alone: set[int], joins: int) -> list[list[int]]:
        pairs = [t for t in range(1, len(key)) if t not in alone and t - 1 not in alone]
        exact = {t: 4096 * key[t] @ key[t - 1] / np.linalg.norm(key[t]) / np.linalg.norm(key[t - 1]) for t in pairs}
        cosine = {t: np.round(c) / 4096 for t, c in exact.items()}
        # float32 may round what is half-way to the other side.
        self.closest_call = min([self.closest_call, *((0.5 - abs(c - np.round(c))) / 40 for c in exact.values())])
        like = [t for t in pairs if cosine[t] >= self.threshold]
        joined = {like[i] for i in self._top(np.array([cosine[t] for t in like]), min(joins, len(like)))}
        sets: list[list[int]] = []
        for t in range(len(key)):
            if t in joined:
                sets[-1].append(t)
            elif t not in alone:
                sets.append([t])
        return sets

    def _merge(self, h: int, keys, values, which: int, pivot: int) -> None:
        if len(keys) == 1:
            return
        distance = np.linalg.norm(keys - keys[which], axis=1)
        sigma = distance.sum() / (2**0.5 * len(keys)) if self.sigma is None else self.sigma
        weight = np.exp(-((distance / sigma) ** 2) / 2)
        weight /= weight.sum()
        token = self.heads[h][pivot]
        size = len(keys) if self.values == "sum" else 1
        token.key, token.value = Stored(weight @ keys), Stored(size * (weight @ values))


@dataclass(kw_only=True)
class QHitter(Method):
    """Section 4.4: H2O's attention mixed with how well a token survives quantisation; every held token is quantised.

    Outside the last `recent` tokens a head keeps int(N * default) tokens by accumulated attention alone, and of the
    others the best by weight * minmax(attention) + (1 - weight) * friendliness until `heavy` are held. Each step
    selects again among what is held. `quantiser="integer-zero"` is the source's own; `"min-max"` is section 0.1 over
    the whole head. `dense_recent` leaves the recent tokens exact until they leave the window.
    """

    heavy: float = 0.15
    recent: float = 0.05
    default: float = 0.07
    weight: float = 0.5
    code_bits: int = 4
    quantiser: str = "integer-zero"
    dense_recent: bool = False
    _heavy: int = field(init=False, repr=False, default=0)
    _recent: int = field(init=False, repr=False, default=0)
    _default: int = field(init=False, repr=False, default=0)

    updates_scores: ClassVar[bool] = True

    def _roundtrip(self, x: np.ndarray) -> np.ndarray:
        if self.quantiser == "integer-zero":
            return integer_zero_roundtrip(x, self.code_bits, self.metadata)
        if self.quantiser == "min-max":
            return roundtrip_per_token(x, self.code_bits, x.shape[-1], self.metadata)
        raise ValueError(f"quantiser must be 'integer-zero' or 'min-max', got {self.quantiser!r}")

    def _friendliness(self, key: np.ndarray, value: np.ndarray) -> np.ndarray:
        """`[K, T]` for `[T, K, H]` tokens: (2 - e_K - e_V) / 2, both errors min-max normalised over these heads and
        tokens.
        """
        errors = []
        for x in (key, value):
            back = np.stack([self._roundtrip(x[:, h]) for h in range(x.shape[1])])
            errors.append(minmax(np.sqrt(((back - np.swapaxes(x, 0, 1).astype(np.float64)) ** 2).sum(axis=-1))))
        return (2 - errors[0] - errors[1]) / 2

    def _compress(self, query, key, value):
        n = len(key)
        self._heavy, self._recent = _counts(n, self.heavy, self.recent)
        self._default = min(count_of(n, self.default), self._heavy)
        for head, scores, friendly in zip(
            self.heads, column_sums(query, key, self.scale), self._friendliness(key, value), strict=True
        ):
            for token, score, q in zip(head, scores, friendly, strict=True):
                token.score, token.friendliness = score, q
        self._choose()

    def _arrive(self, key, value):
        super()._arrive(key, value)
        for head, (q,) in zip(self.heads, self._friendliness(key[None], value[None]), strict=True):
            head[-1].friendliness = q
        self._quantise()

    def _settle(self, received):
        _add(self.heads, received)
        self._choose()

    def _choose(self) -> None:
        """Cut every head to heavy + recent tokens, then quantise."""
        attention = minmax([token.score for head in self.heads for token in head])
        friendly = np.array([token.friendliness for head in self.heads for token in head])
        combined = self.weight * attention + (1 - self.weight) * friendly
        start = 0
        for h, head in enumerate(self.heads):
            mixed, start = combined[start : start + len(head)], start + len(head)
            old = len(head) - self._recent
            if len(head) <= self._heavy + self._recent:
                continue
            first = self._top(np.array([token.score for token in head[:old]]), self._default)
            others = [i for i in range(old) if i not in first]
            second = [others[i] for i in self._top(mixed[others], self._heavy - self._default)]
            self.heads[h] = [head[i] for i in sorted(first + second)] + head[old:]
        self._quantise()

    def _quantise(self) -> None:
        for head in self.heads:
            for i, token in enumerate(head):
                if not token.key.packed and (not self.dense_recent or i < len(head) - self._recent):
                    for name in ("key", "value"):
                        back = self._roundtrip(getattr(token, name).array[None])[0]
                        setattr(token, name, self._stored(back, self.code_bits, len(back)))


@dataclass(kw_only=True)
class KIVI(Method):
    """Section 3: nothing is dropped. Keys per channel over `group` tokens, values per token over `group` channels.

    Prefill leaves N mod residual keys and the last `residual` values dense. At a step the key tail, once it holds
    `residual` tokens, is quantised after the logits; a value tail of residual + 1 gives up its oldest token after the
    output.
    """

    code_bits: int = 2
    group: int = 32
    residual: int = 128

    def _compress(self, query, key, value):
        n = len(key)
        _check_groups(self.group, self.residual, key.shape[-1])
        for head in self.heads:
            self._pack_keys(head[: n - n % self.residual], self.code_bits, self.group)
            self._pack_values(head[: max(0, n - self.residual)], self.code_bits, self.group)

    def _settle(self, received):
        for head in self.heads:
            tail = [token for token in head if not token.key.packed]
            if len(tail) == self.residual:
                self._pack_keys(tail, self.code_bits, self.group)
            tail = [token for token in head if not token.value.packed]
            if len(tail) > self.residual:
                self._pack_values(tail[:1], self.code_bits, self.group)


@dataclass(kw_only=True)
class MiniKV(Method):
    """Section 1: int(N * heavy) tokens by accumulated attention outside the last int(N * recent), and those; all
    fixed at prefill.

    The kept tokens, sorted by position, are quantised but for the last kept mod group, which start the dense buffer.
    A step appends to the buffer, quantises it whole if it now holds `residual` tokens, and only then attends. If both
    counts are zero the last token is kept. `allocation="pyramid"` takes `heavy` from section 1.3.
    """

    heavy: float = 0.25
    recent: float = 0.25
    code_bits: int = 2
    group: int = 16
    residual: int = 128
    allocation: str = "uniform"
    depth: float = 7
    layer: int = 0
    layers: int = 1

    def _compress(self, query, key, value):
        _check_groups(self.group, self.residual, key.shape[-1])
        heavy, recent = _counts(len(key), self._heavy_share(), self.recent)
        for h, scores in enumerate(column_sums(query, key, self.scale)):
            for token, score in zip(self.heads[h], scores, strict=True):
                token.score = score
            self._keep(h, _heavy_and_recent(self, scores, heavy, recent))
            kept = len(self.heads[h])
            self._flush(self.heads[h][: kept - kept % self.group])

    def _arrive(self, key, value):
        super()._arrive(key, value)
        for head in self.heads:
            buffer = [token for token in head if not token.key.packed]
            if len(buffer) >= self.residual:
                self._flush(buffer)

    def _flush(self, tokens: list[Token]) -> None:
        self._pack_keys(tokens, self.code_bits, self.group)
        self._pack_values(tokens, self.code_bits, self.group)

    def _heavy_share(self) -> float:
        if self.allocation == "uniform":
            return self.heavy
        if self.allocation == "pyramid":
            return float(pyramid_ratios(self.heavy, self.layers, self.depth)[self.layer])
        raise ValueError(f"allocation must be 'uniform' or 'pyramid', got {self.allocation!r}")


@dataclass(kw_only=True)
class MiniKVPlus(MiniKV):
    """MiniKV with additions. The first `sinks` tokens are kept on top of the others, and stay dense for good. Channels
    of keys are balanced against the queries' by what varies within groups, those of values against the rows of the
    output projection, or to one loudness, all by powers of two; then keys, values and queries are rotated by a Hadamard
    matrix. Grids of the groups are searched and have metadata of four
    significant bits. Keys are rounded by GPTQ with the second moments of the prompt's queries, whose triangle is kept
    in eight bits for keys that come later. Of a prompt, and of each full buffer, the newest `keeps` tokens stay dense.
    Values are in groups of `channels`, or of `group`.
    """

    channels: int | None = None
    sinks: int = 4
    keeps: int = 0
    factors: tuple[float, ...] = (0.95, 0.9, 0.85)
    metadata: str = "float8_e4m3fn"
    projection: np.ndarray | None = None
    later: list[np.ndarray] = field(init=False, repr=False, default_factory=list)
    units: list[tuple[float, float]] = field(init=False, repr=False, default_factory=list)
    balances: list[tuple[np.ndarray, np.ndarray]] = field(init=False, repr=False, default_factory=list)

    def _balance(self, query, key, value, rows) -> tuple[np.ndarray, np.ndarray]:
        """Factors of one head's channels: its queries [T, G, H], keys and values behind the sinks, rows [.., H]."""
        n, whole = len(key), len(key) // self.group * self.group
        varying = key
        if whole:
            groups = key[:whole].reshape(-1, self.group, key.shape[1])
            varying = (groups - groups.mean(axis=1, keepdims=True)).reshape(whole, -1)

        def log_energy(squares, count):
            return np.log2(np.maximum(squares + squares.mean() / max(count, 1), float(np.finfo(np.float32).tiny)))

        of_query = log_energy(np.sum(query**2, axis=(0, 1)), n)
        of_key = log_energy(np.sum(varying**2, axis=0), len(varying))
        of_value = log_energy(np.sum(value**2, axis=0), n)
        for_values = -of_value / 2
        if rows is not None:
            for_values = (log_energy(np.sum(rows**2, axis=0), 2**20) - of_value) / 4
        exponents = [x - x.mean() for x in (of_query / 8 - 3 / 8 * of_key, for_values)]
        calls = [np.abs(np.abs(x - np.round(x)) - 0.5).min() for x in exponents]
        self.closest_call = min(self.closest_call, *calls)
        of_keys, of_values = (2.0 ** np.round(x) for x in exponents)
        return of_keys, of_values

    def _compress(self, query, key, value):
        turn = hadamard(key.shape[-1])
        grouped = query.reshape(len(query), key.shape[1], -1, key.shape[2])
        for h in range(key.shape[1]):
            rows = None
            if self.projection is not None:
                of_head = self.projection.reshape(*grouped.shape[1:], -1)[h]
                rows = np.moveaxis(of_head, -1, 1).reshape(-1, key.shape[2])
            self.balances.append(self._balance(grouped[:, h], key[self.sinks :, h], value[self.sinks :, h], rows))
        factors = [np.stack(x) for x in zip(*self.balances, strict=True)]
        loudest = (
            np.abs((x * factor)[self.sinks :] @ turn).max(axis=(0, 2), initial=0)
            for x, factor in zip((key, value), factors, strict=True)
        )
        # Eight bits hold little range: in these units the loudest number of the prompt lies from 64 to 128.
        self.units = list(zip(*(np.where(x > 0, 2.0 ** (np.frexp(x)[1] - 5), 1.0) for x in loudest), strict=True))
        n = len(key)
        heavy, recent = count_of(n, self.heavy), count_of(n, self.recent)
        total = min(n, heavy + recent + self.sinks) if self.heavy + self.recent < 1 else n
        always = {t for t in range(n) if t < self.sinks or t >= n - recent}
        for h, scores in enumerate(column_sums(query, key, self.scale)):
            others = np.array([t for t in range(n) if t not in always], int)
            best = self._top(scores[others], total - len(always)) if len(others) else []
            self._keep(h, sorted(always | {int(others[i]) for i in best}))
            body = self.heads[h][self.sinks :]
            asked = grouped[:, h].reshape(-1, key.shape[2]) / self.balances[h][0] @ turn
            moment = damped(asked.T @ asked)
            self._encode(body[: max(len(body) - self.keeps, 0) // self.group * self.group], moment, h)
            self.later.append(short_triangle(moment, self.metadata))
            if len(asked) < 2 * key.shape[2]:
                # Few queries leave directions empty; what is lost there is multiplied, and float32 parts from float64.
                self.closest_call = 0.0

    def _arrive(self, key, value):
        Method._arrive(self, key, value)
        for h, (head, triangle) in enumerate(zip(self.heads, self.later, strict=True)):
            buffer = [token for token in head[self.sinks :] if not token.key.packed]
            if len(buffer) == self.residual:
                # What stands between the triangle and its transpose changes nothing.
                self._encode(buffer[: self.residual - self.keeps], triangle @ triangle.T, h)

    def _encode(self, tokens: list[Token], moment: np.ndarray, h: int) -> None:
        if not tokens:
            return
        key, value = (np.stack([x.array for x in column]) for column in zip(*((t.key, t.value) for t in tokens)))
        turn, calls = hadamard(key.shape[1]), []

        def grid(numbers):
            return searched_grid(numbers, self.code_bits, self.factors, 4, calls, least=2.0**-9)

        held = list(zip(self.balances[h], self.units[h], strict=True))
        key, value = (
            np.float32(x * factor @ turn / unit) for x, (factor, unit) in zip((key, value), held, strict=True)
        )
        for start in range(0, len(key), self.group):
            group = key[start : start + self.group]
            key[start : start + self.group] = gptq(group, grid, moment, self.code_bits, calls)
        width = self.channels or self.group
        for token in value:
            for start in range(0, len(token), width):
                part = token[start : start + width]
                token[start : start + width] = on_grid(part, self.code_bits, *grid(part), calls)
        # A code or a grid that is nearly another one moves all that is rounded after it, and what is rounded here comes
        # out of sums in which float32 has lost a digit or two: a call of 7e-5 once went the other way.
        self.closest_call = min(self.closest_call, min(calls) / 10)
        key, value = (x @ turn * unit / factor for x, (factor, unit) in zip((key, value), held, strict=True))
        for token, k, v in zip(tokens, key, value, strict=True):
            token.key = self._stored(k, self.code_bits, self.group)
            token.value = self._stored(v, self.code_bits, width)


@dataclass(kw_only=True)
class MiKV(Method):
    """Section 2: nothing is dropped. int(ratio * N) important tokens, of them int(recent_share * that) by recency;
    the rest retained.

    Retained tokens are quantised per token in half-head groups, keys after the channel balancer. Important tokens
    stay dense, or take the same quantiser at `important_bits` without the balancer. A new token is important; after
    attention the scores get the new row, and while more than int(ratio * N) tokens are important the lowest score
    outside the recent ones is demoted: it is quantised again from what is stored, for good. `budget="current"` takes
    the share of all tokens so far instead of the prompt. `persistent`, and a ratio of 1 or more: no demotion.
    """

    ratio: float = 0.2
    recent_share: float = 0.5
    retained_bits: int = 2
    important_bits: int = 16
    balancer: bool = True
    balance_important: bool = False
    budget: str = "prompt"
    persistent: bool = False
    balance: np.ndarray = field(init=False, repr=False, default_factory=lambda: np.ones((0, 0), np.float32))

    updates_scores: ClassVar[bool] = True

    def _compress(self, query, key, value):
        _, kv_heads, size = key.shape
        if size % 2:
            raise ValueError(f"half-head groups need an even head size, got {size}")
        if self.budget not in ("prompt", "current"):
            raise ValueError(f"budget must be 'prompt' or 'current', got {self.budget!r}")
        self.balance = channel_balancer(query, key) if self.balancer else np.ones((kv_heads, size), np.float32)
        important, recent = self._important_counts()
        for h, scores in enumerate(column_sums(query, key, self.scale)):
            kept = set(_heavy_and_recent(self, scores, important - recent, recent))
            for token, score in zip(self.heads[h], scores, strict=True):
                token.score = score
                token.important = token.position in kept
                self._place(h, token)

    def _arrive(self, key, value):
        super()._arrive(key, value)
        for h, head in enumerate(self.heads):
            self._place(h, head[-1])

    def _settle(self, received):
        _add(self.heads, received)
        if self.frozen:
            return
        limit, recent = self._important_counts()
        for h, head in enumerate(self.heads):
            important = [token for token in head if token.important]
            while len(important) > limit:
                token = self._lowest(important[: len(important) - recent])
                important.remove(token)
                token.important = False
                self._place(h, token)

    @property
    def frozen(self) -> bool:
        """Whether the important set only grows."""
        return self.persistent or self.ratio >= 1

    def important_positions(self) -> list[list[int]]:
        """Positions of the important tier, for every head."""
        return [[token.position for token in head if token.important] for head in self.heads]

    def retained_positions(self) -> list[list[int]]:
        """Positions of the retained tier, for every head."""
        return [[token.position for token in head if not token.important] for head in self.heads]

    def bits(self) -> Bits:
        """As counted by `Method`, plus the float32 balancer; scores are needed for important tokens alone, and for
        none if frozen.
        """
        bits = super().bits()
        bits.balancer = 32 * self.balance.size if self.balancer else 0
        bits.scores = 0 if self.frozen else 32 * sum(len(head) for head in self.important_positions())
        return bits

    def _important_counts(self) -> tuple[int, int]:
        tokens = self.prompt_length if self.budget == "prompt" else self.length
        important = int(float(self.ratio) * tokens)
        return important, int(self.recent_share * important)

    def _place(self, h: int, token: Token) -> None:
        """Store a token as its tier does, from what is stored of it now."""
        bits = self.important_bits if token.important else self.retained_bits
        if token.important and bits == EXACT_BITS:
            return
        half = len(token.key.array) // 2
        balanced_tier = self.balance_important or not token.important
        balance = self.balance[h] if balanced_tier else np.ones_like(self.balance[h])
        if bits == EXACT_BITS:
            key, value = token.key.array, token.value.array
        else:
            balanced = np.asarray(token.key.array, np.float32) * balance
            back = roundtrip_per_token(balanced[None], bits, half, self.metadata)[0]
            key = back.astype(np.float64) / balance.astype(np.float64)
            value = roundtrip_per_token(token.value.array[None], bits, half, self.metadata)[0]
        token.key, token.value = self._stored(key, bits, half), self._stored(value, bits, half)


def channel_balancer(query: np.ndarray, key: np.ndarray, floor: float = 1e-5) -> np.ndarray:
    """`[K, H]`, float32: sqrt(max |query| / max |key|) of every channel over the prompt and the group's query heads
    (section 2.1 c).
    """
    length, kv_heads, size = key.shape
    grouped = np.asarray(query, np.float32).reshape(length, kv_heads, -1, size)
    largest_query = np.maximum(np.abs(grouped).max(axis=(0, 2)), np.float32(floor))
    largest_key = np.maximum(np.abs(np.asarray(key, np.float32)).max(axis=0), np.float32(floor))
    return np.sqrt(largest_query / largest_key)


def minmax(x) -> np.ndarray:
    """x moved and scaled to 0..1; zeros if all are equal."""
    x = np.asarray(x, np.float64)
    spread = x.max() - x.min()
    return (x - x.min()) / spread if spread > 0 else np.zeros_like(x)


def _counts(length: int, heavy: float, recent: float) -> tuple[int, int]:
    """Heavy and recent counts; a prompt never leaves an empty cache, so two zeros keep the last token."""
    heavy, recent = count_of(length, heavy), count_of(length, recent)
    return (heavy, recent) if heavy + recent else (0, 1)


def _heavy_and_recent(method: Method, scores: np.ndarray, heavy: int, recent: int) -> list[int]:
    """The last `recent` positions and the `heavy` best before them, or everything if that is all there is (1.2)."""
    n = len(scores)
    if heavy + recent >= n:
        return list(range(n))
    return method._top(scores[: n - recent], heavy) + list(range(n - recent, n))


def _add(heads: list[list[Token]], received: list[np.ndarray]) -> None:
    """Add one attention row to the scores of the tokens that it was read from."""
    for head, row in zip(heads, received, strict=True):
        for token, weight in zip(head, row, strict=True):
            token.score += weight


def _check_groups(group: int, residual: int, head_size: int) -> None:
    if residual % group:
        raise ValueError(f"the residual length, {residual}, must be a multiple of the group, {group}")
    if head_size % group:
        raise ValueError(f"the head size, {head_size}, must be a multiple of the group, {group}")
