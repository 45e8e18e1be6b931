"""The examples run: the serving loop on a small random model, the notebook from top to bottom."""

import importlib.util
import json
from pathlib import Path

import draws
import jax.numpy as jnp
import pytest
from models import CONFIG, METHODS, MODEL

from minikv_jax import generate

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_serving_loop_answers_as_each_prompt_would_alone():
    rng = draws.rng()
    config = METHODS["full"].replace(prompt_capacity=48, generated_capacity=20)
    prompts = [rng.integers(0, CONFIG.vocab_size, n).tolist() for n in (40, 48, 33, 45, 48)]
    alone = [
        generate(MODEL, jnp.asarray([prompt]), jnp.asarray([len(prompt)]), config, 20)[0][0].tolist()
        for prompt in prompts
    ]
    end = alone[0][5]
    served = dict(load("serve_loop").serve(MODEL, prompts, config, 2, [end]))
    for number, answer in enumerate(alone):
        assert served[number] == (answer[: answer.index(end) + 1] if end in answer else answer)


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    monkeypatch.setenv("MINIKV_SHORT", "1")
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = json.loads((EXAMPLES / "minikv_colab.ipynb").read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(sources) > 3
    scope = {"__name__": "__main__"}
    for source in sources:
        exec(compile(source, "minikv_colab.ipynb", "exec"), scope)
    assert 0 < scope["faithful"]["minikv"] <= 1 and len(scope["answers"]["minikv"]) == 4
