"""What the Pallas Mosaic GPU kernels share: where they run, index arithmetic, what wgmma reads and writes."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.dispatch import device_kind

_HOPPER = ("H100", "H200", "H800", "H20", "GH200")
OLDEST_JAX = "0.11.1"  # what an older one knows of Mosaic has other arguments
ROW_LAYOUT = plgpu.Layout.WGMMA.reduce(1)
COLUMN_LAYOUT = plgpu.Layout.WGMMA.reduce(0)


def jax_is_new_enough() -> bool:
    """Whether this JAX can compile the kernels."""
    return jax.__version_info__ >= tuple(map(int, OLDEST_JAX.split(".")))


def decline_where_they_cannot_run() -> None:
    """Raises NotImplementedError where the program is traced for another device, or by a JAX that is too old."""
    if not any(name in device_kind() for name in _HOPPER):
        raise NotImplementedError(f"needs a Hopper GPU, this is {device_kind()!r}")
    if not jax_is_new_enough():
        raise NotImplementedError(f"needs jax {OLDEST_JAX} or newer, this is {jax.__version__}")


def integer(x) -> jax.Array:
    return jnp.asarray(x, jnp.int32)


def blocks_of(x, size: int) -> jax.Array:
    """ceil(max(x, 0) / size)."""
    return lax.div(jnp.maximum(integer(x), 0) + (size - 1), integer(size))


def slot_of(step, stages: int) -> jax.Array:
    """Where in a ring of `stages` a step's data lies."""
    return lax.rem(integer(step), integer(stages))


def swizzled(columns: int):
    """Shared memory layout of rows of 16-bit numbers, a multiple of `columns` each, that TMA writes and wgmma reads."""
    tiling = plgpu.TilingTransform((8, columns))  # pyright: ignore[reportAbstractUsage]  # JAX leaves a method out
    return tiling, plgpu.SwizzleTransform(2 * columns)  # pyright: ignore[reportAbstractUsage]  # JAX leaves a method out


def loaded(accumulator, in_flight: int) -> jax.Array:
    """The accumulator once at most `in_flight` younger products run. The barrier keeps its uses behind the wait."""
    return lax.optimization_barrier(plgpu.wgmma_accumulator_load(accumulator, wait_n=in_flight))


def store(ref, x: jax.Array) -> None:
    """ref[...] = x for a reference to global memory of any strides."""
    if hasattr(plgpu, "store"):  # JAX 0.12 wants to hear that lanes need not write whole sectors
        plgpu.store(ref, x, optimized=False)
    else:
        ref[...] = x
