"""Models by name, from a hub on this machine's loopback: what is asked for, and what errors say."""

import json
import threading
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from huggingface_hub import constants

from minikv_jax.errors import CheckpointError, UnsupportedModelError
from minikv_jax.models import load_model, locate, open_checkpoint
from minikv_jax.models.describe import describe
from minikv_jax.models.hf_hub import Remote, parsed

GOLDEN = Path(__file__).parent / "golden"
COMMITS = {"main": "a" * 40, "v2": "b" * 40}


class Hub(BaseHTTPRequestHandler):
    """Repositories in memory, by name; each file is the same in both revisions but README.md."""

    repos: dict[str, dict[str, bytes]]
    asked: list[str]

    def log_message(self, *_):
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        parts = path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        owner, name, verb, revision, *file = parts[2:] if api else [*parts, "", ""]
        repo, commit = f"{owner}/{name}", COMMITS.get(revision, revision if revision in COMMITS.values() else None)
        if owner == "gated":
            return self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="ask first")
        if repo not in self.repos:
            return self.answer(404, X_Error_Code="RepoNotFound", X_Error_Message="none")
        if commit is None:
            return self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="none")
        files = self.repos[repo]
        if api and verb == "tree":
            entries = [
                {"type": "file", "path": x, "size": len(y), "oid": sha1(y).hexdigest()} for x, y in files.items()
            ]
            return self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")
        if api:
            about = {"id": repo, "sha": commit, "siblings": [{"rfilename": x} for x in files]}
            return self.answer(200, json.dumps(about).encode(), Content_Type="application/json")
        content = files.get("/".join(x for x in file if x))
        if content is None:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Error_Message="none")
        if self.command == "GET":
            self.asked.append("/".join(x for x in file if x))
        return self.answer(200, content, ETag=f'"{sha1(content).hexdigest()}"', X_Repo_Commit=commit)

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub, and an empty cache."""
    qwen = {path.name: path.read_bytes() for path in (GOLDEN / "qwen3").iterdir()}
    extra = {"pytorch_model.bin": b"\x80\x04", "consolidated.safetensors": b"0", "modeling_x.py": b"raise SystemExit"}
    extra |= {"original/model-1-of-1.safetensors": b"0", "README.md": b"hello", "tokenizer.json": b"{}"}
    shards = {path.name: path.read_bytes() for path in (GOLDEN / "llama2").iterdir()}
    repos = {
        "us/tiny": qwen | extra,
        "us/sharded": shards,
        "us/bart": {"config.json": b'{"model_type": "bart"}', "model.safetensors": b"large"},
        "us/gguf": {"a.Q8_0.gguf": b"GGUF and so on", "b.gguf": b"other"},
        "us/empty": {"README.md": b""},
    }
    handler = type("TestHub", (Hub,), {"repos": repos, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield handler, server
    server.shutdown()
    server.server_close()


@pytest.mark.promise("A model of the hub comes without pickles, code or copies of its weights, and once")
def test_a_model_by_name_asks_only_for_what_loading_reads(hub, figure):
    handler, _ = hub
    folder = locate("us/tiny")
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")
    }
    assert sorted(handler.asked) == sorted(path.name for path in folder.iterdir())
    found = dict(open_checkpoint(folder).tensors())
    for name, weight in open_checkpoint(GOLDEN / "qwen3").tensors():
        np.testing.assert_array_equal(found[name], weight)
    handler.asked.clear()
    assert load_model("us/tiny").config == open_checkpoint(GOLDEN / "qwen3").config
    assert handler.asked == []
    figure(f"{len(found)} tensors of a repository with ten files, of which four are asked for")


def test_shards_revisions_and_single_files(hub):
    handler, _ = hub
    assert len(list(locate("us/sharded").glob("model-*.safetensors"))) == 3
    assert locate("us/tiny@v2").name == COMMITS["v2"]
    assert locate("us/tiny").name == COMMITS["main"]
    handler.asked.clear()
    assert locate("us/gguf/a.Q8_0.gguf").read_bytes() == b"GGUF and so on"
    assert handler.asked == ["a.Q8_0.gguf"]


def test_a_model_that_cannot_run_is_refused_before_its_weights_are_downloaded(hub):
    handler, _ = hub
    with pytest.raises(UnsupportedModelError, match=r"us/bart: .*of type .bart."):
        locate("us/bart")
    assert handler.asked == ["config.json"]


def test_a_model_of_the_hub_is_described_by_its_config_alone(hub):
    handler, _ = hub
    found, here = describe("us/tiny"), describe(GOLDEN / "qwen3")
    assert (found.config, found.parameters) == (here.config, here.parameters)
    assert (found.stored, handler.asked) == ({}, ["config.json"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("us/none", "knows no such model, or you may not see it"),
        ("us/tiny@v3", r"us/tiny \(revision v3\).*no such revision"),
        ("us/empty", "it has no config.json"),
        ("us/gguf/c.gguf", r"it has no c\.gguf"),
        ("gated/model", "access must be granted"),
    ],
)
def test_what_the_hub_refuses_is_one_clear_line(hub, name, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        locate(name)
    assert "\n" not in str(caught.value)


@pytest.mark.promise("Without a network a model of the hub loads from its cache, or one line says what to do")
def test_without_a_network(hub, monkeypatch):
    _, server = hub
    folder = locate("us/tiny")
    server.shutdown()
    server.server_close()
    assert locate("us/tiny") == folder
    for name in ("us/sharded", "us/gguf/a.gguf"):
        with pytest.raises(CheckpointError, match=r"not in the cache .*cannot be reached.*hf download us/") as caught:
            locate(name)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert locate("us/tiny") == folder
    with pytest.raises(CheckpointError, match="offline mode"):
        locate("us/sharded")


@pytest.mark.parametrize(
    ("name", "remote"),
    [
        ("Qwen/Qwen3-8B", Remote("Qwen/Qwen3-8B", None, None)),
        ("Qwen/Qwen3-8B@refs/pr/1", Remote("Qwen/Qwen3-8B", None, "refs/pr/1")),
        ("a/b-GGUF/q/b-Q4_K_M.gguf@v1", Remote("a/b-GGUF", "q/b-Q4_K_M.gguf", "v1")),
        ("gpt-5", None),
        ("./models/tiny", None),
        ("/models/tiny", None),
        ("../tiny", None),
        ("a/b/c", None),
        ("a/b@", None),
        ("a\n/b", None),
    ],
)
def test_names(name, remote):
    assert parsed(name) == remote


def test_a_path_is_a_path(hub, tmp_path, monkeypatch):
    handler, _ = hub
    (tmp_path / "us" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert locate("us/tiny") == Path("us/tiny")
    assert handler.asked == []
