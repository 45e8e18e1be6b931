"""Sequences do not notice each other, nor what lies in memory that is not theirs: poison, ended rows, slots, soak."""

import dataclasses
import functools
import gc

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations
from flax import nnx
from models import CONFIG, METHODS, MODEL, every, kinds, nearly_equal, tokens

from minikv_jax import (
    bucket,
    decode_step,
    empty_cache,
    extend,
    generate,
    insert,
    prefill,
    presets,
    reset,
    stream,
)
from minikv_jax.cache import LayerCache
from minikv_jax.evict import Ledger
from minikv_jax.models.llama import Llama
from minikv_jax.ring import KiviWindow
from minikv_jax.sampling import GREEDY, sample
from minikv_jax.segments import DenseSegment
from pallas_kernels import PackedTensor, quantize
from pallas_kernels.quantize import Codes

step = jax.jit(decode_step)


def rows(tree, b):
    """Row b of every array."""
    return [np.array(x[b]) for x in jax.tree.leaves(tree)]


def assert_same_rows(a, b):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


# ---- rows that have ended ------------------------------------------------------------------------------------------


def ends_of(free) -> tuple[list[int], list[int]]:
    """End tokens, so that the first row ends early, and the step at which each row ends."""
    ends = [int(free[0, 4])]
    count = free.shape[1]
    return ends, [next((i for i, token in enumerate(row.tolist()) if token in ends), count - 1) for row in free]


@pytest.mark.promise("A sequence that has ended keeps the cache of its last token while others go on")
@pytest.mark.parametrize("method", every("snapkv"))
def test_a_row_that_has_ended_stays_as_it_was_and_goes_on_as_it_would_alone(method):
    config = METHODS[method].replace(prompt_capacity=32, generated_capacity=60)
    text, lengths, turn = tokens(3, 24), np.array([24, 9, 17]), tokens(3, 6)
    free, _ = generate(MODEL, text, lengths, config, 30)
    ends, ended_at = ends_of(free)
    written, cache = generate(MODEL, text, lengths, config, 30, eos_token_ids=ends)
    assert cache.lengths.tolist() == (lengths + ended_at).tolist()
    assert cache.room.tolist() == [60 - i for i in ended_at]
    kept, last = {}, None
    for i, (token, last) in enumerate(stream(MODEL, text, lengths, config, 30, eos_token_ids=ends)):
        assert token.tolist() == written[:, i].tolist()
        kept |= {b: rows(last, b) for b in range(3) if i == ended_at[b]}
    for b in range(3):
        assert_same_rows(rows(last, b), kept[b])
    # Alone, sums are rounded in another order, which may tip a code and then a token.
    again, _ = extend(MODEL, cache, turn, np.full(3, 6))
    mine, alone = generate(MODEL, text[:1], lengths[:1], config, 30, eos_token_ids=ends)
    if mine[0].tolist() == written[0].tolist():
        assert alone.lengths.tolist() == [int(cache.lengths[0])]
        assert nearly_equal(extend(MODEL, alone, turn[:1], np.array([6]))[0][0], again[0])


# ---- poison --------------------------------------------------------------------------------------------------------


def _poison_rows(rng, x, used):
    """x [B, K, S, ...] with NaN, or with drawn bytes, where `used` [B, S] says that nothing is held."""
    whole = jnp.issubdtype(x.dtype, jnp.integer)
    bad = rng.integers(0, 256, x.shape) if whole else np.full(x.shape, np.nan, np.float32)
    used = used.reshape(used.shape[0], 1, used.shape[1], *(1,) * (x.ndim - 3))
    return jnp.asarray(np.where(used, np.asarray(x), bad.astype(x.dtype)))


