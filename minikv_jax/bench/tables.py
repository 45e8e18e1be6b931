"""Generated parts of documents: the methods from `presets`, the figures from `examples/results/*.json`.

    python -m minikv_jax.bench.tables --write README.md docs/speed.md     rewrite them
    python -m minikv_jax.bench.tables --check README.md docs/speed.md     fail if that would change anything

A part stands between `<!-- NAME -->` and `<!-- /NAME -->`; `DOCUMENTS` says which file has which of `PARTS`.
"""

import argparse
import functools
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from minikv_jax import outputs, presets, program
from minikv_jax.bench.timing import read_results
from minikv_jax.errors import MiniKVError
from minikv_jax.models.families import listing
from minikv_jax.models.shapes import shape_of
from minikv_jax.report import assumed, planned_report

RESULTS = Path("examples/results")
_NOT_YET = "Not measured yet."
# The study has many settings of each method; the README shows the published ones.
_SHOWN = (
    *presets.METHODS,
    "minikv_plus:key_bits=3",
    "minikv_plus:balance=false",
    "h2o:heavy=0.25,recent=0.25",
    "snapkv:budget=0.5",
)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _source(results: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items() if name != "minikv-jax")
    return f"{results['device']}; {versions}; {results['date']}; `{results['command']}`."


def methods(folder: Path) -> str:
    """Each preset's own words and knobs."""
    rows = []
    for name, preset in presets.METHODS.items():
        about = (inspect.getdoc(preset) or "").splitlines()[0]
        knobs = [f"{k}={p.default}" for k, p in inspect.signature(preset).parameters.items()]
        rows.append([f"`{name}`", about, ", ".join(f"`{knob}`" for knob in knobs) or "-"])
    return _table(["method", "what it does", "knobs and their defaults"], rows)


def overview(folder: Path) -> str:
    """Each preset's own words."""
    rows = [[f"`{name}`", (inspect.getdoc(preset) or "").splitlines()[0]] for name, preset in presets.METHODS.items()]
    return _table(["method", "what it does"], rows)


def families(folder: Path) -> str:
    """The families of models that load."""
    rows = [
        [row["models"], f"`{row['class']}`", f"`{row['gguf']}`" if row["gguf"] else "as `llama`", row["supported"]]
        for row in listing()
    ]
    return _table(["models", "class in transformers", "architecture in GGUF", "supported"], rows)


def sizes(folder: Path) -> str:
    """What each method's cache weighs for two models, as `minikv methods --model-shape` says."""
    cases = [("llama2-7b", 4096, 512), ("llama3-8b", 32768, 512)]
    plans = {
        name: [planned_report(shape_of(model), preset(), *tokens).total for model, *tokens in cases]
        for name, preset in presets.METHODS.items()
    }
    rows = []
    for name, totals in plans.items():
        cells = []
        for total in totals:
            cells += [f"{total.bits_per_element:.2f}"]
            cells += [f"{size / 2**20:,.0f}" for size in (total.bytes_held, total.bytes_tiers)]
        rows.append([f"`{name}`", *cells])
    header = ["method", *("bits per element", "MiB held", "MiB of tiers") * 2]
    titles = " and ".join(f"{model} at {prompt:,} + {generated} tokens" for model, prompt, generated in cases)
    commands = ", ".join(f"`minikv methods --model-shape {m} --prompt {p} --generated {g}`" for m, p, g in cases)
    taken = [
        f"`{name}` at {model}: {words}."
        for name, preset in presets.METHODS.items()
        for model, *_ in cases
        if (words := assumed(shape_of(model), preset()))
    ]
    return "\n\n".join([f"One sequence of {titles}: {commands}.", _table(header, rows), " ".join(taken)])


def _of(name: str) -> Callable[[Callable[[dict], str]], Callable[[Path], str]]:
    """For a part that is written from the results of one file, if it is there."""

    def part_of(write: Callable[[dict], str]) -> Callable[[Path], str]:
        @functools.wraps(write)
        def part(folder: Path) -> str:
            path = folder / name
            return write(read_results(path)) if path.exists() else _NOT_YET

        return part

    return part_of


