"""Calls of Triton kernels from JAX, through jax-triton.

jax-triton 0.3 launches through a custom call that looks the kernel up by its whole compressed program at every call, 30
microseconds on the host for a large kernel, and that XLA cannot put into a CUDA graph. Its 0.4 and jaxlib's newer entry
point do neither, but 0.4 needs Triton 3.7. Here 0.3 is led to the same entry point.
"""

import functools
import importlib.util
import inspect
from collections.abc import Sequence

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


def _as_ffi(operation) -> None:
    """Turns an untyped custom call into a typed one that takes the same program as its attribute `opaque`."""
    from jax._src.lib.mlir import ir

    program = operation.attributes["backend_config"]
    operation.attributes["api_version"] = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), 4)
    operation.attributes["backend_config"] = ir.DictAttr.get({"opaque": program})
