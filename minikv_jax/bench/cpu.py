"""Prefill and decode times of a real small model on this machine's CPU, beside transformers on torch.

    python -m minikv_jax.bench.cpu --out examples/results/cpu.json [--torch-python PYTHON]

PYTHON is an interpreter with torch and transformers; without it only our own rows are measured. All contenders read
the same weights in float32, the same prompt, one sequence, and pick the most likely token; they take turns, round
after round, so that other work on the machine meets all alike. The first round compiles and is not counted.
"""

import argparse
import contextlib
import datetime
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from minikv_jax import cache_report, load, outputs, presets, program, stream
from minikv_jax.bench.timing import environment, write_results
from minikv_jax.config import CacheConfig
from minikv_jax.errors import ConfigError, MiniKVError
from minikv_jax.models.hub import locate
from minikv_jax.models.weights import open_checkpoint

MODEL = "smollm2"
TEXT = Path(__file__).parents[2] / "examples" / "texts" / "pride_and_prejudice.txt"
_HF_NAMES = {
    "attention_norm": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}

# What one turn gives: seconds to the first token, seconds of every later one, and the tokens.
type Turn = dict[str, Any]


def _export(folder: Path) -> None:
    """Writes the model as a Hugging Face folder in float32."""
    checkpoint = open_checkpoint(locate(MODEL))
    config, tensors = checkpoint.config, {}
    for name, array in checkpoint.tensors(np.float32):
        *layer, last = name.split(".")
        if layer:
            name = f"model.{'.'.join(layer)}.{_HF_NAMES[last]}.weight"
        else:
            name = {"head": "model.embed_tokens.weight", "norm": "model.norm.weight"}[name]
        tensors[name] = np.ascontiguousarray(array.T)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    entries = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
    }
    (folder / "config.json").write_text(json.dumps(entries))


class _Torch:
    """transformers in a process of another interpreter, which ends with the context."""

    def __init__(self, python: str, folder: Path, cache: str):
        command = [python, str(Path(__file__).with_name("_torch_contender.py")), str(folder), cache]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> "_Torch":
        return self

    def __exit__(self, *error) -> None:
        self._process.kill()
        self._process.communicate()

    def read(self) -> dict:
        """What it says next: first its versions, then the figures of each turn."""
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise MiniKVError("The torch process ended: its own message is above.")
        return json.loads(line)

    def turn(self, tokens: list[int], new: int) -> Turn:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, as `read` will find
            self._process.stdin.write(json.dumps({"tokens": tokens, "new": new}) + "\n")
            self._process.stdin.flush()
        return self.read()


def _ours(model, config: CacheConfig) -> Callable[[list[int], int], Turn]:
    """A method's turns, token by token as a program that streams sees them."""

    def turn(tokens: list[int], new: int) -> Turn:
        roomy = config.replace(generated_capacity=new)
        prompt = jnp.asarray([tokens], jnp.int32), jnp.asarray([len(tokens)], jnp.int32)
        start = time.perf_counter()
        times, written, report = [], [], None
        for token, cache in stream(model, *prompt, roomy, new):
            written.append(int(np.asarray(token)[0]))
            times.append(time.perf_counter())
            report = report or cache_report(cache)
        steps = [after - before for before, after in itertools.pairwise(times)]
        size = {"bytes": report.total.bytes_held, "bits_per_element": report.total.bits_per_element} if report else {}
        return {"prefill_s": times[0] - start, "token_s": steps, "tokens": written, **size}

    return turn


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def run(
    out: Path,
    *,
    torch_python: str | None = None,
    prompt_tokens: int = 4096,
    new_tokens: int = 48,
    rounds: int = 7,
    methods: Sequence[str] = ("full", "minikv"),
) -> None:
    """Measures and writes the results file `out`.

    Raises:
        ConfigError: numbers out of range, an unknown method, or a package without the repository's texts.
    """
    # The second new token waits for compilation, and is not counted.
    for name, number, least in (
        ("prompt_tokens", prompt_tokens, 1),
        ("new_tokens", new_tokens, 3),
        ("rounds", rounds, 1),
    ):
        if number < least:
            raise ConfigError(f"{name}={number}: give at least {least}.")
    configs = [presets.by_name(name) for name in methods]
    if not TEXT.is_file():
        raise ConfigError(f"bench cpu reads the repository's {TEXT.name}, which a package lacks: run it in a checkout.")
    model, tokenizer = load(MODEL)
    tokens = tokenizer(TEXT.read_text(encoding="utf-8"))["input_ids"][:prompt_tokens]
    if len(tokens) < prompt_tokens:
        raise ConfigError(f"{TEXT.name} has {len(tokens)} tokens: ask for at most that many.")
    contenders = {("minikv_jax", config.name): _ours(model, config) for config in configs}
    versions: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as children:
        if torch_python:
            _export(Path(folder))
            for kind in ("dynamic", "static"):
                child = children.enter_context(_Torch(torch_python, Path(folder), kind))
                versions |= child.read()["versions"]
                contenders["transformers", f"{kind} cache"] = child.turn
        turns: dict[tuple[str, str], list[Turn]] = {key: [] for key in contenders}
        for i in range(rounds + 1):
            for key, turn in contenders.items():
                result = turn(tokens, new_tokens)
                step = statistics.median(result["token_s"][1:])
                print(f"round {i}: {key}: prefill {result['prefill_s']:.2f} s, {1e3 * step:.2f} ms a token", flush=True)
                if i:
                    turns[key].append(result | {"step": step})

    rows, reference = [], turns["minikv_jax", configs[0].name][0]["tokens"]
    for (implementation, method), results in turns.items():
        steps, prefills = [r["step"] for r in results], [r["prefill_s"] for r in results]
        same = [a == b for a, b in zip(results[0]["tokens"], reference)]
        row = {
            "case": f"{MODEL}-S{prompt_tokens}",
            "shape": {"batch": 1, "prompt": prompt_tokens, "generated": new_tokens, "dtype": "float32"},
            "implementation": implementation,
            "method": method,
            "decode_ms": round(1e3 * statistics.median(steps), 2),
            "decode_ms_least": round(1e3 * min(steps), 2),
            "prefill_s": round(statistics.median(prefills), 2),
            "prefill_s_least": round(min(prefills), 2),
            "tokens_as_full": [*same, False].index(False),
            "rounds": rounds,
        }
        for name in ("bytes", "bits_per_element"):
            if name in results[0]:
                row[name] = results[0][name]
        rows.append(row)
    command = f"python -m minikv_jax.bench.cpu --out {out}" + (" --torch-python PYTHON" if torch_python else "")
    command += f" --rounds {rounds}"
    about = environment()
    about = {"device": _processor(), "versions": about["versions"] | versions}
    write_results(out, "cpu", command, datetime.date.today().isoformat(), rows, about)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--torch-python", help="interpreter that has torch and transformers")
    parser.add_argument("--prompt-tokens", type=int, default=4096)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--methods", default="full,minikv")
    chosen = parser.parse_args(arguments)
    outputs.require_file(chosen.out, "--out")
    run(
        chosen.out,
        torch_python=chosen.torch_python,
        prompt_tokens=chosen.prompt_tokens,
        new_tokens=chosen.new_tokens,
        rounds=chosen.rounds,
        methods=chosen.methods.split(","),
    )


if __name__ == "__main__":
    program.run(lambda: main(sys.argv[1:]))
