"""Caches come back from files bit for bit, or the file is refused in one line."""

import json
import os

import chex
import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import CONFIG, MODEL, TWO_LAYERS, decode, every, roomy, tokens
from mutate import mutated
from safetensors.numpy import load_file, save_file
from test_tokenizer import write_byte_level

from minikv_jax import (
    CheckpointError,
    ConfigError,
    MiniKVError,
    fork,
    generate,
    load_cache,
    nbytes,
    prefill,
    save,
    saved_tokens,
)
from minikv_jax.models import load_tokenizer
from minikv_jax.models.llama import Llama

COUNTS = np.array([40, 64, 9])


def write(path, method="minikv", **given):
    text = tokens(3, 64)
    _, cache = prefill(MODEL, text, COUNTS, roomy(method))
    save(cache, path, **given)
    return cache, text


def remade(path, change):
    """The file with another manifest."""
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        manifest = json.loads(file.metadata()["minikv_cache"])
    change(manifest)
    save_file(load_file(path), path, {"minikv_cache": json.dumps(manifest)})


@pytest.mark.promise("A cache comes back from a file bit for bit, in at most 1.01 times its bytes and 64 kB")
@pytest.mark.parametrize("method", every("minikv", "mikv", "kivi"))
def test_a_cache_comes_back_bit_for_bit(method, tmp_path):
    path = tmp_path / "folder" / "x.cache"
    cache, text = write(path, method, params=MODEL)
    assert path.stat().st_size <= 1.01 * nbytes(cache) + 64_000
    assert [x.name for x in path.parent.iterdir()] == ["x.cache"]
    back = load_cache(path, MODEL)
    assert jax.tree.structure(back) == jax.tree.structure(cache) and saved_tokens(path) is None
    chex.assert_trees_all_equal_shapes_and_dtypes(back, cache)
    assert all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(*map(jax.tree.leaves, (back, cache))))
    if method == "minikv":
        later = tokens(3, 3)
        np.testing.assert_array_equal(decode(back, later)[0], decode(cache, later)[0])
        save(cache, path, tokens=text)
        np.testing.assert_array_equal(saved_tokens(path), text)
        assert load_cache(path, MODEL).config == cache.config


def test_half_precision_and_small_metadata_are_held_as_bytes(tmp_path):
    path, config = tmp_path / "x.cache", roomy("minikv_plus").replace(dtype="bfloat16")
    _, cache = prefill(MODEL, tokens(3, 64), COUNTS, config)
    save(cache, path)
    back = load_cache(path, nnx.split(MODEL))
    assert {str(x.dtype) for x in jax.tree.leaves(back)} > {"bfloat16", "float8_e4m3fn", "uint8"}
    assert all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(*map(jax.tree.leaves, (back, cache))))


def test_a_cache_of_another_model_tokenizer_or_version_is_refused(tmp_path):
    path = tmp_path / "x.cache"
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    own, other = (load_tokenizer(write_byte_level(tmp_path / x / "t.gguf", "llama-bpe", chat_template=x)) for x in "ab")
    cache, _ = write(path, params=MODEL, tokenizer=own)
    load_cache(path, MODEL, own)
    trained_on = jax.tree.map(lambda x: x, MODEL)
    trained_on.norm.set_value(trained_on.norm[...].at[3].add(1e-6))
    wide = Llama(CONFIG.replace(num_kv_heads=4), rngs=nnx.Rngs(params=0))
    for call, match in [
        (lambda: load_cache(path, trained_on), "another model's weights"),
        (lambda: load_cache(path, MODEL, other), "another model's tokenizer"),
        (lambda: load_cache(tmp_path / "no.cache", MODEL), "no file"),
    ]:
        with pytest.raises(CheckpointError, match=match):
            call()
    save(cache, path)
    short = Llama(CONFIG.replace(max_position_embeddings=64), rngs=nnx.Rngs(params=0))
    for params, match in [(TWO_LAYERS, "only one of both has"), (wide, "at .layers"), (short, "does not fit")]:
        with pytest.raises(CheckpointError, match=match):
            load_cache(path, params)
    whole = path.read_bytes()
    for change, match in [
        (lambda m: m.update(format=2), "format 2, not 1"),
        (lambda m: m["config"]["method"].update(part="Other"), "'Other', which is not known"),
        (lambda m: m["config"]["method"]["codec"].update(key_bits=7), "does not have"),
        (lambda m: m.update(config=3), "its method is 3"),
        (lambda m: m.update(sequences=1 << 40), "claims"),
        (lambda m: m.update(sequences=2), "at .l"),
        (lambda m: m.pop("checksum"), "damaged"),
    ]:
        path.write_bytes(whole)
        remade(path, change)
        with pytest.raises(CheckpointError, match=match):
            load_cache(path, MODEL)
    with pytest.raises(ConfigError, match="fork it again"):
        save(fork(prefill(MODEL, tokens(1, 64), COUNTS[1:2], roomy("minikv"))[1], 2), path)
    with pytest.raises(ConfigError, match="not those of 3"):
        save(cache, path, tokens=tokens(2, 64))
    with pytest.raises(ConfigError, match="fast tokenizer"):
        save(cache, path, tokenizer=object())


def damaged(path, count):
    cache, _ = write(path, "minikv")
    whole, rng, refused = path.read_bytes(), draws.rng(), 0
    header = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(count):
        path.write_bytes(mutated(rng, whole, header))
        try:
            back = load_cache(path, MODEL)
        except MiniKVError as error:
            assert str(error).isprintable() and len(str(error).replace(os.fspath(path), "")) < 900, str(error)
            refused += 1
        else:  # what was damaged says nothing of the arrays
            assert jax.tree.map(jnp.shape, back) == jax.tree.map(jnp.shape, cache)
    return refused


@pytest.mark.promise("A damaged file of a cache is refused in one line, or holds what was saved")
def test_damaged_files_of_caches_are_refused(tmp_path, figure):
    refused = damaged(tmp_path / "x.cache", 200)
    assert refused > 150
    figure(f"200 damaged files: {refused} refused in one line, the others loaded")


def test_a_loaded_cache_goes_on(tmp_path):
    path = tmp_path / "x.cache"
    cache, _ = write(path, "full")
    turn, counts = tokens(3, 4), np.array([4, 2, 3])
    written, _ = generate(MODEL, turn, counts, cache, 4)
    np.testing.assert_array_equal(generate(MODEL, turn, counts, load_cache(path, MODEL), 4)[0], written)