def _poison_packed(rng, packed: PackedTensor, length) -> PackedTensor:
    codes, scale, zero = quantize.from_packed(packed)
    tokens_held = np.arange(codes.shape[2]) < length[:, None]
    per = codes.shape[2] // scale.shape[2]
    groups_held = np.arange(scale.shape[2]) * per < length[:, None]
    limit = np.uint8((1 << packed.bits) - 1)
    changed = Codes(
        _poison_rows(rng, np.asarray(codes), tokens_held) & limit,
        *(_poison_rows(rng, np.asarray(x), groups_held) for x in (scale, zero)),
    )
    return quantize.to_packed(changed, packed.bits, packed.group_size, packed.group_axis, packed.tokens_last)


def _poison_dense(rng, segment: DenseSegment) -> DenseSegment:
    held = np.arange(segment.capacity) < np.asarray(segment.length)[:, None]
    key, value = (_poison_rows(rng, x, held) for x in (segment.key, segment.value))
    return dataclasses.replace(segment, key=key, value=value)


def _poison_tier(rng, tier, keys_held=None):
    if tier is None or isinstance(tier, DenseSegment):
        return tier and _poison_dense(rng, tier)
    length = np.asarray(tier.length)
    return dataclasses.replace(
        tier,
        keys=_poison_packed(rng, tier.keys, length if keys_held is None else keys_held),
        values=_poison_packed(rng, tier.values, length),
    )


def poisoned_layer(rng, layer: LayerCache, lengths) -> LayerCache:
    """The layer with NaN and drawn bytes wherever it holds no token."""
    if isinstance(layer.flow, KiviWindow):
        window, packed_keys = layer.flow, np.asarray(layer.flow.packed_keys)
        size, ring = window.key.shape[2], window.value.shape[2]
        key = _poison_rows(rng, window.key, np.arange(size) < (lengths - packed_keys)[:, None])
        newest = (lengths - 1)[:, None] - ((lengths - 1)[:, None] - np.arange(ring)) % ring
        value = _poison_rows(rng, window.value, newest >= np.asarray(layer.first.length)[:, None])
        window = KiviWindow(key, value, window.packed_keys)
        return dataclasses.replace(layer, first=_poison_tier(rng, layer.first, packed_keys), flow=window)
    flow = layer.flow
    if isinstance(flow, Ledger):
        ledger = flow
        held = np.arange(layer.first.capacity) < np.asarray(layer.first.length)[:, None]
        held = held[:, : ledger.scores.shape[2]]
        names = [name for name in ("positions", "scores", "friendliness") if getattr(ledger, name) is not None]
        poisoned = {name: _poison_rows(rng, np.asarray(getattr(ledger, name)), held) for name in names}
        flow = dataclasses.replace(ledger, **poisoned)
    else:
        flow = _poison_tier(rng, flow)
    return dataclasses.replace(
        layer,
        first=_poison_tier(rng, layer.first),
        rest=_poison_tier(rng, layer.rest),
        flow=flow,
    )


def poisoned(cache):
    lengths, rng = np.asarray(cache.lengths), draws.rng()
    return dataclasses.replace(cache, layers=tuple(poisoned_layer(rng, layer, lengths) for layer in cache.layers))


@pytest.mark.promise("Nothing beyond a sequence's length is ever read: NaN there changes no bit of a result")
@pytest.mark.parametrize("method", every("minikv"))
def test_rows_that_hold_nothing_are_never_read(method, figure):
    config = METHODS[method].replace(prompt_capacity=40, generated_capacity=48)
    _, cache = prefill(MODEL, tokens(3, 40), np.array([40, 13, 1]), config)
    checks = 0
    # Slot 1 is freed; its rows are all poison then.
    cache = reset(cache, 1)
    spoiled = poisoned(cache)
    assert any(np.isnan(np.asarray(x, np.float32)).any() for x in jax.tree.leaves(spoiled.layers))
    for i in range(40):
        token = tokens(3)
        logits, cache = step(MODEL, cache, token)
        other, spoiled = step(MODEL, spoiled, token)
        np.testing.assert_array_equal(logits, other)
        checks += 1
        if i % 10 == 9:
            turn, counts = tokens(3, 3), np.array([2, 0, 1])
            logits, cache = extend(MODEL, cache, turn, counts)
            other, spoiled = extend(MODEL, spoiled, turn, counts)
            np.testing.assert_array_equal(logits, other)
            spoiled = poisoned(spoiled)
    assert not np.isnan(logits[0]).any()
    figure(f"{checks} steps over {len(jax.tree.leaves(cache))} arrays of {method}, bit-identical")


