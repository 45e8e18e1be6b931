"""The shapes and dtypes that annotations of the core claim, checked in every call that a test makes.

jaxtyping's import hook would check the fields of dataclasses too, which are pytrees: JAX fills them with anything that
stands for an array. So functions and methods alone are wrapped here. The functions a user calls are left out, for they
take what they refuse themselves.
"""

import functools
import importlib
import inspect
import pkgutil
import sys
from types import ModuleType

import beartype
import jaxtyping

CHECKED = (
    *(
        f"minikv_jax.{name}"
        for name in [
            *("allocate", "append", "basis", "block", "cache", "choose", "codec", "compress", "evict"),
            *("inflow", "latent", "merge", "rank", "ring", "tova", "reading", "report", "segments"),
            *("channels", "newest", "sharing"),
            *("models.latent", "models.llama", "models.mixture", "models.shared"),
        ]
    ),
    "pallas_kernels",
)


def check_annotations() -> int:
    """Wraps the functions of the core wherever they are known by name, and says how many there are."""
    wrapped = {}
    for module in _modules():
        for item in list(vars(module).values()):
            if getattr(item, "__module__", None) != module.__name__:
                continue
            if inspect.isfunction(item):
                wrapped[item] = _typed(item)
            elif inspect.isclass(item):
                _check_methods(item)
    for module in list(sys.modules.values()):
        if module.__name__.partition(".")[0] in ("minikv_jax", "pallas_kernels"):
            for name, item in list(vars(module).items()):
                if inspect.isfunction(item) and item in wrapped:
                    setattr(module, name, wrapped[item])
    return len(wrapped)


def _modules() -> list[ModuleType]:
    modules = []
    for name in CHECKED:
        module = importlib.import_module(name)
        modules.append(module)
        inside = pkgutil.walk_packages(getattr(module, "__path__", []), f"{name}.")
        # Kernels of other languages annotate what those languages understand, and an api refuses by itself.
        modules += [importlib.import_module(x.name) for x in inside if not _is_left_out(x.name)]
    return modules


def _is_left_out(name: str) -> bool:
    return any(part.startswith("_triton") or part in ("mosaic", "mosaic_gpu", "api") for part in name.split("."))


def _check_methods(kind: type) -> None:
    for name, item in list(vars(kind).items()):
        if name.startswith("__"):
            continue
        if inspect.isfunction(item):
            setattr(kind, name, _typed(item))
        elif isinstance(item, classmethod) and kind.__module__.startswith("minikv_jax"):
            setattr(kind, name, classmethod(_typed(item.__func__)))


_typed = functools.partial(jaxtyping.jaxtyped, typechecker=beartype.beartype)
