"""Two-pass prefill attention beside cuDNN's flash attention, in one run on one GPU: `minikv bench prefill`.

Figures are device time: calls are chained inside one jit, each waiting for the last one's results. Shares of the limit
are floating-point operations, those of the causal half alone, per second over the rate of a large bfloat16 product;
`extra_bytes` is what the compiled call holds beyond the attention output, and `lse_and_scores_bytes` the size of its
other two results.
"""

import datetime
import math
import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from minikv_jax.bench.timing import Reading, sensor, write_results
from minikv_jax.processes import Workers
from pallas_kernels.two_pass_attention.api import two_pass_attention

MATMUL_RATE = 790e12  # bf16, measured on an H100: what a share of the limit refers to
# As long as the layers of a long prompt keep the GPU busy: within a tenth of a second a power limit shows nothing yet.
_CHAIN_SECONDS = 0.3
_CHAINS = ("flash", "forward", "both")
_REPEATS = 6


@dataclass(frozen=True)
class Case:
    """One prompt shape; `lengths` of a ragged batch, `window` rows that count for the scores (None: all)."""

    name: str
    length: int
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    window: int | None = None
    lengths: tuple[int, ...] = ()
    implementation: str = "mosaic_gpu"

    @property
    def batch(self) -> int:
        return max(len(self.lengths), 1)

    @property
    def flash_operations(self) -> float:
        """Floating-point operations of causal attention on what is really there: two products over half a square."""
        return sum(2 * self.heads * n**2 * self.head_size for n in self.lengths or (self.length,))

    @property
    def operations(self) -> float:
        return self.flash_operations * (1.5 if self.window is None else 1)


CASES = (
    Case("S8192", 8192),
    Case("S32768", 32768),
    Case("S131072", 131072),
    Case("S8192-window64", 8192, window=64),
    Case("S32768-window64", 32768, window=64),
    Case("S8192-heads32-32", 8192, kv_heads=32),
    Case("S32768-heads32-32", 32768, kv_heads=32),
    Case("S8192-D64", 8192, head_size=64),
    Case("S32768-D64", 32768, head_size=64),
    Case("S8192-triton", 8192, implementation="triton"),
    Case("S32768-triton", 32768, implementation="triton"),
    Case("ragged8-1k-16k", 16384, lengths=(1024, 2048, 3072, 4096, 6144, 8192, 12288, 16384)),
)


def _draw(case: Case) -> list[jax.Array]:
    shapes = [(case.batch, case.length, n, case.head_size) for n in (case.heads, case.kv_heads, case.kv_heads)]
    keys = jax.random.split(jax.random.key(0), 3)
    draw = jax.jit(partial(jax.random.normal, dtype=jnp.bfloat16), static_argnums=1)
    return [draw(key, shape) for key, shape in zip(keys, shapes)]


def _lengths(case: Case) -> jax.Array | None:
    return jnp.asarray(case.lengths, jnp.int32) if case.lengths else None


def _two_passes(case: Case, score_rows, q, k, v):
    lengths = _lengths(case)
    return two_pass_attention(
        q,
        k,
        v,
        query_lengths=lengths,
        key_value_lengths=lengths,
        score_rows=score_rows,
        implementation=case.implementation,
    )


def _flash(case: Case, q, k, v):
    lengths = _lengths(case)
    return (
        jax.nn.dot_product_attention(
            q, k, v, is_causal=True, query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation="cudnn"
        ),
    )


def _chain(step, steps: int, q, k, v):
    """`steps` calls; one element of the query takes something from every result, in place: no call can be dropped."""

    def body(_, q):
        touched = sum(result.ravel()[0].astype(jnp.float32) for result in step(q, k, v))
        touched = jnp.where(jnp.isfinite(touched), touched, 0.0) * 1e-6
        return q.at[0, 0, 0, 0].add(touched.astype(q.dtype))

    return jax.lax.fori_loop(0, steps, body, q)[0, 0, 0, 0]


