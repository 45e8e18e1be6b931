"""What JAX reads when it starts, for the tests and the processes they start."""

import itertools
import os
import shutil
from pathlib import Path

PROGRAMS = Path(__file__).parent.parent / ".pytest_cache" / "jax"

# Compiling is most of a test's time and its programs run once: LLVM's optimisations are left out. Each worker takes of
# a GPU's memory what it needs, not most of it. What one worker or run has compiled, the next one reads.
for name, value in {
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "JAX_COMPILATION_CACHE_DIR": str(PROGRAMS),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}.items():
    os.environ.setdefault(name, value)


def compile_anew() -> None:
    """For runs on a GPU: what they compile is part of what they test."""
    import jax

    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    jax.config.update("jax_enable_compilation_cache", False)


def forget_old_programs() -> None:
    """Drawn shapes leave programs that no other run asks for: above a gigabyte all are removed."""
    if PROGRAMS.exists() and sum(path.stat().st_size for path in PROGRAMS.iterdir()) > 1 << 30:
        shutil.rmtree(PROGRAMS)


# A process may have 65,530 mappings (vm.max_map_count), each compiled program takes some, and LLVM dies without one.
_MOST_MAPPINGS = 30_000
_tests = itertools.count()


def forget_programs_when_many() -> None:
    """Lets a worker's compiled programs go before there are too many for one process.

    Called before each test, it looks before each eighth: the kernel writes its list of mappings for a hundredth of the
    suite's time otherwise.
    """
    if next(_tests) % 8:
        return
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > _MOST_MAPPINGS:
        import jax

        jax.clear_caches()
