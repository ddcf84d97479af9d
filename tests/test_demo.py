"""The demo, for a few steps: every file it promises is there and says what it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
    assert "The three agree." in out


def test_every_method_leaves_a_plain_folder_with_a_card(demo: tuple[str, Path]) -> None:
    for method in METHODS:
        files = {path.name for path in (demo[1] / method).iterdir()}
        assert {"config.json", "model.safetensors", "README.md", "wide_resnet_cifar.py"} <= files
        assert "training_args.bin" not in files
    card = (demo[1] / "fixmatch_ccssl" / "README.md").read_text()
    assert "model-index" in card and "EMA" in card


def test_the_pictures_are_pictures(demo: tuple[str, Path]) -> None:
    from PIL import Image

    for name in ("convergence.png", "confusion_matrix.png"):
        with Image.open(demo[1] / name) as picture:
            assert min(picture.size) > 400
