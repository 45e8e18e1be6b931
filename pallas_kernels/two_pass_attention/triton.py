"""Two-pass attention on CUDA GPUs from Ampere on, in Triton through jax-triton.

The same two passes as `mosaic_gpu.py`, for the GPUs that it cannot run on (Ampere, Ada, Blackwell) and for sliding
windows: a flash forward that also writes a float32 log-sum-exp, then column sums of the finished probabilities. In pass
2 one block of threads owns a tile of keys and walks over the rows that see it, from the diagonal on:

                 keys ->  0   1   2   3
        rows  0           m                    m: masked step, x: unmasked step. Nothing outside is loaded.
              1           x   m
              2           x   x   m            With a sliding window a column of steps also ends: masked at its far end,
              3           x   x   x   m        where the last rows that see a key stand.

One owner a key: no atomics, and the same bits on every run.

Limit. As in `mosaic_gpu.py`: three products instead of two, 1.5 times the time of pass 1 alone. Triton starts copies
some stages ahead within a loop over steps, but a block of threads waits for its product before it takes exponentials;
what overlaps the two is a second block on the same processor, so tiles are small enough for that where registers allow
it. A head size of 96 is computed as 128 and pays for it. On an H100 both passes take 1.94 times cuDNN's flash alone at
S = 8192 and 2.08 at S = 32768 (heads 32/8 of 128), where `mosaic_gpu.py` takes 1.37 and 1.5: on Hopper this file is for
sliding windows.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import triton_call
from pallas_kernels.dispatch import device_kind
from pallas_kernels.two_pass_attention import common


@dataclasses.dataclass(frozen=True)
class Tile:
    """`rows` query rows against `keys` keys by so many warps, with copies started `stages` - 1 steps ahead."""

    rows: int
    keys: int
    warps: int
    stages: int


# Pass 1 and pass 2 by width (head size up to a power of two). These fit the 99 KiB of shared memory that every GPU from
# Ampere on has; data centre GPUs have 163 KiB and more, and use it where one block of threads alone fills them.
_TILES = {
    64: (Tile(128, 64, 4, 3), Tile(64, 128, 4, 3)),
    128: (Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)),
    256: (Tile(64, 32, 4, 2), Tile(64, 64, 8, 2)),
}
_TILES_OF = {
    # Against the table's 64 keys and rows 1971 us instead of 2239 at S = 8192, 28.7 ms instead of 34.6 at S = 32768.
    (128, 90): (Tile(128, 128, 8, 3), Tile(128, 128, 8, 3)),
    (256, 80): (Tile(128, 32, 8, 2), Tile(64, 64, 8, 2)),
    (256, 90): (Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
}
# What cross-lowering for an abstract device knows a GPU by; the first name that fits counts.
_CAPABILITIES = {
    80: ("A100", "A800", "A30"),
    86: ("A10", "A40", "A16", "A2", "RTX A", "RTX 30"),
    89: ("L4", "L20", "RTX 40", "Ada"),
    90: ("H100", "H200", "H800", "H20", "GH200"),
    100: ("B200", "B100"),
    103: ("B300",),
    120: ("RTX 50", "RTX PRO"),
}


def _width(head_size: int) -> int:
    return 1 << (head_size - 1).bit_length()


def tiles_for(head_size: int, capability: int) -> tuple[Tile, Tile]:
    """Tiles of pass 1 and pass 2 by head size and compute capability (80: Ampere, 90: Hopper)."""
    width = _width(head_size)
    return _TILES_OF.get((width, capability), _TILES[width])


def _compute_capability() -> int | None:
    """80 for Ampere, 90 for Hopper; None for what is no CUDA GPU or not known."""
    if jax.sharding.get_abstract_mesh().abstract_device is not None:
        kind = device_kind()
        return next((c for c, names in _CAPABILITIES.items() if any(name in kind for name in names)), None)
    device = jax.config.jax_default_device or jax.local_devices()[0]
    number = str(getattr(device, "compute_capability", "")).replace(".", "")
    return int(number) if number.isdigit() else None


def _decline_what_it_cannot_run(query, key, value, scale) -> int:
    capability = _compute_capability()
    if capability is None or capability < 80:
        raise NotImplementedError(f"needs a CUDA GPU from Ampere on, this is {device_kind()!r}")
    common.decline_what_no_kernel_takes(query, key, value, scale)
    try:
        import jax_triton  # noqa: F401
    except ImportError as error:
        raise NotImplementedError(f"needs the package jax-triton ({error})") from error
    return capability


def constants(head_size: int, tile: Tile, is_causal: bool, sliding_window: int | None) -> dict:
    """The compile-time numbers of a kernel: one program per head size and kind of mask, whatever the other sizes."""
    return dict(
        H=head_size,
        WIDTH=_width(head_size),
        ROWS=tile.rows,
        KEYS=tile.keys,
        CAUSAL=is_causal,
        WINDOW=sliding_window is not None,
    )


def two_pass_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    query_lengths: Int[Array, "B"] | None,
    key_value_lengths: Int[Array, "B"] | None,
    query_offset: Int[Array, "B"] | None,
    *,
    scale: float,
    is_causal: bool,
    sliding_window: int | None,
    score_rows: common.ScoreRows,
    tiles: tuple[Tile, Tile] | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B K S"], Float[Array, "B T N"]]:
    """`api.two_pass_attention` in Triton. None for lengths means full, for the offset 0, for tiles the table's."""
    capability = _decline_what_it_cannot_run(query, key, value, scale)
    extent = common.extents(query, key, query_lengths, key_value_lengths, query_offset, score_rows)
    tiles = tiles_for(query.shape[3], capability) if tiles is None else tiles
    return _two_passes(
        query, key, value, extent, float(scale), is_causal, sliding_window, score_rows, tiles, capability
    )


@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7, 8, 9))
def _two_passes(query, key, value, extent, scale, is_causal, sliding_window, score_rows, tiles, capability):
    from pallas_kernels.two_pass_attention import _triton_kernels as kernels

    batch, t, heads, size = query.shape
    s, kv_heads = key.shape[1:3]
    window = -(sliding_window or 1)
    forward, scores = tiles

    def launch(kernel, tile, inputs, out_shape, grid, *sizes):
        return triton_call.call(
            *inputs,
            extent,
            np.float32(-scale * common.LOG2E),
            *(-x for x in (t, s, heads, kv_heads)),
            *sizes,
            kernel=kernel,
            out_shape=out_shape,
            grid=grid,
            num_warps=tile.warps,
            num_stages=tile.stages,
            compute_capability=capability,
            **constants(size, tile, is_causal, sliding_window),
        )

    output, lse = launch(
        kernels.forward_kernel,
        forward,
        (query, key, value),
        [jax.ShapeDtypeStruct(query.shape, query.dtype), jax.ShapeDtypeStruct((batch, t, heads), jnp.float32)],
        (heads, -(-t // forward.rows), batch),
        window,
    )
    if score_rows == 0:
        return output, jnp.zeros((batch, kv_heads, s), jnp.float32), lse
    key_tiles = -(-s // scores.keys)
    together = heads // kv_heads if common.takes_whole_group(score_rows, batch * kv_heads * s) else 1
    (sums,) = launch(
        kernels.scores_kernel,
        scores,
        (query, key, lse),
        [jax.ShapeDtypeStruct((batch, heads // together, s), jnp.float32)],
        (heads // together, key_tiles, batch),
        -together,
        window,
    )
    return output, sums.reshape(batch, kv_heads, -1, s).sum(axis=2), lse
