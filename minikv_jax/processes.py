"""Processes that threads wait for, and that end with the context they belong to."""

import contextlib
import subprocess
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor


class Workers(ThreadPoolExecutor):
    """Threads whose context, left by an exception, ends their processes and begins nothing that still waits."""

    def __init__(self, count: int | None = None):
        super().__init__(count)
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen] | None = set()  # None: no more

    @contextlib.contextmanager
    def process(self, command: Sequence[str], **options) -> Iterator[subprocess.Popen]:
        """A process for the time of a context, as `subprocess.Popen`."""
        with contextlib.ExitStack() as stack:
            with self._lock:
                if self._running is None:
                    raise RuntimeError("The context of these processes has been left.")
                process = stack.enter_context(subprocess.Popen(command, **options))
                self._running.add(process)
            try:
                yield process
            finally:
                process.kill()  # if it still runs
                with self._lock:
                    if self._running is not None:
                        self._running.discard(process)

    def __exit__(self, kind, *error) -> bool | None:
        if kind is not None:
            self.shutdown(wait=False, cancel_futures=True)
            with self._lock:
                running, self._running = self._running or set(), None
            for process in running:
                process.kill()
        return super().__exit__(kind, *error)