@pytest.mark.promise("NaN in padding reaches no result")
@pytest.mark.parametrize("method", every("minikv"))
def test_padding_that_is_nan_is_never_read(method):
    # One token's embedding is NaN, and padding holds that token. A tied model would answer NaN for it.
    model = Llama(CONFIG.replace(tie_word_embeddings=False), rngs=nnx.Rngs(params=2))
    pad = CONFIG.vocab_size - 1
    model.embedding.set_value(model.embedding[...].at[pad].set(jnp.nan))
    text, lengths, config = tokens(2, 30) % pad, np.array([30, 11]), METHODS[method]
    clean = np.where(np.arange(30) < lengths[:, None], text, 0)
    spoiled = np.where(np.arange(30) < lengths[:, None], text, pad)
    wanted, cache = prefill(model, clean, lengths, config)
    got, other = prefill(model, spoiled, lengths, config)
    np.testing.assert_array_equal(got, wanted)
    for _ in range(3):
        token = tokens(2) % pad
        (wanted, cache), (got, other) = step(model, cache, token), step(model, other, token)
        np.testing.assert_array_equal(got, wanted)


# ---- batches, repeats, slots ---------------------------------------------------------------------------------------


@pytest.mark.promise("What a sequence gets does not depend on its neighbours in a batch of 17, bit for bit")
@pytest.mark.parametrize("method", kinds("kivi"))
def test_neighbours_change_no_bit(method):
    config, at, mine = METHODS[method], 11, tokens(1, 30)
    results = []
    for _ in range(2):
        text = jnp.asarray(tokens(17, 30)).at[at].set(mine[0])
        lengths = draws.rng().integers(1, 31, 17)
        lengths[at] = 27
        logits, cache = prefill(MODEL, text, lengths, config)
        seen = [np.asarray(logits[at])]
        for i in range(20):
            logits, cache = step(MODEL, cache, jnp.asarray(tokens(17)).at[at].set(mine[0, i]))
            seen.append(np.asarray(logits[at]))
        results.append([*seen, *rows(cache, at)])
    assert_same_rows(*results)


def repeated(method: str, times: int) -> None:
    config, text, lengths = METHODS[method], tokens(3, 30), np.array([30, 13, 22])

    def run():
        written, cache = generate(MODEL, text, lengths, config, 24)
        return [np.asarray(x) for x in (written, *jax.tree.leaves(cache))]

    first = run()
    for _ in range(times - 1):
        assert_same_rows(run(), first)


@pytest.mark.promise("The same call gives the same bits every time")
@pytest.mark.parametrize("method", kinds("minikv"))
def test_repeated_runs_are_bitwise_equal(method, figure):
    repeated(method, 20)
    figure("20 runs on a CPU")


@pytest.mark.promise("The same call gives the same bits every time on a GPU")
@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_repeated_runs_are_bitwise_equal_on_a_gpu(method, figure):
    repeated(method, 100)
    figure("100 runs")


STEPS = 8


@functools.partial(jax.jit, donate_argnames="cache")
def decode(cache, token, ends):
    """As in examples/serve_loop.py."""

    def one(state, _):
        cache, token = state
        logits, cache = decode_step(MODEL, cache, token)
        new = sample(logits, jax.random.key(0), GREEDY)
        return (cache, jnp.where(jnp.isin(new, ends), -1, new)), new

    (cache, token), written = jax.lax.scan(one, (cache, token), length=STEPS)
    return written, token, cache


