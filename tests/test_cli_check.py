"""`ccssl-hf check`: what it prints and writes, and that it ends where training would."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from ccssl_hf.cli import app
from pictures import write
from test_survey import write_splits
from test_training_distributed import ROOT

SMALL = ["--backbone", "test_resnet", "--image_size", "32", "--per_device_train_batch_size", "2", "--mu", "2"]


def check(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["check", *map(str, arguments), *SMALL])


def test_it_prints_what_training_would_start_with(tmp_path: Path) -> None:
    root = write_splits(tmp_path / "photos")
    (root / "unlabeled/broken.jpg").unlink()
    result = check("--data_dir", root, "--json", tmp_path / "new" / "out.json")
    assert result.exit_code == 0, result.output
    assert "validation  7       1        3 (ant)" in result.stdout
    assert "wolf (3), fox (1)" in result.stdout and result.stdout.endswith("Training can start.\n")
    written = json.loads((tmp_path / "new" / "out.json").read_text())
    assert written["splits"]["validation"]["ood"] == {"fox": 1, "wolf": 3} and written["errors"] == []
    assert len(written["warnings"]) == 4 and "shares 1 image with the labeled split" in " ".join(written["warnings"])


def test_it_names_everything_that_stops_training(tmp_path: Path) -> None:
    root = write_splits(tmp_path / "photos")
    for name in ("labeled/ant/x.png", "validation/ant/y.png"):
        (root / name).write_bytes(b"no image")
    bad = tmp_path / "bad.json"
    flags = ["--test", tmp_path / "missing", "--label_column", "label", "--mu", "20", "--algorithm", "fixmatch"]
    result = CliRunner().invoke(app, ["check", "--data_dir", str(root), "--json", str(bad), *SMALL, *map(str, flags)])
    assert result.exit_code == 2 and "Traceback" not in result.output
    errors, expected = json.loads(bad.read_text())["errors"], ("ant/x.png", "ant/y.png", "missing", "fewer than the 40")
    for error, words in zip(errors, expected, strict=True):
        assert words in error and error in result.stderr
    assert "validation  8" in result.stdout


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--labeled", "{photos}/labeled"], "Algorithm 'fixmatch' needs unlabeled images"),
        (["--data_dir", "{photos}", "--backbone", "resnet_5000"], "has no model 'resnet_5000'"),
        (["--data_dir", "{photos}", "--bachbone", "resnet50"], "Unknown argument --bachbone. Did you mean 'backbone'"),
        (["--data_dir", "{photos}/none"], "no folder labeled"),
        (
            ["--data_dir", "{photos}", "--repeat_labeled", "0", "--per_device_train_batch_size", "8"],
            "7 labeled images",
        ),
        ([], "There is no labeled split"),
    ],
)
def test_what_training_would_refuse_is_refused(tmp_path: Path, flags: list[str], sentence: str) -> None:
    root = write_splits(tmp_path / "photos")
    result = CliRunner().invoke(app, ["check", *SMALL, *(flag.format(photos=root) for flag in flags)])
    assert result.exit_code == 2 and sentence in result.stderr, result.output


def test_labels_only_suffice_for_supervised_training(tmp_path: Path) -> None:
    root = write_splits(tmp_path / "photos")
    flags = ["--algorithm", "supervised", "--lambda_contrast", "0", "--push_threshold", "none"]
    assert check("--labeled", root / "labeled", *flags, "--confidence_threshold", "none").exit_code == 0


def test_train_stops_where_check_does(tmp_path: Path) -> None:
    root = write_splits(tmp_path / "photos")
    (root / "test/bee/broken.png").write_bytes(b"no image")
    flags = ["--max_steps", "1", "--use_cpu", "true", "--output_dir", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["train", "--data_dir", str(root), *SMALL, *flags])
    assert result.exit_code == 2 and "\nunlabeled   23" in result.stdout
    assert "error: The test split has 1 unreadable image." in result.stderr
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.slow
def test_two_processes_end_together_with_one_sentence(tmp_path: Path, fault_record: Any) -> None:
    for number in range(8):
        write(tmp_path / f"photos/labeled/{'ab'[number % 2]}/{number}.png", number)
        write(tmp_path / f"photos/unlabeled/{number}.png", 10 + number)
    (tmp_path / "photos/labeled/a/broken.png").write_bytes(b"no image")
    flags = ["--data_dir", tmp_path / "photos", "--output_dir", tmp_path / "out", "--max_steps", "1", *SMALL]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    config = ["--config_file", "recipes/accelerate_configs/two_cpu_processes.yaml", "--main_process_port", str(port)]
    words = ["-m", "accelerate.commands.launch", *config, "-m", "ccssl_hf.cli", "train", *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert said.count("error: The labeled split has 1 unreadable image.") == 1, said[-3000:]
    assert said.count("labeled/a/broken.png: ") == 1 and said.count("fewest per class") == 1
    assert "/ccssl_hf/" not in said  # the only traceback is that of the launcher
    what = "both processes end before step 1 with one sentence that names it"
    fault_record("An unreadable labeled image, two processes", what, "0 steps")
