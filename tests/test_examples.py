"""The examples run: the serving loop on a small random model, the notebook from top to bottom."""

import importlib.util
import json
import sys
from pathlib import Path

import draws
import jax.numpy as jnp
import numpy as np
import pytest
from models import CONFIG, METHODS, MODEL, slow
from tiny import Characters

from minikv_jax import ConfigError, generate

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Chat(Characters):
    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return messages[0]["content"]


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


@pytest.mark.parametrize("method", ["full", *slow("minikv", "mikv")])
def test_drafts_change_no_token(method):
    example, rng = load("speculate"), draws.rng()
    assert example.drafted([1, 2, 3, 9, 1, 2, 3], 2) == [9, 1] and example.drafted([1, 2, 3], 2) == []
    prompt = np.tile(rng.integers(0, CONFIG.vocab_size, 16), 3).tolist()
    config = METHODS[method].replace(prompt_capacity=48, generated_capacity=40)
    alone, _ = generate(MODEL, np.array([prompt]), np.array([48]), config, 24)
    written, calls = example.speculate(MODEL, prompt, config, 24, 4)
    assert written == alone[0].tolist() and calls <= 23


def test_the_serving_loop_prints_an_answer_for_each_question(monkeypatch, capsys):
    example = load("serve_loop")
    monkeypatch.setattr(sys, "argv", ["serve_loop.py"])
    monkeypatch.setattr(example, "load", lambda _: (MODEL, Chat()))
    monkeypatch.setattr(example, "serve", lambda params, prompts, *_, **__: ((i, p[:5]) for i, p in enumerate(prompts)))
    example.main()
    assert capsys.readouterr().out.splitlines()[1] == "What is the capital of France? what "


def test_quality_goes_into_a_folder_that_can_be_written(monkeypatch, tmp_path, capsys):
    example, measured = load("quality"), []

    def run(lab, name, methods, tasks, out, command):
        measured.append((lab.settings.lengths, list(methods), list(tasks)))
        out.mkdir()
        (out / "table.md").write_text("| a table |")

    monkeypatch.setattr(example, "load", lambda _: (MODEL, Chat()))
    monkeypatch.setattr(example, "run", run)
    monkeypatch.setattr(sys, "argv", ["quality.py", str(tmp_path / "out")])
    example.main()
    ((lengths, methods, tasks),) = measured
    assert lengths == (512,) and len(methods) == 7 and tasks == ["kl", "lines"]
    assert "a table" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["quality.py", str(tmp_path / "out" / "table.md")])
    with pytest.raises(ConfigError, match="is a file"):
        example.main()


def test_memory_is_drawn_from_plans(monkeypatch, tmp_path, capsys):
    example = load("memory")
    monkeypatch.setattr(example, "LENGTHS", (1024, 4096))
    monkeypatch.setattr(example, "METHODS", ("full", "minikv"))
    monkeypatch.setattr(sys, "argv", ["memory.py", str(tmp_path / "memory.svg")])
    example.main()
    drawn = (tmp_path / "memory.svg").read_text()
    assert all(f"<!-- {text} -->" in drawn for text in (*example.MODELS, "full", "minikv"))


@pytest.mark.parametrize("name, arguments", [("serve_loop", ["more"]), ("quality", ["a", "b"]), ("quality", ["--no"])])
def test_arguments_that_an_example_does_not_take_are_refused(name, arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        load(name).main()
    assert ended.value.code == 2 and "unrecognized arguments" in capsys.readouterr().err


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


@pytest.mark.slow  # .ci/run runs it beside the suite
def test_weights_of_others_give_what_our_own_model_gives(capsys):
    load("jax_llm_llama3").main()
    assert capsys.readouterr().out.count("logits differ by") == 2
