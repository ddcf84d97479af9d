"""The benchmark of an accelerator: a few steps of small networks on the CPU, and its table without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "accelerator.py"


def run(output: Path, *flags: str) -> tuple[list[dict[str, Any]], str]:
    """The rows, and the printed text."""
    command = [sys.executable, str(SCRIPT), *flags, "--output", str(output)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=500).stdout
    return json.loads((output / "accelerator.json").read_text())["rows"], printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an accelerator")
def test_without_an_accelerator_every_row_is_not_measured(tmp_path: Path) -> None:
    rows, printed = run(tmp_path)
    assert len(rows) == 7 and all(row["figure"] is None for row in rows)
    assert printed.count("not measured") == 7
    bars = [(row["bar"]["relation"], row["bar"]["value"]) for row in rows if row["bar"]]
    assert bars == [("≤", 10), ("≥", 1_000_000)]


def test_it_runs_on_a_cpu(tmp_path: Path) -> None:
    rows, _ = run(tmp_path, "--device", "cpu", "--quick")
    assert len(rows) == 7 and all(row["what"].startswith("tiny, in place of: ") for row in rows)
    memory = [row["figure"] for row in rows if row["unit"] == "MiB"]
    assert memory == [None, None]  # only an accelerator has memory to measure
    assert all(row["figure"] is not None for row in rows if row["unit"] != "MiB")
    assert all(row["figure"] > 0 for row in rows if row["unit"] in ("views/s", "times as fast"))
    trained = [row for row in rows if row["unit"] == "times as fast"]
    assert len(trained) == 2 and all("images/s" in row[side] for row in trained for side in ("baseline", "ours"))
