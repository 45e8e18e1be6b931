"""Loading takes little more memory than the weights and little more time than reading them, whatever a header says."""

import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from memory import peak_growth
from safetensors.numpy import save_file
from test_weights import LAYER, gguf_tensors, model_config, write_gguf

from minikv_jax.errors import MiniKVError
from minikv_jax.models import open_checkpoint

MIB = 1 << 20


def text(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key.encode()) + struct.pack("<I", kind) + value


def gguf(tensors: int, pairs: int, body: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + body


def array(item: int, count: int, body: bytes = b"") -> bytes:
    return pair("k", 9, struct.pack("<IQ", item, count) + body)


def tensor(name: bytes) -> bytes:
    return text(name) + struct.pack("<IQIQ", 1, 0, 0, 0)


def safetensors(header: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header


def entries(count: int, entry: dict) -> bytes:
    return json.dumps({f"t{i}": entry for i in range(count)}).encode()


ZERO = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


def many(count: int, item) -> bytes:
    return b"".join(item(i) for i in range(count))


LONG_LIST = model_config() | {"eos_token_id": [1] * 200_000}
SHARDS = {"weight_map": {f"t{i}": f"s{i}" for i in range(20_000)}}
# For each file, what makes its first bytes, and how far zeros follow.
HOSTILE = {
    "model.safetensors": {
        "header of 100 MB": (lambda: safetensors(b"{", 100 * MIB), 101 * MIB),
        "header of 2^63 bytes": (lambda: safetensors(b"{", 2**63), 0),
        "header of empty lists": (lambda: safetensors(b'{"a":[' + b"[]," * 600_000 + b"[]]}"), 0),
        "header of short lists": (lambda: safetensors(b'{"a":[' + b"[]," * 130_000 + b"[]]}"), 0),
        "header of short objects": (lambda: safetensors(b'{"a":[' + b'{"b":1},' * 87_000 + b"{}]}"), 0),
        "header of nested lists": (lambda: safetensors(b"[" * 200_000), 0),
        "header of nested objects": (lambda: safetensors(b'{"a":' * 200_000), 0),
        "header of one text": (lambda: safetensors(b'{"a":"' + b"x" * (2 * MIB - 20) + "😀".encode() + b'"}'), 0),
        "header of one number": (lambda: safetensors(b'{"a":' + b"9" * (2 * MIB - 20) + b"}"), 0),
        "header of 25,000 tensors": (lambda: safetensors(entries(25_000, ZERO)), 0),
    },
    "config.json": {
        "config.json of 100 MB": (lambda: b"{", 100 * MIB),
        "config.json of nested lists": (lambda: b'{"model_type":' + b"[" * 200_000, 0),
        "config.json of a long list": (lambda: json.dumps(LONG_LIST).encode(), 0),
    },
    "model.safetensors.index.json": {
        "index of 100 MB": (lambda: b"{", 100 * MIB),
        "index of 20,000 shards": (lambda: json.dumps(SHARDS).encode(), 0),
    },
    "m.gguf": {
        "2^60 tensors": (lambda: gguf(2**60, 0), 0),
        "2^60 entries": (lambda: gguf(0, 2**60), 0),
        "a million entries": (lambda: gguf(0, 10**6), 33 * MIB),
        "16,384 entries": (lambda: gguf(0, 1 << 14, many(1 << 14, lambda i: pair(f"{i}", 0, b"\0"))), 0),
        "16,384 tensors": (lambda: gguf(1 << 14, 0, many(1 << 14, lambda i: tensor(b"%d" % i))), 0),
        "names of 1,024 bytes": (lambda: gguf(1 << 13, 0, many(1 << 13, lambda i: tensor(b"%01024d" % i))), 0),
        "a name of 32 MB": (lambda: gguf(0, 1, struct.pack("<Q", 32 * MIB)), 33 * MIB),
        "a text of 32 MB": (
            lambda: gguf(0, 1, pair("general.architecture", 8, struct.pack("<Q", 32 * MIB))),
            33 * MIB,
        ),
        "a list of 2^60 numbers": (lambda: gguf(0, 1, array(4, 2**60)), 0),
        "a list of 32 MB of numbers": (lambda: gguf(0, 1, array(0, 32 * MIB)), 33 * MIB),
        "a list of 2^62 texts": (lambda: gguf(0, 1, array(8, 2**62)), 0),
        "a list of 4 million empty texts": (lambda: gguf(0, 1, array(8, 1 << 22)), 33 * MIB),
        "a list of a million short texts": (lambda: gguf(0, 1, array(8, 1 << 20, text(b"ab") * (1 << 20))), 0),
    },
}


@pytest.mark.promise("A hostile header takes neither time nor memory")
@pytest.mark.parametrize(("file", "name"), [(file, name) for file, cases in HOSTILE.items() for name in cases])
def test_a_hostile_header_is_refused_at_once_and_in_little_memory(tmp_path, file, name, figure):
    first, size = HOSTILE[file][name]
    start = first()
    config = json.dumps(model_config())
    for other, content in (("config.json", config), ("model.safetensors.index.json", "{}")):
        (tmp_path / other).write_text(content)
    (tmp_path / file).write_bytes(start)
    os.truncate(tmp_path / file, max(size, len(start)))
    with peak_growth() as growth:
        began = time.process_time()
        with pytest.raises(MiniKVError) as caught:
            open_checkpoint(tmp_path / file if file == "m.gguf" else tmp_path)
        took = time.process_time() - began
    assert took < 1
    assert growth.bytes < max(size, len(start)) + 32 * MIB
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600
    figure(f"{name}: {took * 1e3:.0f} ms, {growth.bytes / MIB:.0f} MiB")


MEASURE = """
import json, math, sys, time
import jax, numpy as np
from memory import peak_growth
from minikv_jax.models import load_model, open_checkpoint
from minikv_jax.models.checkpoint import parameter_shapes

def cpu(call):
    began = time.process_time()
    call()
    return time.process_time() - began

def read(path, dtype):
    for _ in open_checkpoint(path).tensors(dtype):
        pass

tiny, *paths = sys.argv[1:]
load_model(tiny)
for path, dtype in zip(paths, (np.float32, jax.numpy.bfloat16)):
    weights = sum(math.prod(s) for _, s in parameter_shapes(open_checkpoint(path).config)) * np.dtype(dtype).itemsize
    opening, reading = cpu(lambda: open_checkpoint(path)), cpu(lambda: read(path, dtype))
    with peak_growth() as growth:
        loading = cpu(lambda: load_model(path, dtype))
    print(json.dumps([weights, growth.bytes, opening, reading, loading]))
"""


def large_model() -> tuple[dict, dict[str, np.ndarray]]:
    """52 million weights: 206 MB in float32."""
    d, f, v, layers = 1024, 1536, 4096, 6
    config = model_config() | {"vocab_size": v, "hidden_size": d, "intermediate_size": f, "num_hidden_layers": layers}
    config |= {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64}
    shapes = [(d,), (d,), (d, d), (256, d), (256, d), (d, d), (f, d), (f, d), (d, f)]
    state = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,), "lm_head.weight": (v, d)}
    for i in range(layers):
        state |= {f"model.layers.{i}.{name}": shape for name, shape in zip(LAYER, shapes, strict=True)}
    numbers = np.arange(-64, 64, dtype=np.float32) / 32
    return config, {name: np.resize(numbers, shape) for name, shape in state.items()}


@pytest.mark.promise(
    "Loading takes at most 1.3 times the memory of the weights and 200 MB, and 1 s beside reading them"
)
def test_loading_takes_the_memory_of_the_weights_and_the_time_of_reading_them(tmp_path, figure):
    config, state = large_model()
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({name: w.astype(ml_dtypes.bfloat16) for name, w in state.items()}, tmp_path / "model.safetensors")
    write_gguf(tmp_path / "m.gguf", config, gguf_tensors(config, state), GGMLQuantizationType.Q8_0)
    here = Path(__file__).parent
    paths = [here / "golden" / "llama2", tmp_path, tmp_path / "m.gguf"]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE, *map(os.fspath, paths)],
        capture_output=True,
        text=True,
        check=False,
        cwd=here.parent,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([os.fspath(here), os.fspath(here.parent)])},
    )
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(rows) == 2
    for weights, growth, opening, reading, loading in rows:
        assert growth < 1.1 * weights + 48 * MIB
        assert opening < 1
        assert loading < 1 + 2 * reading
    ratios = [growth / weights for weights, growth, *_ in rows]
    figure(f"{ratios[0]:.2f} times 206 MB (safetensors), {ratios[1]:.2f} times 103 MB (GGUF)")
