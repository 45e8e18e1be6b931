"""How this package's programs begin and end: `run`.

The module imports nothing heavy, so that signals are met from the first moment on.
"""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn, cast

from minikv_jax.errors import MiniKVError

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
# In errors of JAX: too little memory, no such device.
_OF_THE_DEVICE = ("RESOURCE_EXHAUSTED", "Out of memory", "Unable to initialize backend")
_LONGEST = 1200  # characters of a message: its beginning says what was given, its end what to do


class Stopped(KeyboardInterrupt):
    """A signal asked the program to end."""


class OutputError(Exception):
    """Standard output takes nothing more, because of its cause."""


class _Output(io.TextIOWrapper):
    """Standard output whose errors are told from those of files and other pipes."""

    def write(self, text: str) -> int:
        with self._named():
            return super().write(text)

    def flush(self) -> None:
        with self._named():
            super().flush()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError from error


def run(program: Callable[[], int | None]) -> NoReturn:
    """Runs a program and ends the process.

    The exit code is 0 or what the program returned; 2 after one line on standard error about what the program's user
    can mend; 1 after a traceback for a mistake in the program; 128 + n, without a word, after signal n, and 141, which
    is that of SIGPIPE, where the reader of the output has left.
    """
    received = _watch_signals()
    if sys.stdout is None:
        _leave(_complain("Standard output is closed: give the program something to write to."))
    _fill_descriptors()
    out = cast(io.TextIOWrapper, sys.stdout)
    # Characters that the locale does not have are written as Python writes them.
    sys.stdout = _Output(out.buffer, out.encoding, "backslashreplace", None, out.line_buffering, out.write_through)
    try:
        try:
            code = program() or 0
        finally:
            sys.stdout.flush()
    except BaseException as error:
        code = 128 + received[0] if received else _code_of(error)
        if code is None:
            raise
    _leave(code)


def _watch_signals() -> list[int]:
    """Lets signals raise `Stopped`; returns the list that those received are added to."""
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        # C extensions print an exception that comes while they are imported, or turn it into another. Nothing is in
        # work then but the import.
        if _is_import(frame):
            _show_cursor()
            os._exit(128 + number)
        raise Stopped

    def unraisable(ignored: "sys.UnraisableHookArgs") -> None:
        # What is raised in a callback of the garbage collector, as JAX has one, goes nowhere: once more in a moment.
        if isinstance(ignored.exc_value, Stopped):
            signal.setitimer(signal.ITIMER_REAL, 0.01)
        else:
            sys.__unraisablehook__(ignored)

    for number in (*_SIGNALS, signal.SIGALRM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, stop)
    sys.unraisablehook = unraisable
    return received


def _is_import(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _show_cursor() -> None:
    """A progress bar may have hidden it."""
    if os.isatty(2):
        os.write(2, b"\x1b[?25h")


def _fill_descriptors() -> None:
    """Opens standard descriptors that are closed: files would get their numbers, and what libraries print."""
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(spare)


def _code_of(error: BaseException) -> int | None:
    """The exit code, after a message if one is due; None: the error is a mistake in the program."""
    if isinstance(error, OutputError):
        _silence(1)
        if isinstance(error.__cause__, BrokenPipeError):
            return 128 + signal.SIGPIPE
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else None
    message = _message(error)
    return None if message is None else _complain(message)


def _message(error: BaseException) -> str | None:
    """What to tell the user; None for mistakes that are not the user's to mend."""
    if isinstance(error, MiniKVError):
        return str(error)
    if isinstance(error, OutputError):
        return f"The output cannot be written: {getattr(error.__cause__, 'strerror', None)}."
    if isinstance(error, OSError) and error.strerror and not isinstance(error, BrokenPipeError):
        return f"{error.filename}: {error.strerror}." if error.filename is not None else f"{error.strerror}."
    if isinstance(error, MemoryError):
        return f"Out of memory. {error}".strip()
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _OF_THE_DEVICE):
        return f"JAX: {str(error).partition(chr(10))[0]}"
    return None


def _complain(message: str) -> int:
    """Writes one line of printable characters on standard error, and returns the exit code 2."""
    line = " ".join(message.split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    if len(line) > _LONGEST:
        line = f"{line[: 2 * _LONGEST // 3]} [...] {line[-_LONGEST // 3 :]}"
    if sys.stderr is not None:
        try:
            print(f"minikv: {line}", file=sys.stderr, flush=True)
        except OSError:  # there is nobody to tell
            _silence(2)
    return 2


def _silence(descriptor: int) -> None:
    """Python flushes once more at exit: into nothing."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def _leave(code: int) -> NoReturn:
    """Ends the process; a signal that comes meanwhile ends it at once."""
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: os._exit(code))
    sys.exit(code)
