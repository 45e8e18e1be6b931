"""How many programs XLA has compiled so far in this process."""

import jax

_compiled: list[str] = []


def _listen(event: str, _seconds: float, **_) -> None:
    if event.endswith("backend_compile_duration"):
        _compiled.append(event)


jax.monitoring.register_event_duration_secs_listener(_listen)


def compilations() -> int:
    return len(_compiled)
