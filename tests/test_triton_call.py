"""Where Triton kernels run, and compiled ones in JAX's persistent cache: with stand-ins for jax-triton."""

import dataclasses
import importlib.util
import types

import jax
import pytest

from pallas_kernels import triton_call


@pytest.mark.parametrize(("capability", "runs"), [("7.5", False), ("8.0", True), ("12.0", True)])
def test_kernels_run_from_ampere_on(monkeypatch, capability, runs):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(compute_capability=capability)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    reason = triton_call.decline()
    assert reason is None if runs else "from Ampere on" in reason and capability in reason


@dataclasses.dataclass
class Result:
    binary: str
    name: str


class Compiler:
    """Counts what it compiles."""

    def __init__(self):
        self.compiled = []
        front = types.SimpleNamespace(ast_to_ttir=lambda fn, source, *, options, context: f"module of {source.text}")
        self.library = types.SimpleNamespace(
            code_gen=front, compile_ttir_inplace=self.compile, CompilationResult=Result
        )
        triton_call._keep_compiled(self.library, "versions 1")

    def compile(self, module, backend):
        self.compiled.append(module)
        return Result(f"program of {module} for {backend}", "kernel")

    def get(self, text: str, option: str = "4 warps") -> tuple[str, Result]:
        source = types.SimpleNamespace(text=text, hash=lambda: text)
        options = types.SimpleNamespace(hash=lambda: option)
        module = self.library.code_gen.ast_to_ttir(None, source, options=options, context=None)
        return str(module), self.library.compile_ttir_inplace(module, "sm90")


@pytest.fixture
def cache(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    jax.config.update("jax_compilation_cache_dir", before)


def test_a_later_process_finds_what_an_earlier_one_compiled(cache):
    first = Compiler().get("a")
    later = Compiler()
    assert later.get("a") == first == ("module of a", Result("program of module of a for sm90", "kernel"))
    assert not later.compiled
    assert later.get("b") != first and later.get("a", "8 warps") == first
    assert len(later.compiled) == 2  # another kernel, and other options, are programs of their own


def test_a_broken_file_is_compiled_and_written_again(cache):
    Compiler().get("a")
    (file,) = (cache / "triton_kernels").iterdir()
    for text in ("", "{}", '{"text": "x", "compiled": {"more": 1}}', "[]"):
        file.write_text(text)
        again = Compiler()
        again.get("a")
        assert len(again.compiled) == 1
    assert [*(cache / "triton_kernels").iterdir()] == [file]


@pytest.mark.parametrize("folder", [None, "gs://bucket/cache", "/proc/nothing can be made here"])
def test_without_a_folder_to_write_to_kernels_are_compiled(cache, folder):
    jax.config.update("jax_compilation_cache_dir", folder)
    for _ in range(2):
        compiler = Compiler()
        assert compiler.get("a")[1].name == "kernel" and len(compiler.compiled) == 1
