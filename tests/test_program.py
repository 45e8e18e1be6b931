"""How programs begin and end: signals, outputs that take nothing, and what becomes of exceptions."""

import io
import os
import signal
import subprocess
import sys
import types

import pytest

from minikv_jax import __main__, cli, program

BEGIN = "import gc, os, signal, sys, time\nfrom minikv_jax import program\nfrom minikv_jax.errors import ConfigError\n"


def ended(code, shell='"$@"', **environment):
    """A program of these lines, run by a shell that may close or redirect what it likes."""
    program = BEGIN + "def main():\n" + "".join(f"    {line}\n" for line in code) + "program.run(main)\n"
    command = ["bash", "-c", shell, "bash", sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "shell, code, said",
    [
        ('"$@" > /dev/full', 2, "minikv: The output cannot be written: No space left on device.\n"),
        ('"$@" >&-', 2, "minikv: Standard output is closed: give the program something to write to.\n"),
        ('"$@" | true; exit ${PIPESTATUS[0]}', 128 + signal.SIGPIPE, ""),
        ('"$@" <&- 2>&-', 0, ""),
    ],
)
def test_an_output_that_takes_nothing_ends_in_a_line_at_most(shell, code, said, unbuffered):
    lines = ["time.sleep(0.05)", "print('x' * 100_000)", "print('y')"]
    result = ended(lines, shell, PYTHONUNBUFFERED=unbuffered)
    assert (result.returncode, result.stderr) == (code, said)


def test_a_message_that_nobody_can_read_changes_no_exit_code():
    for shell in ('"$@" 2> /dev/full', '"$@" 2>&-'):
        result = ended(["raise ConfigError('no')"], shell)
        assert (result.returncode, result.stdout, result.stderr) == (2, "", "")


def test_what_the_locale_lacks_is_written_as_python_writes_it():
    result = ended([r"print('caf\u00e9 \U0001f600 \udcff')"], PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stdout) == (0, "caf\\xe9 \\U0001f600 \\udcff\n")


@pytest.mark.parametrize(
    "line, code, said",
    [
        ("return None", 0, ""),
        ("return 1", 1, ""),
        ("sys.exit(3)", 3, ""),
        ("raise ConfigError('two\\nlines, \\x1b[31m, \\ud800')", 2, "minikv: two lines, \\x1b[31m, \\ud800\n"),
        ("open('no/such')", 2, "minikv: no/such: No such file or directory.\n"),
        ("os.write(9, b'')", 2, "minikv: Bad file descriptor.\n"),
        ("raise MemoryError('Unable to allocate 9 TiB')", 2, "minikv: Out of memory. Unable to allocate 9 TiB\n"),
        ("raise RuntimeError('RESOURCE_EXHAUSTED: no\\nmore')", 2, "minikv: JAX: RESOURCE_EXHAUSTED: no\n"),
        ("raise KeyboardInterrupt", 130, ""),
    ],
)  # fmt: skip
def test_what_a_user_can_mend_is_one_line(line, code, said):
    result = ended([line])
    assert (result.returncode, result.stdout, result.stderr) == (code, "", said)


@pytest.mark.parametrize("line", ["1 / 0", "sys.exit('why')", "raise BrokenPipeError(32, 'of a child')"])
def test_a_mistake_of_ours_keeps_its_traceback(line):
    result = ended([line])
    assert result.returncode == 1 and ("Traceback" in result.stderr or result.stderr == "why\n")


def test_a_long_message_keeps_its_beginning_and_its_end():
    result = ended(["raise ConfigError('begin ' + 'x' * 10**6 + ' end')"])
    assert len(result.stderr) < 1300 and result.stderr.startswith("minikv: begin") and result.stderr.endswith(" end\n")


SEND = "os.kill(os.getpid(), signal.SIGINT)"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_program_without_a_word(number):
    result = ended([f"os.kill(os.getpid(), {int(number)})", "time.sleep(60)"])
    assert (result.returncode, result.stderr) == (128 + number, "")