@_of("cpu.json")
def cpu(results: dict) -> str:
    """Decode and prefill beside transformers."""
    rows = []
    for row in results["rows"]:
        size = f"{row['bytes'] / 2**20:.1f} MiB" if "bytes" in row else "-"
        who = "this library" if row["implementation"] == "minikv_jax" else row["implementation"]
        times = [f"{row['decode_ms']:.1f} ms", f"{row['prefill_s']:.1f} s"]
        rows.append([f"{who}, {row['method']}", *times, size])
    shape = results["rows"][0]["shape"]
    title = (
        f"SmolLM2-135M in {shape['dtype']}, one sequence, {shape['prompt']:,} prompt tokens; medians of "
        f"{results['rows'][0]['rounds']} rounds in turn. {_source(results)}"
    )
    return title + "\n\n" + _table(["", "per new token", "prompt", "cache"], rows)


@_of("prefill.json")
def prefill(results: dict) -> str:
    """Two-pass attention beside cuDNN, and what share of a large product's rate each part reaches."""
    rows, rate = [], 0.0
    for row in results["rows"]:
        rate = row["tflops"] / row["share_of_limit"]
        times = [f"{row[name] / 1e3:.2f} ms" for name in ("flash_us", "forward_us", "us")]
        parts = (row.get(f"{part}share_of_limit") for part in ("flash_", "forward_", "scores_", ""))
        shares = ["-" if share is None else f"{share * rate:.0f} ({share:.2f})" for share in parts]
        clocks = row.get("clock_mhz", {})
        clock = ", ".join(f"{clocks[name]:.0f}" for name in ("flash", "both")) if clocks else "-"
        power = f"{row['watts']:.0f} ({row['power_capped_share']:.0%})" if "watts" in row else "-"
        rows.append([row["case"], *times, f"{row['ratio_to_flash']:.2f}", *shares, clock, power])
    header = ["prompt", "cuDNN, no scores", "ours, no scores", "ours, with scores", "with scores / cuDNN"]
    header += ["TFLOP/s of cuDNN", "of pass 1", "of pass 2", "of both", "MHz: cuDNN, both", "W (capped)"]
    title = (
        f"{_shape(results['rows'][0])}In brackets the share of {rate:.0f} TFLOP/s, the rate of a large bfloat16 "
        "product; operations are those of the causal half alone, and pass 2 is what scores add. "
        f"{_source(results)}"
    )
    return f"{title}\n\n{_table(header, rows)}"


@_of("decode.json")
def decode(results: dict) -> str:
    """Attention over packed codes beside cuDNN in bfloat16."""
    rows = []
    for row in results["rows"]:
        if row["implementation"] == "cudnn":
            continue
        shape = row["shape"]
        name = f"{shape['B']} x {shape['S']:,} tokens, {shape['N']}/{shape['K']} heads"
        what = f"{row['format']}, {row['implementation']}"
        times = [f"{row[key]:.0f} µs" for key in ("baseline_us", "us")]
        rows.append([name, what, f"{row['bits_per_element']:.2f}", *times, f"{row['speedup']:.2f}"])
    header = ["cache kept", "codes", "bits per element", "cuDNN, bf16, all tokens", "ours", "times as fast"]
    return f"Head size {results['rows'][0]['shape']['H']}. {_source(results)}\n\n{_table(header, rows)}"


def _whole_models(rows: Sequence[dict]) -> str:
    columns = (
        ("new tokens/s", lambda row: f"{row['tokens_per_s']:,.0f}"),
        ("a step", lambda row: f"{row['step_ms']:.2f} ms"),
        ("floor / step", lambda row: f"{row['share_of_floor']:.2f}"),
        ("times `full`", lambda row: f"{row.get('speedup_vs_full') or row['throughput_vs_full']:.2f}"),
        ("first token", lambda row: f"{row['ttft_s']:.2f} s"),
        ("peak", lambda row: f"{row['peak_bytes'] / 2**30:.1f} GiB"),
        ("peak / planned", lambda row: f"{row['peak_over_planned']:.2f}"),
        ("cache", lambda row: f"{row['cache_bytes'] / 2**30:.2f} GiB"),
    )
    lines = []
    for row in rows:
        shape = row["shape"]
        name = f"{row.get('model', '')}: {shape['B']} x {shape['S']:,}"
        cells = []
        for _, cell in columns:
            try:
                cells.append(cell(row))
            except KeyError:  # not measured in this case
                cells.append("-")
        lines.append([name, f"`{row['method']}`", *cells])
    return _table(["model: batch x prompt", "method", *(title for title, _ in columns)], lines)


