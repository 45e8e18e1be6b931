"""The study: which methods, tasks and lengths answer the questions that papers leave open.

`minikv eval --study budgets,minikv` runs pieces one after the other into one folder. A piece is a value; methods whose
bytes must match are fitted to a share of bfloat16 with the plan of their cache (`report.planned_report`), everything
held counted: codes, metadata, window and counters.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

from minikv_jax import presets
from minikv_jax.basis import Quantized
from minikv_jax.config import CacheConfig
from minikv_jax.errors import ConfigError
from minikv_jax.evals.task import Settings
from minikv_jax.models.config import ModelConfig
from minikv_jax.report import planned_report

SHARES = (0.05, 0.10, 0.14, 0.20, 0.30, 0.50)
_WINDOWS = (128, 64, 32, 16)


@dataclasses.dataclass(frozen=True)
class Piece:
    """
    Attributes:
        about: the question.
        tasks: comma-separated.
        methods: by label, for a model and settings.
        settings: what the piece changes of those asked for, for a model.
    """

    about: str
    tasks: str
    methods: Callable[[ModelConfig, Settings], dict[str, CacheConfig]]
    settings: Callable[[ModelConfig, Settings], Settings] = lambda model, settings: settings


# ---- equal bytes ---------------------------------------------------------------------------------------------------


def _packed(name: str, x: float, window: int, bits: int) -> str:
    return f"{name}:heavy={x / 2:.3f},recent={x / 2:.3f},bits={bits},residual={window}"


def _plus(name: str, x: float, window: int, bits: tuple[int, int]) -> str:
    # All tokens first; below that half of what is kept is recent. Half of the window is whole groups and stays dense.
    kept = "" if x >= 1 else f"heavy={x / 2:.3f},recent={x / 2:.3f},"
    groups = f"group_size={window // 2},value_group=64," if window < 128 else ""
    # What feedback for new keys needs weighs as much as H tokens: too much of so small a cache.
    feedback = ",feedback=prompt" if window <= 32 else ""
    return f"{name}:{kept}key_bits={bits[0]},value_bits={bits[1]},{groups}residual={window}{feedback}"


def _mikv(name: str, x: float, window: int, bits: int) -> str:
    return f"{name}:ratio={x:.3f},bits={bits}"


def _dense(name: str, x: float, window: int, bits: int) -> str:
    return {
        "h2o": f"h2o:heavy={x / 2:.3f},recent={x / 2:.3f}",
        "qhitter": f"qhitter:heavy={0.75 * x:.3f},recent={0.25 * x:.3f},protected={0.35 * x:.3f}",
        "snapkv": f"snapkv:budget={x:.3f}",
        "think": f"think:budget={x:.3f}",
        "kvmerger": f"kvmerger:budget={x:.3f},heavy={0.24 * x:.3f},recent={0.34 * x:.3f}",
    }[name]


def _counted(name: str, x: float, tokens: int) -> str:
    knob = {"streaming_llm": "recent", "pyramidkv": "budget"}[name]
    return f"{name}:{knob}={max(int(x * tokens), 40)}"


class _Knobs(NamedTuple):
    """How a method is written with a share of its tokens, the bits these may take, fewest first, and the share of its
    bytes for a window."""

    write: Callable[..., str]
    bits: tuple = (16,)
    window: float = 0.25


_KNOBS: Mapping[str, _Knobs] = {
    "streaming_llm": _Knobs(_counted),
    "h2o": _Knobs(_dense),
    "snapkv": _Knobs(_dense),
    "think": _Knobs(_dense),
    "kvmerger": _Knobs(_dense),
    "pyramidkv": _Knobs(_counted),
    "qhitter": _Knobs(_dense, (4,)),
    "minikv": _Knobs(_packed, (2, 4, 8)),
    "minikv_pyramid": _Knobs(_packed, (2, 4, 8)),
    "mikv": _Knobs(_mikv, (4, 16)),
    "minikv_plus": _Knobs(_plus, ((2, 2), (3, 2), (4, 2), (4, 3), (4, 4), (8, 4), (8, 8)), window=0.3),
}


def at_share(name: str, share: float, model: ModelConfig, prompt: int, generated: int) -> str | None:
    """The method's settings whose cache weighs a share of a bfloat16 one, or None where it cannot.

    All tokens in as many bits as fit, which on development texts beat dropping some for more bits; where not even the
    fewest do, as many tokens as fit in those. The window is the largest that takes its
    share of the bytes at most.
    """
    write, widths, window_share = _KNOBS[name]
    window = next((w for w in _WINDOWS if w / (prompt + generated) <= window_share * share), _WINDOWS[-1])

    def line(x: float, bits) -> str:
        return write(name, x, prompt) if write is _counted else write(name, x, window, bits)

    # Layers are alike but for a pyramid, whose budgets fall in a straight line: a few layers say what all weigh.
    model = dataclasses.replace(model, num_layers=min(model.num_layers, 5 if "pyramid" in name else 1))

    @functools.cache
    def weighs(x: float, bits) -> float:
        (config,) = presets.parse(line(x, bits)).values()
        return planned_report(model, config, prompt, generated).total.bits_per_element / 16

    try:
        fit = [bits for bits in widths if weighs(1.0, bits) <= share]
        x, bits = (1.0, fit[-1]) if fit else (_most(lambda x: weighs(x, widths[0]) <= share), widths[0])
    except ConfigError:
        return None
    # Room comes in whole blocks, and bits in steps: a cache may have to stay somewhat below.
    return line(x, bits) if 0.75 * share <= weighs(x, bits) <= share else None


def _most(fits: Callable[[float], bool]) -> float:
    """The largest share of tokens, from a hundredth on, that still fits; a hundredth where none does."""
    low, high = 0.01, 1.0
    for _ in range(8):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def at_equal_bytes(model: ModelConfig, settings: Settings) -> dict[str, CacheConfig]:
    prompt, generated = max(settings.lengths), settings.new_tokens
    names = [name for name in _KNOBS if name in presets.METHODS]
    lines = [at_share(name, share, model, prompt, generated) for share in SHARES for name in names]
    fixed = ["kivi:group_size=64", "kivi", "kivi:group_size=16", "kivi:key_bits=4,value_bits=4"]
    return presets.parse(",".join(dict.fromkeys(["full", *filter(None, lines), *fixed])))


def _lines(*lines: str) -> Callable[[ModelConfig, Settings], dict[str, CacheConfig]]:
    """These methods, less those that this version has no preset for."""

    def methods(model: ModelConfig, settings: Settings) -> dict[str, CacheConfig]:
        known = [line for line in lines if line.partition(":")[0] in presets.METHODS]
        return presets.parse(",".join(known))

    return methods


_DEFAULTS = _lines(
    "full",
    "kivi",
    "minikv",
    "minikv_pyramid",
    "mikv",
    "h2o:heavy=0.25,recent=0.25",
    "snapkv:budget=0.5",
    "minikv_plus",
    "minikv_plus:key_bits=3",
)
_LONG = _lines("full", "kivi", "minikv", "mikv", "minikv_plus")


def _longest(model: ModelConfig, settings: Settings) -> Settings:
    return dataclasses.replace(settings, lengths=(max(settings.lengths),))


def _longer_answers(model: ModelConfig, settings: Settings) -> Settings:
    return dataclasses.replace(_longest(model, settings), new_tokens=8 * settings.new_tokens)


def _growing(model: ModelConfig, settings: Settings) -> Settings:
    """Half of the longest length, doubled as often as the model has positions for, and all that it has."""
    # Room for the new tokens and one more that is only predicted; whole tiles of attention.
    most = (model.max_position_embeddings - settings.new_tokens - 1) // 128 * 128
    lengths = [max(max(settings.lengths) // 2, 16)]
    while 2 * lengths[-1] <= most:
        lengths.append(2 * lengths[-1])
    if lengths[0] < most:
        lengths.append(most)
    return dataclasses.replace(settings, lengths=tuple(dict.fromkeys(lengths)))


def _minikv_choices(model: ModelConfig, settings: Settings) -> dict[str, CacheConfig]:
    """MiniKV with one knob turned, and the two orders of quantising and selecting, all new tokens dense in both."""
    group = presets.minikv().method.codec.token_group
    never_full = (settings.new_tokens // group + 2) * group
    turned = _lines(
        "full",
        "minikv",
        "minikv:heavy=0.0,recent=0.5",
        "minikv:heavy=0.1,recent=0.4",
        "minikv:heavy=0.4,recent=0.1",
        "minikv:heavy=0.45,recent=0.05",
        "minikv:pyramid_depth=2",
        "minikv:pyramid_depth=7",
        "minikv:group_size=32",
        "minikv:group_size=64",
        "minikv:residual=32",
        "minikv:residual=256",
        "minikv:bits=16",
        "minikv:bits=4",
        "minikv:heavy=0.75,recent=0.25",
        "minikv:metadata_dtype=float8_e4m3fn",
        "minikv:sinks=4",
        f"minikv:residual={never_full}",
    )
    quantized_first = presets.minikv(bits=16).replace(basis=(Quantized(presets.minikv().method.codec),))
    return turned(model, settings) | {"minikv:bits=16, quantised first": quantized_first}


def _few(model: ModelConfig, settings: Settings) -> dict[str, CacheConfig]:
    """What a larger model is asked: published settings, and MiniKV and minikv_plus at some shares of bfloat16."""
    prompt, shares = max(settings.lengths), (0.10, 0.14, 0.20)
    lines = [
        at_share(name, x, model, prompt, settings.new_tokens) for x in shares for name in ("minikv", "minikv_plus")
    ]
    return _DEFAULTS(model, settings) | presets.parse(",".join(filter(None, lines)))


STUDY: dict[str, Piece] = {
    "main": Piece("every method at its published settings", "kl,lines,shared,aware", _DEFAULTS, _longest),
    "budgets": Piece("every method at 5 to 50 % of bfloat16", "kl,lines", at_equal_bytes, _longest),
    "few": Piece(
        "published settings, and MiniKV and minikv_plus at 10, 14 and 20 %", "kl,lines,shared", _few, _longest
    ),
    "minikv": Piece(
        "MiniKV's own choices: heavy or recent, pyramid, groups, window, quantised before or after selection",
        "kl,lines",
        _minikv_choices,
        _longest,
    ),
    "mikv": Piece(
        "MiKV's claims: the balancer, the retained bits, the important share and its bits, and eviction beside them",
        "kl,lines",
        _lines(
            "full",
            "mikv",
            "mikv:balance=false",
            "mikv:retained_bits=4",
            "mikv:retained_bits=4,balance=false",
            "mikv:bits=8",
            "mikv:bits=4",
            "mikv:bits=2",
            "mikv:ratio=0.05",
            "mikv:ratio=0.5",
            "mikv:ratio=0.5,balance=false",
            "h2o:heavy=0.1,recent=0.1",
            "h2o:heavy=0.25,recent=0.25",
        ),
        _longest,
    ),
    "long": Piece(
        "do errors pile up over a long answer?",
        "running",
        _LONG,
        _longer_answers,
    ),
    "lengths": Piece("does the loss grow with the prompt?", "kl", _DEFAULTS, _growing),
    "depth": Piece("is anything lost in the middle?", "needle,passkey", _LONG),
    "inside": Piece("errors and attention, layer by layer", "layers,spread,persistence", _DEFAULTS, _longest),
}


def by_names(names: str) -> dict[str, Piece]:
    """Pieces from a comma-separated list; "all" is all of them.

    Raises:
        ConfigError: an unknown name.
    """
    chosen = list(STUDY) if names == "all" else [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in STUDY:
            raise ConfigError(f"Unknown piece of the study {name!r}: choose from {', '.join(STUDY)}, or all.")
    return {name: STUDY[name] for name in chosen}
