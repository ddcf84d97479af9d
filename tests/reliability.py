"""Writes docs/reliability.md from the rows that tests record with the fixture `fault_record`.

A run that passes replaces the rows of the tests that ran. Rows of other tests stay as long as these tests exist. The
hooks are in conftest.py.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"

_HEAD = """# Reliability

The tests inject these faults into real runs, files, processes and servers. The rows are written by the test run:
`make test` and `make test-slow` replace the rows of the tests that passed. Each row states what was observed.
"""
_ROW = re.compile(r"^\| (.*?) \| (.*?) \| (.*?) \| `(tests/[\w/]+\.py::\w+)` \|$", re.MULTILINE)


class Row(NamedTuple):
    """A fault, what happened, what was lost, and the test that observed it, as `tests/test_x.py::test_y`."""

    fault: str
    happened: str
    lost: str
    test: str


class Recorder:
    """Collects the rows of a session from the reports of its tests."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.ran: set[str] = set()

    def add(self, report: pytest.TestReport) -> None:
        if report.when != "call" or not report.passed:
            return
        test = report.nodeid.partition("[")[0]
        self.ran.add(test)
        self.rows += [Row(*fault, test) for name, fault in report.user_properties if name == "fault"]

    def merged(self, earlier: list[Row]) -> list[Row]:
        """The rows of the page: this session's, and the earlier ones of tests that exist and did not run."""
        kept = [row for row in earlier if row.test not in self.ran and _exists(row.test)]
        return sorted({*kept, *self.rows}, key=lambda row: (row.test, row.fault))


def _exists(test: str) -> bool:
    file, _, name = test.partition("::")
    path = ROOT / file
    return path.is_file() and f"def {name}(" in path.read_text(encoding="utf-8")


def read_page(text: str) -> list[Row]:
    """The rows of the page."""
    return [Row(*(cell.replace("\\|", "|") for cell in row)) for row in _ROW.findall(text)]


def render_page(rows: list[Row]) -> str:
    """The page: one section for each test file, with the first line of its docstring as the title."""
    sections = defaultdict(list)
    for row in rows:
        sections[row.test.partition("::")[0]].append(row)
    parts = [_HEAD]
    for file, found in sections.items():
        title = (ROOT / file).read_text(encoding="utf-8").partition('"""')[2].partition("\n")[0].rstrip('".')
        parts.append(f"\n## {title}\n\n| Fault | What happened | Lost | Test |\n| --- | --- | --- | --- |\n")
        for row in found:
            fault, happened, lost = (" ".join(text.split()).replace("|", "\\|") for text in row[:3])
            parts.append(f"| {fault} | {happened} | {lost} | `{row.test}` |\n")
    return "".join(parts)


def finish(session: Any, recorder: Recorder, exitstatus: int) -> None:
    """Writes the page if every test passed and the session selected whole files."""
    option = session.config.option
    selected = option.keyword or any("::" in argument for argument in session.config.args)
    if exitstatus != 0 or selected or not recorder.rows or not PAGE.parent.is_dir():
        return
    before = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
    after = render_page(recorder.merged(read_page(before)))
    if after != before:
        PAGE.write_text(after, encoding="utf-8")
