"""A study spread over processes, for compiling takes a processor longer than a GPU takes to measure.

One process for each job loads the model and measures what it is given: one task under a few methods that share a
program. The first process hands that out, the study's first pieces first, preferably to a worker that has compiled the
program before. It alone writes to the run's folder, so a run may be cut off and go on as any other.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

from minikv_jax.bench.timing import environment
from minikv_jax.config import CacheConfig
from minikv_jax.errors import MiniKVError
from minikv_jax.evals import run, store
from minikv_jax.evals.known import FULL, with_full
from minikv_jax.evals.task import Lab, Settings
from minikv_jax.evals.tasks import TASKS

# Methods of one order. Each order reads its prompts and the full cache once more.
_TOGETHER = 6


@dataclasses.dataclass(frozen=True)
class Order:
    """One task under methods of one program."""

    piece: str
    title: str
    methods: Mapping[str, CacheConfig]
    settings: Settings
    program: CacheConfig


def orders(piece: str, titles: Sequence[str], methods: Mapping[str, CacheConfig], settings: Settings) -> list[Order]:
    """A piece of a study as orders, task by task."""
    programs: dict[CacheConfig, list[str]] = {}
    methods = with_full(methods)
    for label, config in methods.items():
        programs.setdefault(config.program, []).append(label)
    found = []
    for title in titles:
        groups = programs.items() if TASKS[title].compares else [(methods[FULL].program, [FULL])]
        for program, labels in groups:
            for i in range(0, len(labels), _TOGETHER):
                mine = {label: methods[label] for label in labels[i : i + _TOGETHER]}
                found.append(Order(piece, title, mine, settings, program))
    return found


def run_orders(
    todo: Sequence[Order],
    jobs: int,
    load: Callable[[], tuple[Any, Any]],
    name: str,
    out: Path,
    command: str,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict]:
    """As `run.run`, in `jobs` processes.

    Args:
        todo: most important first; all of one seed and split.
        jobs: processes.
        load: gives model and tokenizer; is pickled.
        name, out, command: as in `run.run`.
        progress: called with (finished, all) orders.

    Raises:
        ConfigError: as `run.run`.
        MiniKVError: some orders failed; what was measured is written all the same.
    """
    items = run.held(out, name, todo[0].settings)
    store.begin(out, run.identity(name, todo[0].settings))
    waiting, failures, finished, about = list(todo), [], 0, None
    with _workers(min(jobs, len(todo)), load) as workers:
        seen: dict[Connection, set[CacheConfig]] = {worker: set() for worker in workers}
        busy: dict[Connection, Order] = {}
        try:
            while waiting or busy:
                for worker in [w for w in seen if w not in busy][: len(waiting)]:
                    order = busy[worker] = _chosen(waiting, seen[worker])
                    waiting.remove(order)
                    seen[worker].add(order.program)
                    with contextlib.suppress(BrokenPipeError):  # it has ended, as its end of the pipe will say
                        worker.send((order, run.keys(items)))
                if not busy:
                    failures.append("no process is left")
                    break
                for worker in cast(list[Connection], wait(list(busy))):
                    try:
                        new, error, seen_by = worker.recv()
                        about = seen_by or about
                    except EOFError:
                        new, error = None, "the process ended"
                        del seen[worker]
                    if error is not None:
                        failures.append(f"{busy[worker].title} under {', '.join(busy[worker].methods)}: {error}")
                    if new is None:
                        del busy[worker]
                        finished += 1
                        if progress is not None:
                            progress(finished, len(todo))
                    elif new:
                        store.add(out, new)
                        items += new
        except KeyboardInterrupt:
            run.write(out, items, name, command, about)
            raise
    rows = run.write(out, items, name, command, about)
    if failures:
        raise MiniKVError(f"Not measured: {'; '.join(failures)}")
    return rows


def _chosen(waiting: Sequence[Order], seen: set[CacheConfig]) -> Order:
    """Of the first piece that waits, an order whose program the worker has, or else the first."""
    piece = waiting[0].piece
    return next((order for order in waiting if order.piece == piece and order.program in seen), waiting[0])


@contextlib.contextmanager
def _workers(count: int, load: Callable[[], tuple[Any, Any]]) -> Iterator[list[Connection]]:
    """Processes that measure orders, ended when the context is left, at once if need be."""
    context = multiprocessing.get_context("spawn")
    connections, processes = [], []
    with (
        tempfile.TemporaryDirectory() as compiled,
        _environment(
            # They share the device's memory, and what each has compiled.
            XLA_PYTHON_CLIENT_PREALLOCATE="false",
            JAX_COMPILATION_CACHE_DIR=os.environ.get("JAX_COMPILATION_CACHE_DIR", compiled),
        ),
    ):
        try:
            for _ in range(count):
                mine, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, load), daemon=True)
                process.start()
                theirs.close()
                connections.append(mine)
                processes.append(process)
            yield connections
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Variables that processes started in the context get."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(connection: Connection, load: Callable[[], tuple[Any, Any]]) -> None:
    """Answers orders with items as they come, as (items, error, where); (None, ...) ends an order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process decides
    loaded, about = None, None
    while (received := _received(connection)) is not None:
        order, done = received
        try:
            loaded, about = loaded or load(), about or environment()
            lab = Lab(*loaded, order.settings)
            for new in run.measured(lab, order.title, order.methods, done):
                connection.send((new, None, about))
            connection.send((None, None, about))
        except MiniKVError as error:
            connection.send((None, str(error), about))
        except Exception as error:  # whatever it is, other orders can go on
            traceback.print_exc(file=sys.stderr)
            connection.send((None, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", about))


def _received(connection: Connection) -> tuple[Order, run.Done] | None:
    """What the first process sends next; None where it is gone."""
    try:
        return connection.recv()
    except EOFError:
        return None
