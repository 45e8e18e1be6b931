"""Settings every test shares."""

import os
import secrets

import draws
import hypothesis
import pytest
from typed import check_annotations

# Compiling is most of a test's time and its programs run once: leave out LLVM's optimisations. Set before JAX starts.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

# The first example of a shape compiles, so time says nothing; each run draws afresh.
hypothesis.settings.register_profile("suite", deadline=None, max_examples=25, print_blob=True)
hypothesis.settings.load_profile("suite")

check_annotations()


def pytest_addoption(parser):
    parser.addoption("--draws", type=int, help="Seed of everything the tests draw; by default a new one.")


def pytest_configure(config):
    given = config.getoption("--draws")
    if given is not None:
        os.environ[draws.VARIABLE] = str(given)
    # Workers of pytest-xdist inherit the variable.
    seed = int(os.environ.setdefault(draws.VARIABLE, str(secrets.randbits(32))))
    hypothesis.core.global_force_seed = seed


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"Draw the same again: pytest --draws {os.environ[draws.VARIABLE]}")


@pytest.fixture(autouse=True)
def _own_draws(request):
    draws.begin(request.node.nodeid)


@pytest.fixture
def figure(record_property):
    """Call it with what a promise's test measured, in words: it stands beside the promise in docs/promises.md."""
    return lambda text: record_property("figure", text)


@pytest.fixture
def triton_cache(monkeypatch, tmp_path):
    """A folder for Triton's compiler: importing jax-triton, even in vain, leaves it none for the rest of a process."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
