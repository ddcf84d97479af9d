"""The demo with a few steps: it writes every file that it names, and its plot of convergence is right."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("supervised", "fixmatch", "fixmatch_ccssl")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    output = tmp_path_factory.mktemp("demo") / "out"
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += ["--config_file", str(ROOT / "recipes/accelerate_configs/single_process.yaml")]
    recipe = [str(ROOT / "recipes/train_digits.py"), "--output_dir", str(output), "--use_cpu", "true"]
    few = ["--max_steps", "6", "--eval_steps", "3", "--logging_steps", "3", "--seeds", "2"]
    run = subprocess.run(
        [*launch, *recipe, *few],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout, output


@pytest.fixture(scope="module")
def recipe() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "recipes" / "train_digits.py"))


def histories(num_seeds: int = 3) -> dict[str, list[list[tuple[int, float]]]]:
    steps = range(100, 1100, 100)
    return {
        "FixMatch": [[(s, s / 2000 + 0.02 * seed) for s in steps] for seed in range(num_seeds)],
        "FixMatch + CCSSL": [[(s, s / 1500 + 0.02 * seed) for s in steps] for seed in range(num_seeds)],
    }


def words(path: Path) -> set[str]:
    """The texts of an SVG picture."""
    return set(re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text(encoding="utf-8")))


def test_the_report_has_a_row_for_each_method_and_seed(demo: tuple[str, Path]) -> None:
    rows = json.loads((demo[1] / "report.json").read_text())
    assert {(row["method"], row["seed"]) for row in rows} == {(m, s) for m in METHODS for s in (0, 1)}
    for row in rows:
        assert 0 <= row["top1"] <= 1 and 0 <= row["auroc"] <= 1 and 0 <= row["pseudo_label_coverage"] <= 1
        assert (row["split"], row["weights"], row["step"]) == ("test", "EMA", 6)


def test_one_table_of_mean_and_spread_is_printed(demo: tuple[str, Path]) -> None:
    out = demo[0]
    for title in ("Supervised", "FixMatch", "FixMatch + CCSSL"):
        assert any(line.startswith(f"{title} ") and line.count("±") >= 2 for line in out.splitlines()), out
    columns = ["method", "top-1", "pseudo-label precision", "pseudo-label coverage", "OOD AUROC"]
    assert any(re.split(r"  +", line) == columns for line in out.splitlines()), out
    assert "The three agree." in out


def test_every_method_leaves_a_plain_folder_with_a_card(demo: tuple[str, Path]) -> None:
    for method in METHODS:
        files = {path.name for path in (demo[1] / method).iterdir()}
        assert {"config.json", "model.safetensors", "README.md", "wide_resnet_cifar.py"} <= files
        assert "training_args.bin" not in files
    card = (demo[1] / "fixmatch_ccssl" / "README.md").read_text()
    assert "model-index" in card and "EMA" in card


def test_the_pictures_are_pictures(demo: tuple[str, Path]) -> None:
    for name in ("convergence.png", "confusion_matrix.png"):
        with Image.open(demo[1] / name) as picture:
            assert min(picture.size) > 400


def test_convergence_names_each_method_with_its_final_mean_and_the_band(recipe: dict[str, Any], tmp_path: Path) -> None:
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        recipe["plot_convergence"](histories(), tmp_path / "p.svg", "Top-1")
        recipe["plot_convergence"](histories(1), tmp_path / "one.svg", "Top-1")
    texts = words(tmp_path / "p.svg")
    assert {"FixMatch  0.52", "FixMatch + CCSSL  0.687", "Optimizer steps", "Top-1"} <= texts
    assert "Mean of 3 seeds, band: ± one standard deviation" in texts
    assert "One seed" in words(tmp_path / "one.svg")


def test_convergence_is_a_sharp_picture_and_leaves_nothing_open(recipe: dict[str, Any], tmp_path: Path) -> None:
    path, before = tmp_path / "figures" / "p.png", dict(matplotlib.rcParams)
    recipe["plot_convergence"](histories(), path, "Top-1")
    with Image.open(path) as picture:
        assert min(picture.size) >= 700
        assert picture.info["dpi"][0] == pytest.approx(200, abs=1)
        assert path.stat().st_size < 60_000
        assert len(set(picture.convert("L").resize((64, 64)).tobytes())) > 10
    assert dict(matplotlib.rcParams) == before
    if "matplotlib.pyplot" in sys.modules:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []


def test_convergence_uses_the_steps_that_all_seeds_share(recipe: dict[str, Any]) -> None:
    table = recipe["shared_steps"]([[(1, 0.0), (2, 1.0), (3, 5.0)], [(2, 3.0), (3, 5.0)]])
    assert table.mean().to_dict() == {2: 2.0, 3: 5.0}
    assert table.std().tolist() == pytest.approx([np.sqrt(2), 0])


@pytest.mark.parametrize("bad", [{}, {"m": []}, {"m": [[(1, 0.5)], [(2, 0.5)]]}, {"m": [[]]}])
def test_curves_without_a_shared_step_are_refused(bad: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one method"):
        recipe["plot_convergence"](bad, tmp_path / "p.png", "Top-1")