@pytest.mark.parametrize(
    "lines",
    [
        # Python throws away what a callback of its garbage collector raises.
        [f"gc.callbacks.append(lambda *_: not seen and not seen.append(1) and {SEND})", "gc.collect()"],
        # A library makes another exception of it.
        ["try:", f"    {SEND}", "    time.sleep(60)", "except BaseException:", "    raise ImportError('x') from None"],
        # It comes while a module is imported.
        ["open('slow_module.py', 'w').write('import time; time.sleep(60)')", "sys.path.insert(0, '.')",
         "signal.alarm(1)", "import slow_module"],
    ],
    ids=["collector", "converted", "import"],
)  # fmt: skip
def test_a_signal_is_not_lost(lines, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    wait = ["for _ in range(600):", "    time.sleep(0.1)"] if "gc." in lines[0] else []
    result = ended(["seen = []", *lines, *wait])
    number = signal.SIGALRM if "signal.alarm(1)" in lines else signal.SIGINT
    assert (result.returncode, result.stderr) == (128 + number, "")


def test_other_exceptions_that_python_ignores_are_still_told():
    result = ended(["class X:", "    def __del__(self): 1 / 0", "X()"])
    assert result.returncode == 0 and "ZeroDivisionError" in result.stderr


def test_an_ignored_signal_stays_ignored():
    result = ended(["os.kill(os.getpid(), signal.SIGHUP)", "print('alive')"], "trap '' HUP; \"$@\"")
    assert (result.returncode, result.stdout) == (0, "alive\n")


def test_cleaning_up_comes_before_the_end():
    lines = ["try:", f"    {SEND}", "    time.sleep(60)", "finally:", "    print('clean')"]
    result = ended(lines)
    assert (result.returncode, result.stdout, result.stderr) == (130, "clean\n", "")


# ---- the same in this process, whose handlers, output and descriptors are put aside ---------------------------------


class Full(io.RawIOBase):
    def writable(self):
        return True

    def fileno(self):
        return 1

    def write(self, data):
        raise OSError(self.number, os.strerror(self.number))

    number = 28


@pytest.fixture
def inside(monkeypatch):
    """Runs a program in this process: exit code, output, and the handlers that it installed."""
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(signal, "getsignal", lambda number: handlers.get(number, signal.SIG_DFL))
    monkeypatch.setattr(signal, "setitimer", lambda *timer: handlers.setdefault("timers", []).append(timer))
    monkeypatch.setattr(os, "dup2", lambda source, target: handlers.setdefault("silenced", []).append(target))
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)

    def run(main, raw=None):
        raw = io.BytesIO() if raw is None else raw
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(raw), "utf-8"))
        with pytest.raises(SystemExit) as ended:
            program.run(lambda: main(handlers))
        return ended.value.code, handlers

    return run


def test_the_end_of_a_program_step_by_step(inside, monkeypatch, capfd):
    assert inside(lambda handlers: print("text"))[0] == 0

    def interrupted(handlers):
        # Python ignores the first, and tells the program of it.
        try:
            handlers[signal.SIGTERM](signal.SIGTERM, sys._getframe())
        except program.Stopped as stopped:
            sys.unraisablehook(types.SimpleNamespace(exc_value=stopped))
        handlers[signal.SIGALRM](signal.SIGALRM, sys._getframe())

    code, handlers = inside(interrupted)
    assert code == 128 + signal.SIGTERM and handlers["timers"] == [(signal.ITIMER_REAL, 0.01)]
    for number, expected in ((28, 2), (32, 128 + signal.SIGPIPE)):
        full = Full()
        full.number = number
        code, handlers = inside(lambda _: print("x" * 100_000), full)
        assert code == expected and handlers["silenced"][-1] == 1
    assert "No space left" in capfd.readouterr().err

    left = []
    monkeypatch.setattr(os, "_exit", lambda code: left.append(code))
    frame = types.SimpleNamespace(
        f_code=types.SimpleNamespace(co_filename="<frozen importlib._bootstrap>"), f_back=None
    )
    code, handlers = inside(lambda handlers: handlers[signal.SIGINT](signal.SIGINT, frame))
    assert code == 130 and left == [130]
    handlers[signal.SIGINT](signal.SIGINT, None)  # while Python shuts down
    assert left == [130, 130]
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SystemExit) as ended:
        program.run(lambda: 0)
    assert ended.value.code == 2


def test_a_mistake_of_ours_leaves_as_it_is(inside, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))
    with pytest.raises(ZeroDivisionError):
        program.run(lambda: 1 // 0)
    told = []
    monkeypatch.setattr(sys, "__unraisablehook__", told.append)
    sys.unraisablehook(types.SimpleNamespace(exc_value=ValueError()))
    assert len(told) == 1


def test_the_way_in_watches_signals_before_anything_is_imported(monkeypatch):
    handlers, ran, left = {}, [], []
    monkeypatch.setattr(__main__._signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(program, "run", lambda main: ran.append(main()))
    monkeypatch.setattr(cli, "main", lambda: 7)
    monkeypatch.setattr(os, "_exit", left.append)
    __main__.main()
    handlers[signal.SIGTERM](signal.SIGTERM, None)
    assert ran == [7] and left == [128 + signal.SIGTERM] and set(handlers) == {signal.SIGINT, signal.SIGTERM}