put, clear = jax.jit(insert, donate_argnums=0), jax.jit(reset, donate_argnums=0)


class Pool:
    """Slots that sequences are put into and taken out of, and what each has written."""

    def __init__(self, config, slots: int, ends):
        self.cache, self.token = empty_cache(MODEL, config, slots), np.full(slots, -1, np.int32)
        self.written, self.ends = [[] for _ in range(slots)], jnp.asarray(ends, jnp.int32)

    def start(self, slot: int, prefix, first: int) -> None:
        self.cache, self.written[slot] = put(self.cache, slot, prefix), [first]
        self.token[slot] = -1 if first in self.ends.tolist() else first

    def stop(self, slot: int) -> None:
        self.cache, self.token[slot] = clear(self.cache, slot), -1

    def run(self) -> None:
        new, token, self.cache = decode(self.cache, jax.device_put(self.token), self.ends)
        self.token = np.array(token)
        for slot, tokens_written in enumerate(self.written):
            tokens_written += [int(t) for t in np.asarray(new)[:, slot] if t >= 0]

    def done(self, slot: int) -> bool:
        return self.token[slot] < 0


def soak(method: str, requests: int, slots: int, longest: int = 96) -> str:
    """Requests through slots, a fifth of them cancelled on the way, each against a pool of its own.

    Prompts have drawn lengths, up to `longest`.
    """
    rng, room = draws.rng(), 104
    config = METHODS[method].replace(prompt_capacity=longest, generated_capacity=room)
    for width in {bucket(np.zeros((1, n), np.int32), limit=longest).shape[1] for n in range(1, longest + 1)}:
        prefill(MODEL, np.zeros((1, width), np.int32), [width], config)
    ends = [3]
    pool, alone = Pool(config, slots, ends), Pool(config, slots, ends)
    running: dict[int, tuple] = {}
    generated, warm, held = 0, None, []
    for number in range(requests + slots):
        # The oldest request ends, or is cancelled, and the next one takes its slot.
        slot = number % slots
        if slot in running:
            steps, prefix, first, prompt = running.pop(slot)
            while steps > 0 and not pool.done(slot):
                pool.run()
                steps -= 1
            text = pool.written[slot]
            place = int(rng.integers(slots))
            alone.start(place, prefix, first)
            while len(alone.written[place]) < len(text) and not alone.done(place):
                alone.run()
            assert alone.written[place][: len(text)] == text, f"request {number - slots}: prompt {prompt}"
            generated += len(text)
            alone.stop(place)
            pool.stop(slot)
        if number < requests:
            prompt = rng.integers(4, CONFIG.vocab_size, rng.integers(1, longest + 1)).tolist()
            logits, prefix = prefill(MODEL, bucket([prompt], limit=longest), [len(prompt)], config)
            first = int(logits[0].argmax())
            pool.start(slot, prefix, first)
            # Most go on until the cache is full or an end token comes, which every eighth step is looked for.
            steps = int(rng.integers(1, 5)) if rng.random() < 0.2 else room // STEPS
            running[slot] = steps, prefix, first, prompt
        if number >= requests // 2:
            gc.collect(1)  # what the last requests left; a look through all programs takes longer than a request
            counted = sum(x.nbytes for x in jax.live_arrays()) - sum(
                x.nbytes for _, prefix, _, _ in running.values() for x in jax.tree.leaves(prefix)
            )
            warm = warm or (compilations(), counted)
            held.append(counted)
            assert compilations() == warm[0], "a program was compiled after the first half"
    grown = max(held) - min(held)
    assert grown < 1 << 20
    size = f"{grown:,} bytes more at most than at least"
    return f"{requests:,} requests of {method}, {generated:,} tokens, all as alone; {size}"


