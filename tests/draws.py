"""Random numbers of the tests: drawn anew in every run, and drawn again with `pytest --draws SEED`.

`conftest.py` draws the seed of a run and prints it. Each generator depends on that seed, on the test's name, on what
hypothesis gave the test, and on how many generators the test made before: a failure comes back whatever else runs, and
hypothesis, when it tries an example again, meets the same numbers. Outside of pytest the seed is 0.
"""

import functools
import itertools
import os
import zlib

import numpy as np

VARIABLE = "MINIKV_TEST_SEED"
_state = {"test": "", "example": "", "examples": 0, "counter": itertools.count()}


def begin(test: str) -> None:
    """Called by `conftest.py` before each test."""
    _state.update(test=test, example="", examples=0, counter=itertools.count())


def by_example(test):
    """A hypothesis test's function, begun anew for each example."""

    @functools.wraps(test)
    def one(*arguments, **drawn):
        _state.update(example=repr((arguments, drawn)), examples=examples() + 1, counter=itertools.count())
        return test(*arguments, **drawn)

    return one


def examples() -> int:
    """How many examples hypothesis has given the test."""
    return _state["examples"]


def rng() -> np.random.Generator:
    """A generator of its own for each call in a test."""
    names = [zlib.crc32(_state[name].encode()) for name in ("test", "example")]
    return np.random.default_rng([int(os.environ.get(VARIABLE, 0)), *names, next(_state["counter"])])


def array(x, dtype="float32"):
    """Drawn numbers as a JAX array. NumPy rounds them: JAX would compile a conversion for every shape."""
    import jax.numpy as jnp

    return jnp.asarray(np.asarray(x).astype(jnp.dtype(dtype)))
