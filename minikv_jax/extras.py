"""What comes with an extra of the package, named where it is missing."""

import importlib.util

from minikv_jax.errors import MissingExtraError


def require(package: str, extra: str) -> None:
    """Makes sure that a package is there which this one's extra brings.

    Raises:
        MissingExtraError: it is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise MissingExtraError(
            f"{package} is not installed: it comes with an extra, pip install 'minikv-jax[{extra}]'."
        )
