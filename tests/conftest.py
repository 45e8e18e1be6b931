"""Settings every test shares."""

import os

import hypothesis
import pytest

# Compiling is most of a test's time and its programs run once: leave out LLVM's optimisations. Set before JAX starts.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

# The first example of a shape compiles, so time says nothing; each run draws afresh.
hypothesis.settings.register_profile("suite", deadline=None, max_examples=25, print_blob=True)
hypothesis.settings.load_profile("suite")


@pytest.fixture
def triton_cache(monkeypatch, tmp_path):
    """A folder for Triton's compiler: importing jax-triton, even in vain, leaves it none for the rest of a process."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
