"""Importing is light: what takes time comes with the first name that needs it, whichever that is."""

import ast
import subprocess
import sys

import pytest

import minikv_jax
from minikv_jax import api

_HEAVY = ("jax", "numpy", "flax", "transformers", "torch", "matplotlib", "rich", "click")


def imported(lines: str) -> list[str]:
    """Heavy modules that a process has imported after these lines."""
    program = f"import sys\n{lines}\nprint([name for name in {_HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return ast.literal_eval(result.stdout)


@pytest.mark.promise("Importing the package imports neither JAX nor anything else that takes time")
def test_import_is_light(figure):
    assert imported("import minikv_jax, minikv_jax.errors, minikv_jax.program") == []
    used = imported("import minikv_jax; minikv_jax.load")
    assert "jax" in used and not {"transformers", "torch", "matplotlib"} & set(used)
    figure(f"none of {', '.join(_HEAVY)}")


@pytest.mark.parametrize(
    "first", ["", "import minikv_jax.generate, minikv_jax.prefill", "from minikv_jax.extend import *"]
)
def test_names_are_the_same_whatever_was_imported_first(first):
    lines = f"""{first}
import minikv_jax
from minikv_jax import *
from minikv_jax import api, presets
assert all(getattr(minikv_jax, name) is getattr(api, name) for name in api.__all__)
assert callable(generate) and callable(prefill) and callable(extend) and presets.METHODS
"""
    imported(lines)


def test_every_name_is_there_and_no_other():
    assert all(getattr(minikv_jax, name) is getattr(api, name) for name in api.__all__)
    assert minikv_jax.cache.nbytes is minikv_jax.nbytes and set(api.__all__) <= set(dir(minikv_jax))
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = minikv_jax.nothing_of_the_kind