@_of("e2e-h200.json")
def steps(results: dict) -> str:
    """What a step of minikv_plus takes beside one of minikv, on the card of `e2e-h200.json`."""
    return f"{_source(results)}\n\n{_whole_models([row for row in results['rows'] if 'failed' not in row])}"


@_of("e2e.json")
def e2e(results: dict) -> str:
    """Whole models, and where the time of a step goes."""
    good = [row for row in results["rows"] if "failed" not in row]
    bandwidths = sorted({round(row.get("copy_bandwidth", results["copy_bandwidth"]) / 1e12, 2) for row in good})
    bandwidths = bandwidths[:: max(len(bandwidths) - 1, 1)]  # the ends
    text = (
        "Random weights in bfloat16, the real decode loop with sampling; prompts are not counted as throughput, and "
        "the caches decoded from are synthetic. The floor is what a step must read over the bandwidth of a copy in the "
        f"same run, {' to '.join(f'{x:.2f}' for x in bandwidths)} TB/s. Planned are weights, exact cache, one layer's "
        f"keys and values in bfloat16 and 256 MiB.{_compiling(good)} {_source(results)}\n\n" + _whole_models(good)
    )
    ratios = [
        f"{row['speedup_vs_quantised_transformers']:.1f} ({row['shape']['B']} x {row['shape']['S']:,})"
        for row in good
        if row["method"] == "minikv" and "speedup_vs_quantised_transformers" in row
    ]
    if ratios:
        text += (
            "\n\nThe rows of transformers decode from random keys and values too, given to its caches' own `update`. "
            "Against its quantised cache (optimum-quanto, 2 bits) `minikv` writes as many times the tokens: "
            f"{', '.join(ratios)}."
        )
    for row in good:
        if "kernels" in row and row["method"] == "minikv":
            text += f"\n\n{_kernels(row, row.get('copy_bandwidth', results['copy_bandwidth']))}"
    return text


def _compiling(rows: Sequence[dict]) -> str:
    """What it takes to compile, in the first case of the smallest batch of which prompt and step were compiled."""
    whole = [row for row in rows if {"prefill_compile_s", "decode_compile_s", "decode_cached_compile_s"} <= row.keys()]
    if not whole:
        return ""
    first = min(whole, key=lambda row: row["shape"]["B"])
    shape = first["shape"]
    times = [
        f"`{row['method']}` {row['decode_compile_s']:.1f} s ({row['decode_cached_compile_s']:.1f} s if the persistent "
        f"cache has it) and {row['prefill_compile_s']:.1f} s"
        for row in whole
        if (row["model"], row["shape"]) == (first["model"], shape)
    ]
    return f" Compiling step and prompt, {shape['B']} x {shape['S']:,}: {', '.join(times)}."


def _kernels(row: dict, bandwidth: float) -> str:
    """Where one step's device time goes, beside the floors of what reads much."""
    total = sum(x["us"] for x in row["kernels"])
    floors = [1e6 * row[name] / bandwidth for name in ("weights_read_bytes", "cache_bytes")]
    title = (
        f"Device time of one step of `{row['method']}`, {row['shape']['B']} x {row['shape']['S']:,}: {total:,.0f} µs "
        f"in kernels. All weight products have a floor of {floors[0]:,.0f} µs, reading the cache {floors[1]:,.0f} µs."
    )
    rows = []
    for x in row["kernels"][:12]:
        size = row["cache_bytes"] if x["kernel"] == "decode_kernel" else x.get("bytes")
        floor = f"{1e6 * size / bandwidth:,.0f} µs" if size else "-"
        rows.append([f"`{x['kernel']}`", f"{x['calls']:g}", f"{x['us']:,.0f} µs", floor, f"{x['us'] / total:.0%}"])
    return f"{title}\n\n{_table(['kernel', 'calls', 'time', 'floor', 'share'], rows)}"


