"""Where Triton kernels run, and how they are compiled and kept."""

import dataclasses
import importlib.util
import types
from typing import NamedTuple

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


@dataclasses.dataclass(frozen=True)
class Options:
    sanitize_overflow: bool = True

    def hash(self):
        return str(self)


class Result(NamedTuple):
    binary: str
    name: str
    shared_mem_bytes: int
    ttgir: str | None
    llir: str | None


class FakeTriton:
    """What jax-triton makes of Triton, as far as `triton_call` reaches into it."""

    CompilationResult = Result

    def __init__(self):
        self.knobs = pytest.importorskip("triton").knobs
        self.read, self.compiled = [], 0
        self.code_gen = types.SimpleNamespace(ast_to_ttir=self._read)
        self.compile_ttir_inplace = self._compile
        triton_call._compile_leanly(self)

    def _read(self, fn, source, options, **others):
        self.read.append(options)
        return f"{fn.__name__} in full"

    def _compile(self, module, backend, options, capability, platform):
        self.compiled += 1
        return Result(
            f"{module} for {capability}, lines {not self.knobs.compilation.disable_line_info}", "k", 64, "a", "b"
        )

    def launch(self, source="source", capability=90, module="pallas_kernels.somewhere"):
        """As jax-triton's `get_or_create_triton_kernel` does."""
        fn = types.SimpleNamespace(__name__="kernel", __module__=module)
        made = self.code_gen.ast_to_ttir(fn, types.SimpleNamespace(hash=lambda: source), options=Options(), context=0)
        return str(made), self.compile_ttir_inplace(made, None, Options(), capability, "cuda")


@pytest.fixture
def cache_folder(tmp_path):
    yield from programs_kept_in(tmp_path)


@pytest.fixture
def no_cache_folder():
    yield from programs_kept_in(None)


def programs_kept_in(folder):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", folder and str(folder))
    yield folder
    jax.config.update("jax_compilation_cache_dir", before)


def test_a_kernel_is_compiled_once_for_all_processes(cache_folder):
    first = FakeTriton()
    text, result = first.launch()
    assert text == "" and result[:3] == ("kernel in full for 90, lines False", "k", 64)
    assert first.read == [Options(sanitize_overflow=False)]
    second = FakeTriton()
    assert second.launch() == ("", result._replace(ttgir=None, llir=None)) and not second.read and second.compiled == 0
    for change in ({"source": "another"}, {"capability": 80}):
        other = FakeTriton()
        other.launch(**change)
        assert other.compiled == 1
    (cache_folder / "triton").rename(cache_folder / "gone")
    assert second.launch()[1] == result and second.compiled == 1


def test_a_broken_file_of_the_cache_is_replaced(cache_folder):
    _, result = FakeTriton().launch()
    (file,) = (cache_folder / "triton").iterdir()
    for garbage in ("", "{}", '{"binary": 1, "what": 2}'):
        file.write_text(garbage)
        again = FakeTriton()
        assert again.launch()[1] == result and again.compiled == 1
    assert FakeTriton().launch()[1].binary == result.binary


def test_without_a_cache_folder_every_process_compiles(no_cache_folder):
    for _ in range(2):
        fake = FakeTriton()
        fake.launch()
        assert fake.compiled == 1


def test_kernels_of_others_are_left_alone(cache_folder):
    fake = FakeTriton()
    text, result = fake.launch(module="somebody.elses")
    assert text == "kernel in full" and result.binary.endswith("lines True") and fake.read == [Options()]
    assert not list(cache_folder.iterdir())
