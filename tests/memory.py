"""The most memory that a process holds while something runs."""

import ctypes
import gc
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Growth:
    bytes = 0


@contextmanager
def peak_growth() -> Iterator[Growth]:
    """How far resident memory rises above where it was; known when the block ends.

    Linux can forget its earlier peak. Elsewhere only what exceeds that is seen, so a test may pass that should not,
    never the other way round.
    """
    before = _reset_peak()
    growth = Growth()
    try:
        yield growth
    finally:
        growth.bytes = max(0, _peak() - before)


def _reset_peak() -> int:
    gc.collect(1)  # what was left lately: looking through all that lives takes longer than most of what is measured
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # or what was freed before hides what is taken now
    forget, status = Path("/proc/self/clear_refs"), Path("/proc/self/statm")
    if not os.access(forget, os.W_OK):
        return _peak()
    forget.write_text("5")
    return int(status.read_text().split()[1]) * resource.getpagesize()


def _peak() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
