"""`minikv`, and `python -m minikv_jax`: the way to `cli.py`, whose imports take time in which signals may come."""

# What `signal` is made of, without its enums, whose import takes as long as Python's own start.
import _signal  # pyright: ignore[reportMissingImports]  # no stub has it
import os


def main() -> None:
    """Runs the program of the command line."""
    for number in (_signal.SIGINT, _signal.SIGTERM):
        if _signal.getsignal(number) != _signal.SIG_IGN:  # as under nohup
            _signal.signal(number, lambda number, _: os._exit(128 + number))
    from minikv_jax.program import run

    run(_program)


def _program() -> int:
    from minikv_jax import cli

    return cli.main()


if __name__ == "__main__":
    main()
