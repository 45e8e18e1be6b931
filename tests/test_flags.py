"""What users set for all of JAX changes nothing: every preset works under each flag and transformation."""

import contextlib
import functools

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import METHODS, MODEL, every, nearly_equal, tokens

from minikv_jax import decode_step, empty_cache, extend, fork, forward, generate, insert, prefill, stream


@contextlib.contextmanager
def together():
    """All flags but x64 at once: the quick tests set these, the slow ones each alone."""
    with contextlib.ExitStack() as flags:
        for name in ("debug_nans", "rank_promotion", "dtype_promotion", "leaks"):
            flags.enter_context(FLAGS[name]())
        yield


FLAGS = {
    "together": together,
    "x64": functools.partial(jax.enable_x64, True),
    "debug_nans": functools.partial(jax.debug_nans, True),
    "rank_promotion": functools.partial(jax.numpy_rank_promotion, "raise"),
    "dtype_promotion": functools.partial(jax.numpy_dtype_promotion, "strict"),
    "leaks": jax.checking_leaks,
}


# Every method under all of them together, one under each alone.
CASES = [("together", "mikv")]
CASES += [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in [*(("together", name) for name in METHODS), *((flag, "mikv") for flag in FLAGS)]
    if case not in CASES
]


def steps(cache, later):
    """The cache after tokens [steps, B] of which each is a step, and their logits: under leak checks a loop in Python
    would be traced at each step."""
    return jax.lax.scan(lambda cache, token: decode_step(MODEL, cache, token)[::-1], cache, later)


def life(method: str, text, turn, later, room: int = 64):
    """Logits of a prompt, 40 steps over a flush, a second turn, forks of it, and a step of a slot it is put into."""
    config = METHODS[method].replace(prompt_capacity=32, generated_capacity=room)
    step = jax.jit(decode_step)
    first, cache = prefill(MODEL, text, np.array([30]), config)
    cache, seen = jax.jit(steps)(cache, later)
    logits, cache = extend(MODEL, cache, turn, np.array([turn.shape[1]]))
    forked, _ = step(MODEL, fork(cache, 2), jnp.concatenate([later[0], later[1]]))
    slots = insert(insert(empty_cache(MODEL, config, 2), 0, cache), 1, cache)
    inserted, slots = step(MODEL, slots, jnp.concatenate([later[0], later[0]]))
    return np.stack([first, *seen, logits, forked[:1], inserted[1:]]), slots


@pytest.mark.promise("Every preset gives the same under x64, debug_nans, strict promotion and leak checks")
@pytest.mark.parametrize(("flag", "method"), CASES)
def test_a_flag_of_jax_changes_nothing(flag, method):
    text, turn, later = tokens(1, 30), tokens(1, 9), tokens(40, 1)
    plain, _ = life(method, text, turn, later)
    with FLAGS[flag]():
        # Another capacity, so that everything is traced again under the flag.
        flagged, slots = life(method, text, turn, later, room=65 + list(FLAGS).index(flag))
    np.testing.assert_allclose(flagged, plain, atol=1e-4)
    assert flagged.dtype == np.float32
    assert not any(x.dtype.itemsize == 8 for x in jax.tree.leaves(slots))


@pytest.mark.promise("Caches work inside shard_map with its check on, under vmap and through jax.export")
@pytest.mark.parametrize("method", every("full"))
def test_a_cache_goes_through_the_transformations_of_jax(method):
    config = METHODS[method].replace(prompt_capacity=32, generated_capacity=64)
    text, lengths, later = tokens(2, 30), np.array([30, 21]), tokens(2, 20)
    wanted, cache = generate(MODEL, text, lengths, config, 20, eos_token_ids=(3,))

    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    spec = jax.sharding.PartitionSpec("data")
    sharded = jax.shard_map(
        lambda text, lengths: generate(MODEL, text, lengths, config, 20, eos_token_ids=(3,)),
        mesh=mesh,
        in_specs=spec,
        out_specs=(spec, jax.tree.map(lambda _: spec, cache)),
    )
    np.testing.assert_array_equal(jax.jit(sharded)(text, lengths)[0], wanted)

    def follow(text, length, later):
        _, cache = prefill(MODEL, text[None], length[None], config)
        step = lambda cache, token: decode_step(MODEL, cache, token[None])[::-1]  # noqa: E731
        return jax.lax.scan(step, cache, later)[1]

    together = jax.jit(jax.vmap(follow))(text, jnp.asarray(lengths), later)
    alone = jax.jit(follow)(text[0], jnp.asarray(lengths)[0], later[0])
    assert nearly_equal(together[0], alone)

    leaves, structure = jax.tree.flatten(cache)

    def on_leaves(leaves, token):
        logits, cache = decode_step(MODEL, jax.tree.unflatten(structure, leaves), token)
        return logits, jax.tree.leaves(cache)

    exported = jax.export.deserialize(jax.export.export(jax.jit(on_leaves))(leaves, later[:, 0]).serialize())
    np.testing.assert_array_equal(exported.call(leaves, later[:, 0])[0], jax.jit(on_leaves)(leaves, later[:, 0])[0])


def test_logits_have_a_gradient_inside_and_outside_of_jit():
    graph, state = nnx.split(MODEL)
    text = tokens(2, 12)

    def loss(state):
        return forward((graph, state), text).mean()

    outside, inside = jax.grad(loss)(state), jax.jit(jax.grad(loss))(state)
    chex.assert_trees_all_close(outside, inside, atol=1e-5)
    assert sum(float(jnp.abs(x).sum()) for x in jax.tree.leaves(outside)) > 0


@pytest.mark.promise("A step moves nothing between host and device")
def test_a_step_transfers_nothing():
    config = METHODS["minikv"].replace(prompt_capacity=32, generated_capacity=64)
    step, token = jax.jit(decode_step, donate_argnames="cache"), tokens(2)
    _, cache = prefill(MODEL, tokens(2, 30), np.array([30, 3]), config)
    stepped = stream(MODEL, tokens(2, 30), np.array([30, 3]), config, 30)
    _, cache = step(MODEL, cache, token)
    for _ in range(2):
        next(stepped)
    with jax.transfer_guard("disallow"):
        for _ in range(20):
            _, cache = step(MODEL, cache, token)
            next(stepped)
