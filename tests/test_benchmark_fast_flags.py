"""The benchmark of the fast flags, for two steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import SHARED, needs_shared

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "fast_flags.py"


@pytest.mark.slow
@needs_shared
def test_each_flag_is_a_line_with_its_difference_from_the_defaults(tmp_path: Path) -> None:
    page = tmp_path / "fast_flags.md"
    page.write_text("What it means.\n\n<!-- tables -->\n<!-- /tables -->\n")
    asked = ["--data", "butterfly10_mini", "--root", str(SHARED / "data"), "--steps", "2", "--seeds", "0"]
    command = [sys.executable, str(SCRIPT), *asked, "--output", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=500)
    lines = tmp_path / "fast_flags_butterfly10_mini.jsonl"
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    changed = [{key: row["settings"].get(key) for key in ("weak_forward", "bf16")} for row in rows]
    assert changed == [
        {"weak_forward": None, "bf16": None},
        {"weak_forward": "separate", "bf16": None},
        {"weak_forward": None, "bf16": True},
    ]
    assert all(0 <= row["top1"] <= 1 and row["seconds_per_step"] > 0 for row in rows)
    text = page.read_text()
    assert text.startswith("What it means.\n") and "## butterfly10_mini" in text
    table = [line.split("|") for line in text.splitlines() if line.startswith(("| defaults", "| weak", "| bf16"))]
    assert [line[2].strip() for line in table] == ["1", "1", "1"]
    for line, row in zip(table, rows, strict=True):
        difference = row["top1"] - rows[0]["top1"]
        assert line[5].strip() == ("" if row is rows[0] else f"{difference:+.3f}")

    before = lines.read_text()
    subprocess.run(command, check=True, capture_output=True, timeout=500)
    assert lines.read_text() == before  # a finished run is not repeated
