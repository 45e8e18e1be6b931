"""Settings every test shares."""

import gc
import os
import secrets
import signal

import draws
import environment  # before anything that imports JAX
import hypothesis
import promises
import pytest
from typed import check_annotations

# The first example of a shape compiles, and others use the machine, so time says nothing; each run draws afresh.
hypothesis.settings.register_profile(
    "suite",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    max_examples=25,
    print_blob=True,
)
hypothesis.settings.register_profile("many", hypothesis.settings.get_profile("suite"), max_examples=500)
hypothesis.settings.load_profile("suite")

check_annotations()

# Looking for garbage in what imports have made, and in what JAX traces, was a sixth of the suite's time.
gc.freeze()
gc.set_threshold(100_000)


if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # As for what a shell runs in the background; the programs that tests start would ignore it too.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--draws", type=int, help="Seed of everything the tests draw; by default a new one.")
    parser.addoption("--promises", action="store_true", help=f"Writes what tests promise to {promises.RESULTS.name}.")


def pytest_configure(config):
    given = config.getoption("--draws")
    if given is not None:
        os.environ[draws.VARIABLE] = str(given)
    # Workers of pytest-xdist inherit the variable.
    seed = int(os.environ.setdefault(draws.VARIABLE, str(secrets.randbits(32))))
    hypothesis.core.global_force_seed = seed
    if "PYTEST_XDIST_WORKER" not in os.environ:
        environment.forget_old_programs()
        if config.getoption("--promises"):
            config.pluginmanager.register(promises.Recorder())
    if "not gpu" not in config.getoption("markexpr"):
        environment.compile_anew()


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"Draw the same again: pytest --draws {os.environ[draws.VARIABLE]}")


def pytest_itemcollected(item):
    given = getattr(getattr(item, "obj", None), "hypothesis", None)
    if given is not None and not hasattr(given.inner_test, "__wrapped__"):
        given.inner_test = draws.by_example(given.inner_test)
    promises.note(item)


@pytest.fixture(autouse=True)
def _own_draws(request):
    draws.begin(request.node.nodeid)


@pytest.fixture(autouse=True)
def _few_programs():
    environment.forget_programs_when_many()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item, call):
    suite = dict(item.user_properties).get("suite")
    if suite is not None and call.when == "call":
        item.user_properties.append(("device", promises.device(suite)))
        if draws.examples():
            item.user_properties.append(("figure", f"{draws.examples():,} examples"))


@pytest.fixture
def figure(record_property):
    """Call it with what a promise's test measured, in words: it stands beside the promise in docs/promises.md."""
    return lambda text: record_property("figure", text)


@pytest.fixture
def triton_cache(monkeypatch, tmp_path):
    """A folder for Triton's compiler: importing jax-triton, even in vain, leaves it none for the rest of a process."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
