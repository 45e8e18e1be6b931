"""The table of promises is that of the tests."""

import json

import promises


def test_every_promise_has_its_test_and_every_test_its_row():
    rows = json.loads(promises.RESULTS.read_text(encoding="utf-8"))["rows"]
    assert {(row["case"], row["test"]) for row in rows} == promises.made(), "run `make promises`"


def test_rows_of_other_suites_stay_and_those_of_tests_that_are_gone_go(tmp_path):
    path, (case, test) = tmp_path / "promises.json", min(promises.made())
    row = {"case": case, "test": test, "suite": "default", "device": "CPU", "cases": 1, "figures": [], "date": "today"}
    promises.write(path, [row, row | {"suite": "slow"}, row | {"test": "test_x.py::test_gone"}])
    promises.write(path, [row | {"cases": 2}])
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert [(row["suite"], row["cases"]) for row in rows if row["cases"]] == [("default", 2), ("slow", 1)]
    assert {row["test"] for row in rows} == {test for _, test in promises.made()}
