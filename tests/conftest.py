"""Settings every test shares."""

import os

import hypothesis

# Compiling is most of a test's time and its programs run once: leave out LLVM's optimisations. Set before JAX starts.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

# The first example of a shape compiles, so time says nothing; each run draws afresh.
hypothesis.settings.register_profile("suite", deadline=None, max_examples=25, print_blob=True)
hypothesis.settings.load_profile("suite")