@pytest.mark.promise("Sequences that come and go through slots answer as alone; memory and programs stay flat")
def test_requests_through_slots_are_single_runs(figure):
    figure(soak("minikv", 10, 4, longest=32))


@pytest.mark.slow
@pytest.mark.promise("A thousand requests with cancellations answer as alone; memory and programs stay flat")
@pytest.mark.parametrize("method", ["minikv", "mikv", "minikv_plus"])
def test_a_thousand_requests_through_slots_are_single_runs(method, figure):
    figure(soak(method, 1000 if method == "minikv" else 100, 8))


@pytest.mark.slow
@pytest.mark.promise("Ten thousand steps and fifty prompt lengths compile nothing after the first of each bucket")
def test_ten_thousand_steps_and_fifty_lengths_compile_nothing_new(figure):
    config = METHODS["minikv"].replace(prompt_capacity=64, generated_capacity=1900)
    traced = jax.jit(decode_step, donate_argnames="cache")
    lengths = draws.rng().permutation(np.arange(1, 65))[:50]
    for warm in (16, 32, 48, 64):
        _, cache = prefill(MODEL, bucket(np.zeros((1, warm), np.int32)), [warm], config)
    _, cache = traced(MODEL, cache, tokens(1))
    before = compilations()
    for length in lengths:
        _, cache = prefill(MODEL, bucket(np.zeros((1, length), np.int32)), [length], config)
        for _ in range(200):
            logits, cache = traced(MODEL, cache, np.zeros(1, np.int32))
    assert not np.isnan(logits).any()
    assert compilations() == before
    figure(f"{200 * len(lengths):,} steps, {len(lengths)} lengths, 0 compilations")


def last_of_many_slots(config, dtype, tolerance: float) -> str:
    """A step of the last slot of a cache whose rows lie beyond what 32 bits can index, beside the sequence alone."""
    shape = CONFIG.replace(num_kv_heads=2, num_heads=2, head_dim=64, max_position_embeddings=1 << 22)
    model, slots = Llama(shape, param_dtype=dtype, rngs=nnx.Rngs(params=0)), 17
    config = config.replace(prompt_capacity=1 << 20, generated_capacity=8)
    _, prefix = prefill(model, tokens(1, 20), [20], config.replace(prompt_capacity=20))
    later = tokens(2)
    like, alone = empty_cache(model, config, 1), prefix
    roomy = [
        jnp.zeros(y.shape, y.dtype).at[tuple(slice(n) for n in x.shape)].set(x)
        for x, y in zip(jax.tree.leaves(prefix), jax.tree.leaves(like), strict=True)
    ]
    cache = put(empty_cache(model, config, slots), slots - 1, jax.tree.unflatten(jax.tree.structure(like), roomy))
    numbers = max(x.size for x in jax.tree.leaves(cache))
    assert numbers > 1 << 31
    donating = jax.jit(decode_step, donate_argnames="cache")
    # The second step reads what the first one has written there.
    for token in later:
        logits, cache = donating(model, cache, np.full(slots, token))
        wanted, alone = step(model, alone, token[None])
        np.testing.assert_allclose(logits[-1], wanted[0], atol=tolerance)
    return f"an array of {numbers:,} numbers"


@pytest.mark.slow
@pytest.mark.promise("Caches of more than 2^31 numbers are indexed correctly")
def test_indices_past_two_to_the_31(figure):
    figure(last_of_many_slots(presets.mikv(ratio=1.0, bits=8), jnp.float32, 1e-4))


@pytest.mark.gpu
@pytest.mark.promise("Caches of more than 2^31 numbers are indexed correctly on a GPU")
@pytest.mark.parametrize(
    "config", [presets.full(), presets.mikv(ratio=1.0, bits=8), presets.minikv(heavy=1.0, recent=0.0, bits=8)]
)
def test_indices_past_two_to_the_31_on_a_gpu(config, figure):
    figure(last_of_many_slots(config, jnp.bfloat16, 0.05))
