"""Turns what goes wrong inside a tokenizer into errors for people."""

from collections.abc import Iterator
from contextlib import contextmanager

from minikv_jax.errors import CheckpointError, MiniKVError
from minikv_jax.models.wording import one_line


@contextmanager
def refusing(message: str, *others: type[Exception]) -> Iterator[None]:
    """Raises CheckpointError with `message` for every error of the Rust library `tokenizers`, and for `others`.

    That library raises plain Exception for files it refuses, and a BaseException of its own where its code fails
    outright, at load or at any later call. KeyboardInterrupt and SystemExit pass, as does all else.
    """
    try:
        yield
    except MiniKVError:
        raise
    except BaseException as error:
        if not (type(error) is Exception or _is_panic(error) or isinstance(error, others)):
            raise
        raise CheckpointError(f"{message} ({one_line(error)}).") from error


def _is_panic(error: BaseException) -> bool:
    """Each library that is built with PyO3 has a PanicException of its own, and exports it nowhere."""
    return (type(error).__module__, type(error).__name__) == ("pyo3_runtime", "PanicException")
