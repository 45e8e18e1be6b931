"""Random numbers of the tests: drawn anew in every run, and drawn again with `pytest --draws SEED`.

`conftest.py` draws the seed of a run and prints it. Each test's generators depend on that seed and on the test's name
alone, so a failure comes back whatever else runs.
"""

import itertools
import os
import zlib

import numpy as np

VARIABLE = "MINIKV_TEST_SEED"
_counter = itertools.count()
_test = 0


def begin(test: str) -> None:
    """Called by `conftest.py` before each test."""
    global _counter, _test
    _counter, _test = itertools.count(), zlib.crc32(test.encode())


def rng() -> np.random.Generator:
    """A generator of its own for each call in a test."""
    return np.random.default_rng([int(os.environ[VARIABLE]), _test, next(_counter)])
