"""What tests promise to users, and what they measured: `pytest --promises` writes it to `examples/results`.

A test says what it promises with `@pytest.mark.promise("...")` and what it measured with the fixture `figure`. Runs add
up: the default suite, the slow tests and those of a GPU each have rows of their own.
"""

import ast
import datetime
import importlib.metadata
import json
from pathlib import Path

TESTS = Path(__file__).parent
RESULTS = TESTS.parent / "examples" / "results" / "promises.json"
_PACKAGES = ("jax", "jaxlib", "numpy")


def made() -> set[tuple[str, str]]:
    """(promise, `file.py::test`) of every test that makes one, from the sources."""
    return {
        (text, f"{path.name}::{test.name}")
        for path in TESTS.rglob("test_*.py")
        for test in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(test, ast.FunctionDef)
        for text in _promises(test)
    }


def _promises(test: ast.FunctionDef):
    for call in test.decorator_list:
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.promise":
            yield ast.literal_eval(call.args[0])


def note(item) -> None:
    """Lets an item's report carry its promise, from a worker too."""
    for marker in item.iter_markers("promise"):
        suite = next((name for name in ("gpu", "slow") if item.get_closest_marker(name)), "default")
        item.user_properties += [("promise", marker.args[0]), ("suite", suite)]


def device(suite: str) -> str:
    import jax

    return jax.devices()[0].device_kind if suite == "gpu" else "CPU"


class Recorder:
    """A plugin of the process that reports."""

    def __init__(self):
        self.rows: dict[tuple, dict] = {}

    def pytest_runtest_logreport(self, report):
        told = dict(report.user_properties)
        if report.when != "call" or "promise" not in told or not report.passed:
            return
        about = {"case": told["promise"], "test": _function(report.nodeid), "suite": told["suite"]}
        row = self.rows.setdefault(_key(about), about | {"device": told["device"], "cases": 0, "figures": []})
        row["cases"] += 1
        if told.get("figure") not in (None, *row["figures"]):
            row["figures"].append(told["figure"])

    def pytest_sessionfinish(self):
        today = datetime.date.today().isoformat()
        write(RESULTS, [row | {"date": today} for row in self.rows.values()])


def _function(nodeid: str) -> str:
    return nodeid.partition("[")[0].rpartition("/")[2]


def _key(row: dict) -> tuple[str, str, str]:
    return row["case"], row["test"], row["suite"]


def write(path: Path, rows: list[dict]) -> None:
    """Puts rows beside those of other suites and of tests that did not run, as long as these make their promise."""
    results = {"benchmark": "promises", "device": "see rows", "versions": {}, "command": "make promises", "rows": []}
    if path.exists():
        results |= json.loads(path.read_text(encoding="utf-8"))
    ran, known = {_key(row) for row in rows}, made()
    others = [row for row in results["rows"] if row["cases"] and _key(row) not in ran and _key(row)[:2] in known]
    # A promise whose test never ran stands in the table too, and says so.
    missing = known - {_key(row)[:2] for row in others + rows}
    others += [{"case": case, "test": test, "suite": "", "cases": 0, "figures": []} for case, test in missing]
    results["versions"] = {name: importlib.metadata.version(name) for name in _PACKAGES}
    results["date"] = datetime.date.today().isoformat()
    results["rows"] = sorted(others + rows, key=lambda row: (row["test"], _key(row)))
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
