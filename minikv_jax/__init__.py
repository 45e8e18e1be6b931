"""minikv_jax: LLM KV cache compression in JAX. See README.md for a nine-line example.

The names of `api.py` and the submodules are imported when they are first used: JAX and flax take a second, and
`minikv --help` needs neither.
"""

import importlib
import sys
from types import ModuleType

TYPE_CHECKING = False  # as `typing` has it, which takes time to import
if TYPE_CHECKING:
    from typing import Any

    from minikv_jax.api import *  # noqa: F403

__version__ = "0.2.0"

# Functions that share their module's name.
_FUNCTIONS = ("extend", "generate", "prefill")


class _Package(ModuleType):
    def __setattr__(self, name: str, value: "Any") -> None:
        # The import system puts each submodule here under its name.
        if name in _FUNCTIONS and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> "Any":
    from importlib.util import find_spec

    submodule = f"{__name__}.{name}"
    if find_spec(submodule) is None:
        return getattr(importlib.import_module(f"{__name__}.api"), name)
    importlib.import_module(submodule)
    return getattr(sys.modules[__name__], name)


def __dir__() -> list[str]:
    return [*globals(), *importlib.import_module(f"{__name__}.api").__all__]
