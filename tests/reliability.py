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

Tests inject the faults on this page into real runs, files, processes and servers. Each row states the fault, what was
observed, what was lost, and the test that observed it.

The test run writes this page: `make test` and `make test-slow` replace the rows of the tests that passed.
"""
_SECTIONS = {
    "Data": ("test_sources", "test_data", "test_images", "test_survey", "test_cli_check"),
    "Unreadable images": ("test_bad_images",),
    "Stop and resume": ("test_stop", "test_resume", "test_training_distributed"),
    "NaN and infinite numbers": ("test_nonfinite",),
    "Long runs": ("test_soak",),
    "Server": ("test_deploy_serve",),
}
"""The test files of each section of the page. Rows of other files are in the section `Others`."""
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


def _section(row: Row) -> str:
    file = Path(row.test.partition("::")[0]).stem
    return next((title for title, files in _SECTIONS.items() if file in files), "Others")


def _joined(rows: list[Row]) -> list[Row]:
    """Rows of a test that differ only after the colon in their fault (`Resumed with another value: seed`) as one."""
    cases: dict[Row, list[str]] = defaultdict(list)
    for row in rows:
        fault, colon, case = row.fault.partition(": ")
        cases[row._replace(fault=fault[:1].upper() + fault[1:] + colon)].append(case)
    return [row._replace(fault=row.fault + "; ".join(texts)) for row, texts in cases.items()]


def _exists(test: str) -> bool:
    file, _, name = test.partition("::")
    path = ROOT / file
    return path.is_file() and f"def {name}(" in path.read_text(encoding="utf-8")


def read_page(text: str) -> list[Row]:
    """The rows of the page."""
    return [Row(*(cell.replace("\\|", "|") for cell in row)) for row in _ROW.findall(text)]


def render_page(rows: list[Row]) -> str:
    """The page, with a table for each section."""
    parts = [_HEAD]
    for title in (*_SECTIONS, "Others"):
        found = _joined([row for row in rows if _section(row) == title])
        if found:
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