def quality(folder: Path) -> str:
    """Each model's methods: quality beside bits per element."""
    from minikv_jax.evals import summary
    from minikv_jax.evals.tasks import METRICS

    parts = []
    for path in sorted(folder.glob("quality-*.json")):
        results = read_results(path)
        rows = [row for row in results["rows"] if row["method"] in _SHOWN]
        parts.append(f"{results['rows'][0]['model']}. {_source(results)}")
        parts.append(summary.table(rows, METRICS, ("kl", "top1", "ppl", "lines", "shared", "shared_aware")))
    return "\n\n".join(parts) or _NOT_YET


def layers(folder: Path) -> str:
    """Models with layers of their own."""
    return _every_method(folder, "layers-quality-*.json", ("kl", "top1", "ppl", "lines", "shared", "chain"))


def questions(folder: Path) -> str:
    """Right answers about contexts that were compressed before, over many questions."""
    return _every_method(folder, "questions-*.json", ("shared", "chain"))


def tiers(folder: Path) -> str:
    """Most attended tokens in a tier of their own."""
    return _every_method(folder, "tiers-*.json", ("kl", "top1", "ppl"))


def ruler(folder: Path) -> str:
    """RULER's families, a column each."""
    return _every_method(folder, "ruler-*.json", ("ruler",), by_case=True)


def lines(folder: Path) -> str:
    """Line retrieval, a column a number of lines."""
    return _every_method(folder, "lines-*.json", ("lines",), by_case=True)


def asked(folder: Path) -> str:
    """Right answers about records that were compressed before, under the default and what it is measured against."""
    return _every_method(folder, "asked-*.json", ("lines", "shared", "chain"))


def running(folder: Path) -> str:
    """Along the full cache's own text."""
    return _every_method(folder, "running-*.json", ("run_kl", "run_top1", "run_ppl"))


def growth(folder: Path) -> str:
    """KL by the length of the prompt."""
    return _every_method(folder, "growth-*.json", ("kl",), by_case=True)


def coordinates(folder: Path) -> str:
    """Mean KL, and the median and the worst passage, of models as they are and in other coordinates."""
    return _by_model(folder, "coordinates-*.json", lambda x: f"{x['value']:.3g} ({x['median']:.3g}, {x['worst']:.3g})")


def keys(folder: Path) -> str:
    """Mean KL, and the worst passage's, of every preset on models as they are and in other coordinates."""
    return _by_model(folder, "keys-*.json", lambda row: f"{row['value']:.3g} ({row['worst']:.3g})", down=False)


def _by_model(folder: Path, files: str, cell: Callable[[dict], str], down: bool = True) -> str:
    """KL from the full cache: a line a model and a column a method, or the other way round."""
    models: dict[str, dict[str, str]] = {}
    sources = []
    for path in sorted(folder.glob(files), key=lambda path: path.stem):
        results = read_results(path)
        found = [row for row in results["rows"] if (row["task"], row["case"]) == ("kl", "all")]
        models[f"{found[0]['model']}, {found[0]['cases']} passages"] = {
            row["method"]: cell(row) for row in found if row["method"] != "full"
        }
        sources.append(_source(results))
    if not models:
        return _NOT_YET
    methods = list(dict.fromkeys(method for found in models.values() for method in found))
    table = [[name, *(found.get(method, "-") for method in methods)] for name, found in models.items()]
    titles = ["model", *(f"`{method}`" for method in methods)]
    if not down:
        titles, *table = [list(line) for line in zip(titles, *table)]
        titles[0] = "method"
    return f"The first: {sources[0]} The others stand in `examples/results/{files}`.\n\n{_table(titles, table)}"


