"""Calls of Triton kernels from JAX, through jax-triton.

jax-triton 0.3 launches through a custom call that looks the kernel up by its whole compressed program at every call, 30
microseconds on the host for a large kernel, and that XLA cannot put into a CUDA graph. Its 0.4 and jaxlib's newer entry
point do neither, but 0.4 needs Triton 3.7. Here 0.3 is led to the same entry point.

It also compiles every kernel anew in each process, most of the time to lower a decode loop. Here it leaves them beside
JAX's own compiled programs, where a later process finds them.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import json
import os
import types
from collections.abc import Sequence
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
    _lead_to_ffi()
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
def _lead_to_ffi() -> None:
    """Lets jax-triton 0.3 lower calls that name the newer target; all other calls are lowered as before."""
    import triton
    from jax.interpreters import mlir
    from jax_triton import __version__, triton_lib

    _keep_compiled(triton_lib, f"triton {triton.__version__}, jax-triton {__version__}")

    def lowering(ctx, *args, custom_call_target_name, **parameters):
        results = triton_lib.triton_kernel_call_lowering(
            triton_lib.get_cuda_backend, ctx, *args, custom_call_target_name=custom_call_target_name, **parameters
        )
        if custom_call_target_name == _TARGET:
            _as_ffi(results[0].owner)
        return results

    mlir.register_lowering(triton_lib.triton_kernel_call_p, lowering, platform="cuda")


def _as_ffi(operation) -> None:
    """Turns an untyped custom call into a typed one that takes the same program as its attribute `opaque`."""
    from jax._src.lib.mlir import ir

    program = operation.attributes["backend_config"]
    operation.attributes["api_version"] = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), 4)
    operation.attributes["backend_config"] = ir.DictAttr.get({"opaque": program})


@dataclasses.dataclass(frozen=True)
class _Module:
    """A kernel's program on its way through jax-triton: the text, and the module or what it was compiled to before."""

    text: str
    module: Any
    compiled: Any
    path: Path | None

    def __str__(self):
        return self.text


def _keep_compiled(triton_lib, versions: str) -> None:
    """Has jax-triton look for a kernel in JAX's persistent cache before it compiles it, and leave it there."""
    to_module, compile_module = triton_lib.code_gen.ast_to_ttir, triton_lib.compile_ttir_inplace

    def ast_to_ttir(fn, source, *, options, **rest):
        path = _place(f"{versions}, {source.hash()}, {options.hash()}")
        try:
            kept = json.loads(path.read_text(encoding="utf-8")) if path else {}
            return _Module(kept["text"], None, triton_lib.CompilationResult(**kept["compiled"]), path)
        except (OSError, ValueError, KeyError, TypeError):  # nothing there, or nothing to be read
            module = to_module(fn, source, options=options, **rest)
            return _Module(str(module), module, None, path)

    def compile_ttir_inplace(program: _Module, *rest):
        if program.compiled is not None:
            return program.compiled
        compiled = compile_module(program.module, *rest)
        if program.path is not None:
            kept = {"text": program.text, "compiled": dataclasses.asdict(compiled)}
            unfinished = program.path.with_suffix(f".{os.getpid()}")
            try:
                program.path.parent.mkdir(parents=True, exist_ok=True)
                unfinished.write_text(json.dumps(kept), encoding="utf-8")
                unfinished.replace(program.path)
            except OSError:  # a cache that cannot be written to is no reason to fail
                unfinished.unlink(missing_ok=True)
        return compiled

    triton_lib.code_gen = types.SimpleNamespace(ast_to_ttir=ast_to_ttir)
    triton_lib.compile_ttir_inplace = compile_ttir_inplace


def _place(identity: str) -> Path | None:
    """The file of a kernel in JAX's persistent cache, if that is in use and a folder of this machine."""
    folder = jax.config.jax_compilation_cache_dir
    if not folder or not jax.config.jax_enable_compilation_cache or "://" in folder:
        return None
    return Path(folder, "triton_kernels", f"{hashlib.sha256(identity.encode()).hexdigest()}.json")
