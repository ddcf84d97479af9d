"""The benchmarks of a training step and of its optimizer run and write their rows. Times are not checked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def rows_of(name: str, output: Path) -> list[dict[str, Any]]:
    """The rows of a quick run of a benchmark."""
    done = subprocess.run(
        [sys.executable, f"benchmarks/{name}.py", "--quick", "--output", str(output)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-6000:]
    content = json.loads((output / f"{name}.json").read_text())
    assert content["benchmark"] == name and content["quick"]
    return content["rows"]


@pytest.mark.parametrize(
    ("name", "bars"),
    [
        ("step", [("≤", 1), ("≤", 0.75), ("≤", 1.03)]),
        ("optimizer", [None, None, ("≥", 3)]),
    ],
)
def test_a_benchmark_writes_its_rows(name: str, bars: list[Any], tmp_path: Path) -> None:
    rows = rows_of(name, tmp_path)
    assert [row["bar"] and (row["bar"]["relation"], row["bar"]["value"]) for row in rows] == bars
    for row in rows:
        assert row["figure"] > 0
        times, baseline = row["details"]["seconds"], row["details"]["baseline_seconds"]
        assert len(times) == len(baseline) > 1 and all(seconds > 0 for seconds in [*times, *baseline])
