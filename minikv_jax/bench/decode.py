"""Decode attention over packed caches beside cuDNN in bfloat16 and XLA, in one run on one GPU.

    minikv bench decode --out FILE [--only LABEL ...]

`us` is device time: the sum of the durations of all kernels of one call, the merge of the splits included, by the
profiler. `chained_us`, where present, is a call's share of a chain of 32 inside one jit and holds launch gaps too:
where a call is shorter than its launch takes the host, that figure is the host's and not the kernel's.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from minikv_jax.bench.timing import (
    copy_bandwidth,
    device_seconds,
    kernel_seconds,
    matching,
    read_results,
    write_results,
)
from minikv_jax.errors import ConfigError
from pallas_kernels.packed_decode.api import Part, decode_attention, partial_attention
from pallas_kernels.packed_decode.layout import BLOCK, PackedTensor

_CACHE_BYTES = 128 << 20  # more than twice the second-level cache: inputs rotate over so much
_HEAD = 128


@dataclass(frozen=True)
class Case:
    name: str
    batch: int
    length: int
    kv_heads: int = 8
    group: int = 4


@dataclass(frozen=True)
class Format:
    """Bits, group and metadata of keys (groups of tokens) and values (groups of channels)."""

    name: str
    key_bits: int = 2
    key_group: int = 32
    value_bits: int = 2
    value_group: int = _HEAD
    dtype: str = "float16"


CASES = (
    Case("A", 8, 32768),
    Case("B", 4, 32768, 32, 1),
    Case("C", 1, 32768),
    Case("D", 1, 131072),
    Case("E", 32, 4096),
)
SHORT = tuple(Case(f"B{b}-S{s}", b, s) for b in (1, 8) for s in (1024, 2048, 4096))
TWO_BITS = Format("2-bit")
OTHER_FORMATS = (
    Format("2-bit, fp8 metadata, groups of 64", 2, 64, 2, 64, "float8_e4m3fn"),
    Format("3-bit keys, 2-bit values, fp8 metadata, groups of 64", 3, 64, 2, 64, "float8_e4m3fn"),
    Format("2-bit, groups of 16", 2, 16, 2, 16),
    Format("4-bit", 4, 32, 4),
)


def packed_segment(key: jax.Array, case: Case, form: Format) -> tuple[PackedTensor, PackedTensor]:
    """Random codes, scales and zero points."""
    lead = (case.batch, case.kv_heads, -(-case.length // BLOCK))
    keys = iter(jax.random.split(key, 6))

    def tensor(codes_shape, metadata_shape, bits, group, axis, last):
        codes = jax.random.bits(next(keys), (*lead, *codes_shape), jnp.uint8)
        scale = jax.random.uniform(next(keys), (*lead, *metadata_shape), jnp.float32, 0, 2.0**-bits)
        zero = jax.random.uniform(next(keys), (*lead, *metadata_shape), jnp.float32, -1, 1)
        return PackedTensor(codes, scale.astype(form.dtype), zero.astype(form.dtype), bits, group, axis, last)

    k, v, h = form.key_bits, form.value_bits, _HEAD
    return (
        tensor((16 * k, h), (BLOCK // form.key_group, h), k, form.key_group, "tokens", False),
        tensor((h, 16 * v), (h // form.value_group, BLOCK), v, form.value_group, "channels", True),
    )


def _query(case: Case) -> jax.Array:
    return jax.random.normal(jax.random.key(7), (case.batch, 1, case.kv_heads * case.group, _HEAD), jnp.bfloat16)


def _bytes(tree) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def _rotation(make: Callable[[jax.Array], tuple]) -> list[tuple]:
    """As many sets of inputs as it takes to leave the cache behind."""
    first = make(jax.random.key(0))
    count = min(max(-(-_CACHE_BYTES // _bytes(first)), 1), 24)
    return [first, *(make(jax.random.key(i)) for i in range(1, count))]


def _cudnn(query, key, value):
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")


def _packed(query, keys, values, lengths, implementation):
    part = partial_attention(Part(query, keys, values, lengths), implementation=implementation)
    return part.output / part.total[..., None]


def baseline_seconds(case: Case, chained: bool) -> dict:
    """cuDNN over the whole cache in bfloat16."""

    @jax.jit
    def make(key):
        shape = (2, case.batch, case.length, case.kv_heads, _HEAD)
        return tuple(jax.random.normal(key, shape, jnp.bfloat16))

    query = _query(case)
    inputs = [(query, *kv) for kv in _rotation(make)]
    row = {"us": kernel_seconds(jax.jit(_cudnn), inputs) * 1e6, "bytes": _bytes(inputs[0][1:])}
    if chained:
        row["chained_us"] = device_seconds(_cudnn, *inputs[0]) * 1e6
    return row


def packed_seconds(case: Case, form: Format, implementation: str, chained: bool) -> dict:
    make = jax.jit(partial(packed_segment, case=case, form=form))
    query, lengths = _query(case), jnp.full((case.batch,), case.length, jnp.int32)
    attend = partial(_packed, implementation=implementation)
    inputs = [(query, *kv, lengths) for kv in _rotation(make)]
    repeats = 24 if implementation != "xla" else 3
    row = {"us": kernel_seconds(jax.jit(attend), inputs, repeats) * 1e6, "bytes": _bytes(inputs[0][1:3])}
    if chained:
        row["chained_us"] = device_seconds(attend, *inputs[0]) * 1e6
    return row


def _dense(query, key, value, lengths):
    return decode_attention([Part(query, key, value, lengths)], implementation="triton")[0]


def dense_seconds(case: Case, chained: bool, channels: int = _HEAD) -> dict:
    """Our own attention over the whole cache in bfloat16, head-major as caches hold it, keys of so many channels."""

    @jax.jit
    def make(key):
        rows = case.batch, case.kv_heads, case.length
        shapes = (*rows, channels), (*rows, _HEAD)
        return tuple(jax.random.normal(k, shape, jnp.bfloat16) for k, shape in zip(jax.random.split(key), shapes))

    query, lengths = _query(case)[..., :channels], jnp.full((case.batch,), case.length, jnp.int32)
    inputs = [(query, *kv, lengths) for kv in _rotation(make)]
    row = {"us": kernel_seconds(jax.jit(_dense), inputs) * 1e6, "bytes": _bytes(inputs[0][1:3])}
    if chained:
        row["chained_us"] = device_seconds(_dense, *inputs[0]) * 1e6
    return row


class Measurement(NamedTuple):
    """One row to be: what is shown of it, and what measures it."""

    case: Case
    implementation: str
    form: str
    measure: Callable[[], dict]

    @property
    def label(self) -> str:
        return f"{self.case.name} {self.implementation} {self.form}"


def _measurements(case: Case) -> Iterator[Measurement]:
    """A case's rows, but for cuDNN's."""
    full = case in CASES

    def packed(case: Case, form: Format, implementation: str = "triton", chained: bool = False) -> Measurement:
        return Measurement(
            case, implementation, form.name, partial(packed_seconds, case, form, implementation, chained)
        )

    yield Measurement(case, "triton", "bfloat16", partial(dense_seconds, case, full))
    if case.name == "A":
        for channels in (80, 64):
            narrow = partial(dense_seconds, case, False, channels)
            yield Measurement(case, "triton", f"bfloat16, keys of {channels} channels", narrow)
    yield packed(case, TWO_BITS, chained=full)
    if case.name in ("A", "B"):
        half = Case(f"{case.name}, half the tokens kept", case.batch, case.length // 2, case.kv_heads, case.group)
        yield packed(half, TWO_BITS)
        for form in OTHER_FORMATS:
            yield packed(case, form)
    if case.name in ("A", "C"):
        yield packed(case, TWO_BITS, "mosaic_gpu")
    if full:
        yield packed(case, TWO_BITS, "xla")


def planned(only: Sequence[str] = ()) -> dict[Case, list[Measurement]]:
    """What is measured of each case: what contains one of `only` in its label (`*` is anything), default all.

    Raises:
        ConfigError: nothing does.
    """
    plan = {case: matching(_measurements(case), only) for case in (*CASES, *SHORT)}
    if not any(plan.values()):
        raise ConfigError(f"--only {' '.join(only)} names no row: they read like 'A triton {TWO_BITS.name}'.")
    return {case: wanted for case, wanted in plan.items() if wanted}


def rows(plan: dict[Case, list[Measurement]], bandwidth: float) -> Iterator[dict]:
    """The rows, one at a time; each case's cuDNN comes first."""

    def finish(case, method, row, baseline, form=None):
        shape = {"B": case.batch, "S": case.length, "N": case.kv_heads * case.group, "K": case.kv_heads, "H": _HEAD}
        out = {"case": case.name, "shape": shape, "implementation": method}
        if form is not None:
            out |= {"format": form, "bits_per_element": 4 * row["bytes"] / (case.length * _elements(case))}
        out |= row
        if "chained_us" in row and "chained_us" in baseline:
            out["chained_speedup"] = baseline["chained_us"] / row["chained_us"]
        out |= {"baseline_us": baseline["us"], "speedup": baseline["us"] / row["us"]}
        out["share_of_bandwidth"] = row["bytes"] / (row["us"] * 1e-6) / bandwidth
        return {key: round(x, 4) if isinstance(x, float) else x for key, x in out.items()}

    for case, wanted in plan.items():
        baseline = baseline_seconds(case, chained=case in CASES)
        yield finish(case, "cudnn", baseline, baseline)
        for m in wanted:
            yield finish(m.case, m.implementation, m.measure(), baseline, m.form)


