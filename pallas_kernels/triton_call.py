"""Calls of Triton kernels from JAX, through jax-triton.

jax-triton 0.3 launches through a custom call that looks the kernel up by its whole compressed program at every call, 30
microseconds on the host for a large kernel, and that XLA cannot put into a CUDA graph. Its 0.4 and jaxlib's newer entry
point do neither, but 0.4 needs Triton 3.7. Here 0.3 is led to the same entry point.

Nor does it keep what Triton's compiler made, seconds of work for a large kernel that depend on no size: every process
starts anew. Here kernels lie in JAX's persistent cache, if there is one (`JAX_COMPILATION_CACHE_DIR`), beside the
programs that launch them.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import json
import os
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

_TARGET = "triton_kernel_call_ffi"


def call(*args, kernel, out_shape: Sequence[jax.ShapeDtypeStruct], grid: tuple[int, ...], **options) -> list[jax.Array]:
    """Launches `kernel` over `grid`: arrays and numbers in the order of its parameters, results behind them.

    Args:
        args: arrays, and int, bool or `np.float32` scalars.
        kernel: a function under `triton.jit`.
        out_shape: of the results.
        grid: up to three numbers of programs.
        options: num_warps, num_stages, input_output_aliases, and the kernel's constexpr parameters.
    """
    import jax_triton

    if "out_type" in inspect.signature(jax_triton.triton_call).parameters:
        return jax_triton.triton_call(*args, kernel=kernel, out_type=list(out_shape), grid=grid, **options)
    _adapt_jax_triton()
    return jax_triton.triton_call(
        *args, kernel=kernel, out_shape=list(out_shape), grid=grid, custom_call_target_name=_TARGET, **options
    )


def decline() -> str | None:
    """Why no Triton kernel can run here; None where one can."""
    if jax.default_backend() != "gpu":
        return f"needs a CUDA GPU, this is {jax.default_backend()}"
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    if capability.replace(".", "").isdigit() and float(capability) < 8:
        return f"needs a GPU from Ampere on (compute capability 8.0), this one has {capability}"
    if importlib.util.find_spec("jax_triton") is None:
        return "needs the package jax-triton"
    return None


@functools.cache
def _adapt_jax_triton() -> None:
    """Lets jax-triton 0.3 lower calls that name the newer target, and compile this package's kernels as below."""
    from jax.interpreters import mlir
    from jax_triton import triton_lib

    def lowering(ctx, *args, custom_call_target_name, **parameters):
        results = triton_lib.triton_kernel_call_lowering(
            triton_lib.get_cuda_backend, ctx, *args, custom_call_target_name=custom_call_target_name, **parameters
        )
        if custom_call_target_name == _TARGET:
            _as_ffi(results[0].owner)
        return results

    mlir.register_lowering(triton_lib.triton_kernel_call_p, lowering, platform="cuda")
    _compile_leanly(triton_lib)


def _as_ffi(operation) -> None:
    """Turns an untyped custom call into a typed one that takes the same program as its attribute `opaque`."""
    from jax._src.lib.mlir import ir

    program = operation.attributes["backend_config"]
    operation.attributes["api_version"] = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), 4)
    operation.attributes["backend_config"] = ir.DictAttr.get({"opaque": program})


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """A kernel of this package before Triton has read it; in jax-triton's hands the module that Triton makes of it."""

    key: str
    read: Callable[[], Any]

    def __str__(self) -> str:
        """What jax-triton would send along with the program, as long as it, for people to read: nothing."""
        return ""


def _compile_leanly(triton_lib) -> None:
    """Kernels of this package: found in the cache, or compiled without checks for overflow, which only a debugger's
    build evaluates, and without line numbers, most of the program's text, which XLA copies for every launch."""
    read, compile_read = triton_lib.code_gen.ast_to_ttir, triton_lib.compile_ttir_inplace

    def read_later(fn, source, options, **others):
        if not fn.__module__.startswith(__package__):
            return read(fn, source, options=options, **others)
        options = dataclasses.replace(options, sanitize_overflow=False)
        return _Kernel(f"{source.hash()} {options.hash()}", lambda: read(fn, source, options=options, **others))

    def compile_or_find(module, backend, options, compute_capability, platform):
        def compiled(module):
            return compile_read(module, backend, options, compute_capability, platform)

        if not isinstance(module, _Kernel):
            return compiled(module)
        file = _cached(f"{module.key} {platform} {compute_capability}")
        if file is not None:
            with contextlib.suppress(OSError, ValueError, TypeError):
                return triton_lib.CompilationResult(**json.loads(file.read_text()), ttgir=None, llir=None)
        with _no_line_numbers():
            result = compiled(module.read())
        if file is not None:
            kept = {name: getattr(result, name) for name in ("binary", "name", "shared_mem_bytes")}
            with contextlib.suppress(OSError):
                _write_whole(file, json.dumps(kept))
        return result

    triton_lib.code_gen = types.SimpleNamespace(ast_to_ttir=read_later)
    triton_lib.compile_ttir_inplace = compile_or_find


@contextlib.contextmanager
def _no_line_numbers():
    from triton import knobs

    with knobs.compilation.scope():
        knobs.compilation.disable_line_info = True
        yield


def _cached(key: str) -> Path | None:
    """Where a kernel lies in JAX's persistent cache; None where there is no such folder."""
    import triton

    folder = jax.config.jax_compilation_cache_dir
    if not folder or "://" in folder or not jax.config.jax_enable_compilation_cache:
        return None
    return Path(folder, "triton", hashlib.sha256(f"{triton.__version__} {key}".encode()).hexdigest() + ".json")


def _write_whole(file: Path, text: str) -> None:
    """Other processes see all of it or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(text)
    part.replace(file)
