"""The tests' own random numbers: anew in every run, the same again where a run, a test or an example is repeated."""

import ast
import re
from pathlib import Path

import draws
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

TESTS = Path(__file__).parent
_drawn: dict[int, list] = {}


@settings(max_examples=10)
@given(n=st.integers(0, 3))
def test_an_example_that_comes_again_meets_the_same_numbers(n):
    numbers = [draws.rng().integers(1 << 60), draws.rng().integers(1 << 60)]
    assert _drawn.setdefault(n, numbers) == numbers
    assert numbers[0] != numbers[1] and all(other[0] != numbers[0] for m, other in _drawn.items() if m != n)


def test_a_test_that_comes_again_meets_the_same_numbers():
    numbers = []
    for name in ("one", "two", "one"):
        draws.begin(name)
        numbers.append(draws.rng().integers(1 << 60))
    assert numbers[0] == numbers[2] != numbers[1]


def called(tree: ast.AST):
    """(dotted name, arguments) of every call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node.args + node.keywords


@pytest.mark.parametrize("path", sorted(TESTS.glob("*.py")), ids=lambda path: path.stem)
def test_no_test_draws_what_nobody_can_draw_again(path):
    """Generators have a seed, and nothing draws from those that NumPy and Python share among all of a process."""
    if path.stem in ("draws", "conftest"):
        return
    seeded = {"np.random.default_rng", "random.Random"}
    for name, arguments in called(ast.parse(path.read_text(encoding="utf-8"))):
        shared = re.fullmatch(r"(?:np\.random|numpy\.random|random|secrets)\.\w+", name) and name not in seeded
        unseeded = name in seeded and not arguments
        assert not shared and not unseeded, f"{path.name} calls {name}: draw from draws.rng()"
