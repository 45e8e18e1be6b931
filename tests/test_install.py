"""Importing pulls in nothing beyond JAX, flax and jaxtyping."""

import subprocess
import sys

_PROGRAM = """
import sys
import flax.nnx, jax, jaxtyping
before = set(sys.modules)
import minikv_jax
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""


def test_import_is_light():
    """What costs time at import is other packages, so they are counted, not seconds: a busy machine is no fault."""
    result = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True)
    standard = sys.stdlib_module_names
    assert [name for name in result.stdout.split() if name not in standard] == ["minikv_jax", "pallas_kernels"]
