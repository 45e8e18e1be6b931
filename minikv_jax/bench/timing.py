"""Device time, measured ceilings, and the JSON format of every benchmark."""

import importlib
import importlib.metadata
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array

from minikv_jax import outputs
from minikv_jax.errors import ConfigError


def device_seconds(step: Callable[..., Array], x: Array, *args: Array, steps: int = 32, repeats: int = 7) -> float:
    """Median device time of `step(x, *args)`, an array of x's shape, over `steps` calls chained inside one jit.

    Each call's input depends on the last call's output, so that nothing overlaps, nothing is removed, and dispatch from
    the host is paid once per chain.
    """

    def chain(x, *args):
        def body(_, x):
            return x + (step(x, *args).reshape(x.shape) * 1e-6).astype(x.dtype)

        return jax.lax.fori_loop(0, steps, body, x)

    run = jax.jit(chain)
    jax.block_until_ready(run(x, *args))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(x, *args))
        seconds.append((time.perf_counter() - start) / steps)
    return statistics.median(seconds)


def kernel_seconds(run: Callable[..., object], inputs: Sequence[tuple], repeats: int = 24) -> float:
    """Device time of the jitted `run(*inputs[i])`: the sum of its kernels' durations, by the profiler, mean over calls.

    Calls rotate over `inputs`, so that a cache larger than one of them does not answer. What the host needs to launch,
    and the gaps it leaves on the device when it is late, are not in the figure.
    """
    for arguments in inputs:
        jax.block_until_ready(run(*arguments))

    def calls():
        last = None
        for i in range(repeats):
            last = run(*inputs[i % len(inputs)])
        jax.block_until_ready(last)

    return sum(seconds for _, seconds in traced_kernels(calls)) / repeats


def traced_kernels(run: Callable[[], object]) -> list[tuple[str, float]]:
    """Name and device seconds of every kernel that `run()` launches and waits for."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (trace,) = Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(trace)).planes
        kernels = [
            (event.name, event.duration_ns * 1e-9)
            for plane in planes
            if plane.name.startswith("/device:GPU")
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]
    if not kernels:
        raise RuntimeError("The profiler saw no kernel on a CUDA device.")
    return kernels


def copy_bandwidth(size: int = 1 << 30) -> float:
    """Bytes read plus written per second by a plain elementwise pass over `size` bytes."""
    x = jnp.ones(size // 4, jnp.float32)
    return 2 * size / device_seconds(lambda x: x, x, steps=16)


class Reading(NamedTuple):
    """Of a GPU at work: its processors' clock in MHz, the watts it draws, and whether these hold the clock down."""

    mhz: float
    watts: float
    power_capped: bool


def sensor() -> Callable[[], Reading] | None:
    """What reads the first GPU's present state; None where nothing can (it takes the package nvidia-ml-py)."""
    try:
        pynvml = importlib.import_module("pynvml")  # of nvidia-ml-py
    except ImportError:
        return None

    def read() -> Reading:
        mhz = float(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM))
        watts = pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3
        capped = pynvml.nvmlClocksEventReasonSwPowerCap | pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown
        return Reading(mhz, watts, bool(pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle) & capped))

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        read()
    except pynvml.NVMLError:  # a driver or a machine that does not tell
        return None
    return read


class Labelled(Protocol):
    @property
    def label(self) -> str: ...


def matching[T: Labelled](items: Iterable[T], only: Sequence[str]) -> list[T]:
    """Those whose label contains one of `only`, where `*` is anything; all for no patterns."""
    return [x for x in items if not only or any(fnmatch(x.label, f"*{pattern}*") for pattern in only)]


def environment() -> dict:
    """The device and the versions behind a figure."""
    versions = {}
    for name in ("jax", "jaxlib", "triton", "jax-triton", "minikv-jax"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"device": jax.devices()[0].device_kind, "versions": versions}


def write_results(
    out: Path, benchmark: str, command: str, date: str, rows: Sequence[dict], about: dict | None = None, **more
) -> None:
    """Writes one results file; see `examples/results/`. `about` is the rows' `environment()`, default this one."""
    about = environment() if about is None else about
    content = {"benchmark": benchmark, **about, "command": command, "date": date, **more, "rows": list(rows)}
    outputs.write_text(out, json.dumps(_plain(content), indent=1, allow_nan=False) + "\n")


def _plain(x: Any) -> Any:
    """What JSON has words for: a number that is not finite is null."""
    if isinstance(x, Mapping):
        return {key: _plain(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def read_results(path: Path, benchmark: str | None = None) -> dict:
    """A file that `write_results` wrote, of this benchmark if one is named.

    Raises:
        ConfigError: it is not there, or is no such file.
    """
    try:
        results = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): name a results file.") from None
    except (ValueError, RecursionError):
        results = None
    rows = results.get("rows") if isinstance(results, dict) else None
    if results is None or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"{path} is no results file, or a damaged one: name another, or remove it.")
    if benchmark not in (None, results.get("benchmark")):
        raise ConfigError(f"{path} holds results of {results.get('benchmark')!r}, not of {benchmark!r}: name another.")
    return results
