"""How many programs XLA has compiled so far in this process."""

import itertools

import jax

_counter = itertools.count(1)
_compiled = [0]


def _listen(event: str, _seconds: float, **_) -> None:
    if event.endswith("backend_compile_duration"):
        _compiled[0] = next(_counter)


jax.monitoring.register_event_duration_secs_listener(_listen)


def compilations() -> int:
    return _compiled[0]
