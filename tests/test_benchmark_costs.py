"""The benchmarks of the contrastive loss, of the start, and of costs against sizes, at tiny sizes."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def quick(name: str, output: Path) -> list[dict[str, Any]]:
    """The rows of a quick run of a benchmark."""
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick", "--output", str(output)]
    subprocess.run(command, check=True)
    rows = json.loads((output / f"{name}.json").read_text())["rows"]
    assert all(row["figure"] is not None for row in rows)
    return rows


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, which only Linux has")


@linux
def test_the_loss_has_its_aims(tmp_path: Path) -> None:
    bars = [(row["unit"], row["bar"]["relation"], row["bar"]["value"]) for row in quick("contrastive", tmp_path)]
    assert bars == [
        ("times as fast", "≥", 5),
        ("x the baseline's time", "≤", 1),
        ("MiB", "≤", 200),
        ("MiB", "≤", 1024),
    ]


def test_both_losses_have_the_same_value_and_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    benchmark = importlib.import_module("contrastive")
    for size in (1, 2, 40):
        inputs = benchmark.make(size)
        results = []
        for loss in (benchmark.dense, benchmark.ours):
            benchmark.step(loss, inputs)
            results.append((loss(**inputs).detach(), inputs["embeddings"].grad))
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


@linux
@pytest.mark.slow
def test_the_start_has_rows_for_time_and_memory_of_both_decode_modes(tmp_path: Path) -> None:
    rows = quick("start", tmp_path)
    bars = [(row["unit"], row["bar"] and row["bar"]["value"]) for row in rows]
    assert bars == [("s more", 2), ("MiB more", 100), ("MiB more", None)] * 2
    assert ['decode="memory"' in row["what"] for row in rows] == [True] * 3 + [False] * 3


@linux
def test_cost_draws_its_figure_and_fits_lines(tmp_path: Path) -> None:
    rows = quick("cost", tmp_path)
    assert (tmp_path / "cost.png").stat().st_size > 10_000
    assert [row["unit"] for row in rows[-4:]] == ["R² of a line"] * 2 + ["slope of logarithms"] * 2
    assert [row["bar"] for row in rows if row["bar"]] == [{"relation": "≤", "value": 1.1}]
