"""The faults that a run of the tests injected and saw handled, as a table in a file.

    python -m pytest -p tests.fault_table -m fault --fault-table FILE

A test names its fault with `@pytest.mark.fault(fault, outcome)`, and `where` it injects it if no parameter says so.
Nothing is written unless all of them passed.
"""

from pathlib import Path

import pytest

BEGIN, END = "<!-- faults: make faults -->", "<!-- end of faults -->"
KINDS = {
    "here": "one process",
    "pool": "processes",
    "slurm": "SLURM's client",
    "ray": "Ray",
    "memory": "memory",
    "s3": "S3",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-table", type=Path, help="write the table of faults into this file")


class Table:
    """Collects what happened to the tests of faults, in the order of the tests."""

    def __init__(self, file: Path) -> None:
        self.file, self.rows, self.passed = file, {}, set()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            if (mark := item.get_closest_marker("fault")) is not None:
                self.rows.setdefault(mark.args, []).append(item)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.passed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        tests = [item.nodeid for items in self.rows.values() for item in items]
        if tests and self.passed.issuperset(tests):
            text = self.file.read_text(encoding="utf-8")
            before, _, rest = text.partition(BEGIN)
            table = "\n".join([BEGIN, *table_of(self.rows), END])
            self.file.write_text(before + table + rest.partition(END)[2], encoding="utf-8")


def table_of(rows: dict[tuple[str, str], list[pytest.Item]]) -> list[str]:
    """The lines of the table: fault, where it was injected, what happened, how many tests saw it."""
    lines = ["| fault | injected with | what happens | tests |", "|---|---|---|---|"]
    for (fault, outcome), items in rows.items():
        where = items[0].get_closest_marker("fault").kwargs.get("where", "")
        used = [getattr(i, "callspec", None) and i.callspec.params for i in items]
        names = {v: None for params in used for v in (params or {}).values() if isinstance(v, str)}
        kinds = ", ".join(KINDS[name] for name in names if name in KINDS)
        lines.append(f"| {fault} | {where or kinds} | {outcome} | {len(items)} |")
    return lines


def pytest_configure(config: pytest.Config) -> None:
    if (file := config.getoption("--fault-table")) is not None:
        config.pluginmanager.register(Table(file))