def _elements(case: Case) -> int:
    """Numbers of keys, or of values, of one token."""
    return case.batch * case.kv_heads * _HEAD


def _key(row: dict) -> tuple:
    return row["case"], row["implementation"], row.get("format")


def run(out: Path, only: Sequence[str] = ()) -> None:
    """Measures the rows whose label contains one of `only`, default all, and writes `out` after each.

    With `only`, other rows that it holds stay and those measured again are replaced.

    Raises:
        ConfigError: `only` names no row, or `out` holds other results.
    """
    plan = planned(only)
    done = {_key(row): row for row in (read_results(out, "decode")["rows"] if only and out.exists() else [])}
    bandwidth = copy_bandwidth()
    for row in rows(plan, bandwidth):
        done[_key(row)] = row
        note = {"copy_bandwidth": bandwidth, "timing": "sum of kernel durations, inputs rotating beyond the cache"}
        command = f"minikv bench decode --out {out}"
        write_results(out, "decode", command, time.strftime("%Y-%m-%d"), list(done.values()), **note)
        print(f"{row['case']:28} {row['implementation']:10} {row.get('format', 'bfloat16'):52}"
              f"{row['us']:9.1f} us {row['speedup']:6.2f}x {row['share_of_bandwidth']:6.1%}", flush=True)  # fmt: skip
