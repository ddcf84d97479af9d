"""The benchmark of the server: it runs, and server and model give the same predictions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "serve.py"


@pytest.mark.slow
def test_it_runs_and_writes_its_rows(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--quick", "--output", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr
    content = json.loads((tmp_path / "serve.json").read_text())
    assert content["quick"] is True and len(content["rows"]) == 2
    for row in content["rows"]:
        assert row["figure"] > 0 and row["details"]["largest_difference_of_scores"] < 1e-5
        assert row["what"] in run.stdout
