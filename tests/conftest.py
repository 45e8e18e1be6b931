"""Settings every test shares."""

import os
import secrets
import shutil
from pathlib import Path

import draws
import hypothesis
import pytest

# Before JAX starts, and for the processes that tests start. Compiling is most of a test's time and its programs run
# once: LLVM's optimisations are left out. Each worker takes of a GPU's memory what it needs, not most of it.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

# The first example of a shape compiles, so time says nothing; each run draws afresh.
hypothesis.settings.register_profile("suite", deadline=None, max_examples=25, print_blob=True)
hypothesis.settings.load_profile("suite")


def pytest_addoption(parser):
    parser.addoption("--draws", type=int, help="Seed of everything the tests draw; by default a new one.")


def pytest_configure(config):
    given = config.getoption("--draws")
    if given is not None:
        os.environ[draws.VARIABLE] = str(given)
    # Workers of pytest-xdist inherit the variable.
    seed = int(os.environ.setdefault(draws.VARIABLE, str(secrets.randbits(32))))
    hypothesis.core.global_force_seed = seed
    if "not gpu" in config.getoption("markexpr"):
        _keep_programs(config.rootpath / ".pytest_cache" / "jax")


def _keep_programs(folder: Path) -> None:
    """What one worker or run has compiled, the next one reads: JAX's cache, in a folder of this checkout."""
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    # Drawn shapes leave programs that no other run asks for.
    if alone and folder.exists() and sum(path.stat().st_size for path in folder.iterdir()) > 1 << 30:
        shutil.rmtree(folder)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"Draw the same again: pytest --draws {os.environ[draws.VARIABLE]}")


def pytest_itemcollected(item):
    given = getattr(getattr(item, "obj", None), "hypothesis", None)
    if given is not None and not hasattr(given.inner_test, "__wrapped__"):
        given.inner_test = draws.by_example(given.inner_test)


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