@_of("promises.json")
def promises(results: dict) -> str:
    """What users may rely on, the test that shows it and what it measured."""
    rows = {}
    for row in results["rows"]:
        if not row["cases"]:
            rows.setdefault(row["case"], []).append([f"`{row['test']}`", _NOT_YET, ""])
            continue
        cases = f"{row['cases']} cases" if row["cases"] > 1 else ""
        measured = "; ".join([*filter(None, [cases]), *row["figures"][:3]])
        where = f"{row['device']}, {row['date']}" + (", slow" if row["suite"] == "slow" else "")
        rows.setdefault(row["case"], []).append([f"`{row['test']}`", measured or "passes", where])
    lines = [[case, *line] for case in sorted(rows) for line in rows[case]]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return f"{versions}; `{results['command']}`.\n\n{_table(['promise', 'test', 'figure', 'where and when'], lines)}"


def _every_method(folder: Path, files: str, names: Sequence[str], by_case: bool = False) -> str:
    """All methods of results files, a column for each metric of `names`, or for each group of cases of one metric."""
    from minikv_jax.evals import summary
    from minikv_jax.evals.tasks import METRICS

    parts = []
    for path in sorted(folder.glob(files)):
        results = read_results(path)
        rows, metrics = [row for row in results["rows"] if row["task"] in names], METRICS
        if by_case:
            rows = [row for row in rows if row["case"] != summary.ALL]
            metrics = {row["case"]: METRICS[row["task"]] for row in rows}
            rows = [row | {"task": row["case"], "case": summary.ALL} for row in rows]
        table = summary.table(rows, metrics, () if by_case else names)
        parts.append(f"{rows[0]['model']}. {_source(results)}\n\n{table}")
    return "\n\n".join(parts) or _NOT_YET


def _shape(row: dict) -> str:
    shape = row["shape"]
    return f"{shape['N']} query and {shape['K']} key/value heads of {shape['H']} where a case does not say otherwise. "


PARTS: dict[str, Callable[[Path], str]] = {
    "overview": overview,
    "methods": methods,
    "families": families,
    "sizes": sizes,
    "cpu": cpu,
    "prefill": prefill,
    "decode": decode,
    "e2e": e2e,
    "steps": steps,
    "quality": quality,
    "layers": layers,
    "questions": questions,
    "tiers": tiers,
    "lines": lines,
    "ruler": ruler,
    "promises": promises,
    "coordinates": coordinates,
    "keys": keys,
    "asked": asked,
    "running": running,
    "growth": growth,
}
DOCUMENTS = {
    "README.md": ("overview",),
    "methods.md": ("methods", "sizes"),
    "models.md": ("families",),
    "speed.md": ("cpu", "prefill", "decode", "e2e", "steps"),
    "losses.md": ("quality",),
    "quality.md": (
        *("coordinates", "keys", "asked", "running", "growth"),
        *("layers", "questions", "tiers", "lines", "ruler"),
    ),
    "promises.md": ("promises",),
}


def render(text: str, names: Sequence[str], folder: Path = RESULTS) -> str:
    """The text with the marked parts `names` written anew.

    Raises:
        MiniKVError: a part's marker is missing or stands there twice.
    """
    for name in names:
        part = PARTS[name]
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise MiniKVError(f"The text must hold <!-- {name} --> and <!-- /{name} --> once, in this order.")
        content = part(folder)
        text = pattern.sub(lambda match, content=content: f"{match[1]}{content}\n{match[2]}", text)
    return text


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--write", type=Path, nargs="+", metavar="FILE")
    mode.add_argument("--check", type=Path, nargs="+", metavar="FILE")
    chosen = parser.parse_args(arguments)
    behind = [path for path in chosen.write or chosen.check if _is_behind(path, write=bool(chosen.write))]
    for path in behind:
        print(f"{path} is behind its sources: run `make format`.", file=sys.stderr)
    return 1 if behind else 0


def _is_behind(path: Path, write: bool) -> bool:
    """Whether a document differs from what it is generated from, once it is written anew if `write`."""
    if path.name not in DOCUMENTS:
        raise MiniKVError(f"{path} is no document with generated parts: {', '.join(DOCUMENTS)} are.")
    old = path.read_text(encoding="utf-8")
    new = render(old, DOCUMENTS[path.name])
    if write:
        outputs.write_text(path, new)
    return not write and new != old


if __name__ == "__main__":
    program.run(lambda: main(sys.argv[1:]))
