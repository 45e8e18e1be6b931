"""The program as a person meets it: mistakes are one line and exit code 2, answers are text, table or JSON."""

import json
import os
import subprocess
import sys

import pytest

from minikv_jax import presets


def minikv(*arguments, **environment):
    command = [sys.executable, "-m", "minikv_jax.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["generate"], "prompt is empty"),
        (["generate", "--method", "minikv9", "hi"], "minikv9"),
        (["generate", "--set", "key_bits=5", "hi"], "key_bits=5"),
        (["generate", "--set", "key_bits", "hi"], "knob=value"),
        (["generate", "--set", "heavy=much", "hi"], "heavy"),
        (["generate", "--model", "no/such/folder", "hi"], "no/such/folder"),
        (["generate", "--prompt-file", "no/such/text", "hi"], "no/such/text"),
        (["generate", "--temperature", "-1", "hi"], "temperature"),
        (["generate", "--max-new-tokens", "0", "hi"], "max-new-tokens"),
        (["generate", "--nonsense", "hi"], "--nonsense"),
        (["compare", "--methods", "full,none", "hi"], "none"),
        (["compare", "--picture", "picture.doc", "hi"], "picture.doc"),
        (["methods", "--model-shape", "llama9"], "llama9"),
        (["bench", "decode", "--out", "x.json"], "GPU"),
    ],
)
def test_a_mistake_is_one_clear_line(arguments, named):
    result = minikv(*arguments, JAX_PLATFORMS="cpu")
    assert result.returncode == 2 and result.stdout == ""
    assert named in result.stderr and "Traceback" not in result.stderr and result.stderr.count("\n") == 1


def test_a_pickle_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04]q\x00.")
    result = minikv("generate", "--model", tmp_path, "hi")
    assert result.returncode == 2 and "pickle" in result.stderr


def test_a_prompt_longer_than_the_model_is_refused(tmp_path):
    (tmp_path / "long.txt").write_text("word " * 9000)
    result = minikv("compare", "--prompt-file", tmp_path / "long.txt", "--picture", tmp_path / "picture.png")
    assert result.returncode == 2 and "8192 positions" in result.stderr
    assert not (tmp_path / "picture.png").exists()


def test_methods_are_listed():
    assert [row["method"] for row in json.loads(minikv("methods", "--json").stdout)] == list(presets.METHODS)
    sizes = {row["method"]: row for row in json.loads(minikv("methods", "--model-shape", "llama2-7b", "--json").stdout)}
    assert sizes["minikv"]["mib_without_window"] == 320 and sizes["full"]["mib"] > 2304 - 1
    assert all({"method", "bits_per_element", "mib"} <= row.keys() for row in sizes.values())


def test_a_real_model_answers_in_json_and_saves_a_picture(tmp_path):
    (tmp_path / "text.txt").write_text("The sky is blue and the grass is green. " * 10)
    picture = tmp_path / "pictures" / "cache.png"
    result = minikv(
        "compare", "--methods", "full", "--prompt-file", tmp_path / "text.txt", "--max-new-tokens", 4, "--json",
        "--raw", "--picture", picture, "The capital of France is",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (answer,) = json.loads(result.stdout)
    assert "Paris" in answer["text"] and answer["method"] == "full"
    assert answer["tokens_kept"] == answer["prompt_tokens"] + answer["new_tokens"] - 1
    assert answer["cache_bytes"] > 0 and answer["bits_per_element"] >= 16
    assert picture.read_bytes().startswith(b"\x89PNG")
