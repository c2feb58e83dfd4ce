"""`make faults`: run every test that the fault table of docs/operations.md names, and print which rows held.

A row is held if all its tests passed and at least one ran. Ends with 1 where a row was not, or names a test that isn't.
"""

import re
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "operations.md"
_ROW = re.compile(r"^\| (\d+) \| ([^|]+) \|[^|]+\| ([^|]+) \|$", re.MULTILINE)
_TEST = re.compile(r"`(tests/[^`]+)`")


@dataclass(frozen=True)
class Fault:
    number: int
    what: str
    tests: list[str]
    """Node ids, or beginnings of them. None: the row says in words what it waits for."""
    words: str


@dataclass(eq=False)
class Outcomes:
    """A pytest plugin that remembers how each test ended, and what the slow ones printed."""

    ended: dict[str, str] = field(default_factory=dict)
    printed: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.when == "call" or report.outcome != "passed":
            self.ended[report.nodeid] = report.outcome
        if report.when == "call" and "tests/faults" in report.nodeid:
            self.printed[report.nodeid] += [line for line in report.capstdout.splitlines() if line.strip()][-5:]

    def of(self, test: str) -> list[str]:
        """The tests that this names."""
        return [name for name in self.ended if name == test or name.startswith((f"{test}[", f"{test}::"))]


def faults(document: str) -> list[Fault]:
    return [
        Fault(int(number), what.strip(), _TEST.findall(tests), tests.strip())
        for number, what, tests in _ROW.findall(document)
    ]


def verdict(fault: Fault, outcomes: Outcomes) -> str:
    if not fault.tests:
        return fault.words
    ended = []
    for test in fault.tests:
        found = outcomes.of(test)
        if not found:
            return f"NO SUCH TEST: {test}"
        ended += [outcomes.ended[name] for name in found]
    if "failed" in ended:
        return "FAILED"
    skipped = ended.count("skipped")
    if skipped == len(ended):
        return "NOT RUN: skipped here"
    return f"held ({len(ended) - skipped} tests{f', {skipped} skipped' if skipped else ''})"


def main() -> int:
    rows, outcomes = faults(DOCUMENT.read_text(encoding="utf-8")), Outcomes()
    chosen = dict.fromkeys(test for row in rows for test in row.tests)
    # A folder or file that another names a part of is run once.
    whole = [test for test in chosen if not any(test != other and test.startswith(f"{other}::") for other in chosen)]
    pytest.main(["-m", "", "-q", "--timeout", "600", *whole], plugins=[outcomes])
    table = Table("#", "fault", "seconds", "verdict", title="Faults")
    verdicts = [verdict(row, outcomes) for row in rows]
    for row, found in zip(rows, verdicts, strict=True):
        seconds = sum(outcomes.seconds[name] for test in row.tests for name in outcomes.of(test))
        table.add_row(str(row.number), row.what, f"{seconds:.0f}" if row.tests else "", found)
    console = Console(width=160)
    for name, lines in outcomes.printed.items():
        for line in lines:
            console.print(f"{name.rpartition('::')[2]}: {line}", highlight=False, markup=False)
    console.print(table)
    held = [found for row, found in zip(rows, verdicts, strict=True) if row.tests]
    console.print(f"{sum(found.startswith('held') for found in held)} of {len(held)} rows held")
    return 0 if rows and all(found.startswith("held") for found in held) else 1


if __name__ == "__main__":
    sys.exit(main())
