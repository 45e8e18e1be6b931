"""Files that programs write: whether they can be is found out before the work, and they are written in one step."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from minikv_jax.errors import ConfigError
from minikv_jax.extras import require

_PICTURES = (".png", ".svg", ".pdf")


def require_file(path: Path, option: str) -> None:
    """Makes sure that the file `path`, which `option` names, can be written; leaves everything as it was.

    Raises:
        ConfigError: it is a folder, or it, or its folder, cannot be made or written.
    """
    with _explained(path, option):
        if path.is_dir():
            raise ConfigError(f"{option} {path} is a folder: name a file in it.")
        if path.is_file():
            path.open("ab").close()
        elif not path.exists():
            with _folder(path.parent):
                path.open("xb").close()
                path.unlink()


def require_picture(path: Path, option: str) -> None:
    """As `require_file`, for a file whose ending must be that of a kind of picture.

    Raises:
        MissingExtraError: what draws is not installed.
    """
    require("matplotlib", "plot")
    if path.suffix.lower() not in _PICTURES:
        raise ConfigError(f"{option} {path}: the name must end in {', '.join(_PICTURES[:-1])} or {_PICTURES[-1]}.")
    require_file(path, option)


def require_folder(path: Path, option: str) -> None:
    """Makes sure that files can be written into the folder `path`, which `option` names; leaves all as it was.

    Raises:
        ConfigError: it is a file, or it cannot be made or written into.
    """
    with _explained(path, option):
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{option} {path} is a file: name a folder.")
        with _folder(path):
            probe = path / ".writable"
            probe.touch()
            probe.unlink()


@contextlib.contextmanager
def _explained(path: Path, option: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{option} {path} cannot be written ({error.strerror}): name another place.") from None


@contextlib.contextmanager
def _folder(path: Path) -> Iterator[None]:
    """A folder that is there for a while, and its parents."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):  # it could not be made, or holds another process's files by now
                folder.rmdir()


def write_text(path: Path, text: str) -> None:
    """Writes a file, and its folder, in one step: after a full disk or a kill it has its old content or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():  # a device or a pipe
        path.write_text(text, encoding="utf-8")
        return
    with in_one_step(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def in_one_step(path: Path) -> Iterator[Path]:
    """Another file beside `path`, whose folder is made: what is written to it takes the place of `path` at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    target = path.resolve()
    scratch = target.with_name(f".{os.getpid()}.new")
    try:
        yield scratch
        os.replace(scratch, target)
    finally:
        scratch.unlink(missing_ok=True)
