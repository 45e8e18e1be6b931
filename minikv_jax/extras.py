"""What comes with an extra of the package, named where it is missing."""

from collections.abc import Iterator
from contextlib import contextmanager

from minikv_jax.errors import MissingExtraError


@contextmanager
def of_extra(name: str) -> Iterator[None]:
    """For imports of packages that the extra `name` of this package brings.

    Raises:
        MissingExtraError: one of them is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{error.name} is not installed: it comes with an extra, pip install 'minikv-jax[{name}]'."
        ) from None
