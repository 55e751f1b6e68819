"""The table of faults in the docs: written by a run in which all of them were handled, and complete."""

import importlib
from types import SimpleNamespace

import pytest

from tests.fault_table import BEGIN, END, Table, table_of

MODULES = ("tests.unit.test_executors", "tests.unit.test_store", "tests.e2e.test_executor_runs")


def test_the_docs_name_every_fault_that_a_test_injects(repository):
    text = (repository / "docs" / "how-to" / "cluster.md").read_text(encoding="utf-8")
    table = text.partition(BEGIN)[2].partition(END)[0]
    injected = [
        mark.args
        for name in MODULES
        for test in vars(importlib.import_module(name)).values()
        for mark in getattr(test, "pytestmark", [])
        if mark.name == "fault"
    ]
    assert len(injected) == len(set(injected)) == table.count("\n| ") - 1 > 10
    for fault, outcome in injected:
        assert f"| {fault} | " in table and f" | {outcome} | " in table


@pytest.mark.parametrize("passes", [True, False])
def test_nothing_is_written_unless_every_fault_was_handled(passes, tmp_path):
    file = tmp_path / "page.md"
    file.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    mark = SimpleNamespace(args=("a fault", "an outcome"), kwargs={})
    items = [
        SimpleNamespace(
            nodeid=f"test[{kind}]", name="test", callspec=SimpleNamespace(params={"kind": kind}),
            get_closest_marker=lambda name: mark,
        )
        for kind in ("pool", "ray")
    ]  # fmt: skip
    table = Table(file)
    table.pytest_collection_modifyitems(items)
    for item in items if passes else items[:1]:
        report = SimpleNamespace(when="call", passed=True, nodeid=item.nodeid)
        table.pytest_runtest_logreport(report)
    table.pytest_sessionfinish()
    row = "| a fault | processes, Ray | an outcome | 2 |"
    assert table_of(table.rows)[-1] == row
    written = f"before\n{BEGIN}\n{chr(10).join(table_of(table.rows))}\n{END}\nafter\n"
    assert file.read_text() == (written if passes else f"before\n{BEGIN}\nold\n{END}\nafter\n")
