"""The benchmarks of views run and write the rows that `benchmarks/run.py` reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def rows_of(name: str, folder: Path) -> list[dict[str, Any]]:
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick", "--output", str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    written = json.loads((folder / f"{name}.json").read_text())
    assert written["quick"] and written["machine"]["threads"] == 1
    assert all(row["figure"] > 0 for row in written["rows"])
    return written["rows"]


@pytest.mark.parametrize(
    ("name", "bars"),
    [("augmentation", [("times as fast", 5), ("views/s", 15_000)]), ("views_224", [("times as fast", 2)])],
)
def test_a_benchmark_of_views_runs_and_has_its_aims(name: str, bars: list[tuple[str, float]], tmp_path: Path) -> None:
    rows = rows_of(name, tmp_path)
    held = [(row["unit"], row["bar"]["value"]) for row in rows if row["bar"]]
    assert held[: len(bars)] == bars
    if name == "augmentation":  # each view also alone
        told = [row["what"] for row in rows if not row["bar"]]
        assert all(any(what.startswith(view) for what in told) for view in ("weak", "strong", "contrastive"))
