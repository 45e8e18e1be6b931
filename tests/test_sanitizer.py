"""No kernel reads or writes out of bounds or races with itself: compute-sanitizer over small shapes."""

import fcntl
import glob
import os
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

# JAX's own memory pool hides a kernel's strays, graphs its launches, and tuning launches kernels of others.
ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_FLAGS": "--xla_gpu_enable_command_buffer= --xla_gpu_autotune_level=0",
}


def sanitizer() -> str | None:
    packages = [
        path for folder in site.getsitepackages() for path in glob.glob(f"{folder}/nvidia/**/compute-sanitizer")
    ]
    toolkits = sorted(glob.glob("/usr/local/cuda*/bin/compute-sanitizer"), reverse=True)
    return next(iter([*filter(None, [shutil.which("compute-sanitizer")]), *toolkits, *packages]), None)


CALLS = {
    "two_pass:mosaic_gpu": 4,
    "two_pass:triton": 6,
    "packed_decode:triton": 3,
    "packed_decode:mosaic_gpu": 1,
    "packed_append:triton": 4,
}
# initcheck reports reads of what Mosaic's kernel left for XLA, and of packed_append's scratch.
INITIALISED = ("two_pass:mosaic_gpu", "two_pass:triton", "packed_decode:triton")


@pytest.mark.parametrize(
    ("kernel", "tool"),
    [(kernel, tool) for tool in ("memcheck", "racecheck", "synccheck") for kernel in CALLS]
    + [(kernel, "initcheck") for kernel in INITIALISED],
)
@pytest.mark.promise("No kernel reads or writes out of bounds or races with itself, by compute-sanitizer")
def test_clean(kernel, tool, tmp_path_factory):
    program = sanitizer()
    if program is None:
        pytest.skip("this machine has no compute-sanitizer (it comes with the CUDA toolkit)")
    driver = Path(__file__).with_name("sanitized.py")
    # The child runs a file in here, and finds the packages where this process does.
    path = {"PYTHONPATH": os.pathsep.join(filter(None, (str(driver.parents[1]), *sys.path)))}
    command = [program, "--tool", tool, "--target-processes", "all", "--error-exitcode", "9"]
    # Several of these programs at once crash one another, or wait for ever.
    with (tmp_path_factory.getbasetemp().parent / "sanitizer").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        result = subprocess.run(
            [*command, sys.executable, str(driver), kernel],
            env=os.environ | ENVIRONMENT | path, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
    report = result.stdout + result.stderr
    assert result.returncode == 0, report[-4000:]
    assert result.stdout.count("ran\n") == CALLS[kernel], report[-4000:]
    assert "SUMMARY: 0 errors" in report or "SUMMARY: 0 hazards" in report, report[-4000:]