def _seconds(programs: dict, arrays) -> tuple[list[float], list[list[Reading]]]:
    """Median seconds per call of each chain, and the GPU's state during each (none where nothing can read it).

    They take turns, and each is first, second and third as often: a GPU slows down as it warms up, for all alike, and
    what ran before leaves it cooler or warmer.
    """
    samples, readings = ({name: [] for name in _CHAINS} for _ in range(2))
    read = sensor()
    for turn in range(_REPEATS + 1):
        first = turn % len(_CHAINS)
        for name in _CHAINS[first:] + _CHAINS[:first]:
            start = time.perf_counter()
            result = programs[name](*arrays)
            if read is not None:
                time.sleep(_CHAIN_SECONDS / 2)  # well before the chain ends
                readings[name].append(read())
            jax.block_until_ready(result)
            samples[name].append((time.perf_counter() - start) / programs["steps"])
    # The first turn warms up.
    return [statistics.median(samples[name][1:]) for name in _CHAINS], [x[1:] for x in readings.values() if x]


def _compiled(case: Case) -> dict:
    """Compiled chains of flash, pass 1 alone and the whole, with their number of steps; and the whole's memory."""
    shapes = [
        jax.ShapeDtypeStruct((case.batch, case.length, n, case.head_size), jnp.bfloat16)
        for n in (case.heads, case.kv_heads, case.kv_heads)
    ]
    steps = max(math.ceil(_CHAIN_SECONDS * MATMUL_RATE / case.operations / 1.5), 1)
    score_rows = "all" if case.window is None else case.window
    whole = partial(_two_passes, case, score_rows)
    parts = {"flash": partial(_flash, case), "forward": partial(_two_passes, case, 0), "both": whole}
    chains = {name: jax.jit(partial(_chain, step, steps)).lower(*shapes).compile() for name, step in parts.items()}
    return {"steps": steps, **chains, "memory": jax.jit(whole).lower(*shapes).compile().memory_analysis()}


def _row(case: Case, programs: dict) -> dict:
    arrays = _draw(case)
    (flash, forward, both), states = _seconds(programs, arrays)
    second = max(both - forward, 1e-9)
    memory = programs["memory"]
    row = {
        "case": case.name,
        "implementation": case.implementation,
        "shape": {"B": case.batch, "S": case.length, "N": case.heads, "K": case.kv_heads, "H": case.head_size},
        "us": both * 1e6,
        "forward_us": forward * 1e6,
        "scores_us": second * 1e6,
        "flash_us": flash * 1e6,
        "ratio_to_flash": both / flash,
        "forward_ratio_to_flash": forward / flash,
        "tflops": case.operations / both / 1e12,
        "share_of_limit": case.operations / both / MATMUL_RATE,
        "forward_share_of_limit": case.flash_operations / forward / MATMUL_RATE,
        "flash_share_of_limit": case.flash_operations / flash / MATMUL_RATE,
        "temporary_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "extra_bytes": memory.temp_size_in_bytes + memory.output_size_in_bytes - arrays[0].nbytes,
        "lse_and_scores_bytes": 4 * case.batch * case.length * (case.heads + case.kv_heads),
    }
    if states:
        row["clock_mhz"] = {name: statistics.median(x.mhz for x in seen) for name, seen in zip(_CHAINS, states)}
        every = [x for seen in states for x in seen]
        row["watts"] = statistics.median(x.watts for x in every)  # the driver's own average over about a second
        row["power_capped_share"] = statistics.mean(x.power_capped for x in every)
    if case.window is None:
        row["scores_share_of_limit"] = case.flash_operations / 2 / second / MATMUL_RATE
    if case.lengths:
        row["shape"]["lengths"] = list(case.lengths)
    return row


def run(out: Path) -> None:
    """Times every case and writes the rows to `out`."""
    with Workers(12) as workers:  # compiling takes longer than measuring
        programs = list(workers.map(_compiled, CASES))
    rows = []
    for case, compiled in zip(CASES, programs):
        rows.append(_row(case, compiled))
        row = rows[-1]
        print(
            f"{case.name:20s} {row['us']:9.0f} us = {row['ratio_to_flash']:.3f} x flash ({row['flash_us']:.0f} us);"
            f" pass 1 {row['forward_share_of_limit']:.2f}, whole {row['share_of_limit']:.2f} of the matmul rate;"
            f" memory beyond the output {row['extra_bytes']}, lse and scores {row['lse_and_scores_bytes']} bytes",
            flush=True,
        )
    uniform = next(row for row in rows if row["case"] == "S8192")
    for row in rows:
        if "lengths" in row["shape"]:
            row["time_over_work"] = uniform["tflops"] / row["tflops"]
    write_results(out, "prefill", f"minikv bench prefill --out {out}", datetime.date.today().isoformat(), rows)
