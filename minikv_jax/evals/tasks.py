"""The table of tasks. A new task is a file with a `TASK`, and a line here."""

from minikv_jax.errors import ConfigError
from minikv_jax.evals import kl, layers, lines, longbench, passkey, ruler, running, scbench, shared
from minikv_jax.evals.task import Metric, Task

TASKS: dict[str, Task] = {
    "kl": kl.TASK,
    "running": running.TASK,
    "lines": lines.TASK,
    "shared": shared.TASK,
    "aware": shared.AWARE,
    "passkey": passkey.TASK,
    "needle": passkey.NEEDLE,
    "ruler": ruler.TASK,
    "longbench": longbench.TASK,
    "scbench": scbench.TASK,
    "layers": layers.ERRORS,
    "spread": layers.SPREAD,
    "persistence": layers.PERSISTENCE,
}

METRICS: dict[str, Metric] = {name: metric for task in TASKS.values() for name, metric in task.metrics.items()}


def by_names(names: str) -> dict[str, Task]:
    """Tasks from a comma-separated list.

    Raises:
        ConfigError: an unknown name.
    """
    chosen = [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in TASKS:
            raise ConfigError(f"Unknown task {name!r}: choose from {', '.join(TASKS)}.")
    return {name: TASKS[name] for name in chosen}
