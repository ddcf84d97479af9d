"""The `ccssl-hf` command, in a process of its own and in this one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
import torchvision
from typer.testing import CliRunner

from ccssl_hf import CCSSLForImageClassification
from ccssl_hf.cli import app

RUN = CliRunner()


def moco_checkpoint(path: Path) -> Path:
    network = torchvision.models.resnet18(weights=None)
    state = {f"module.encoder_q.{key}": value for key, value in network.state_dict().items() if "fc." not in key}
    torch.save({"epoch": 200, "arch": "resnet18", "state_dict": state}, path)
    return path


def test_convert_writes_a_folder_to_train_on_from_and_says_what_became_of_the_keys(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("moth\nbutterfly\n")
    checkpoint = moco_checkpoint(tmp_path / "moco.pth.tar")
    out = str(tmp_path / "out")
    options = ["--labels", str(names), "--backbone", "resnet18"]
    result = RUN.invoke(app, ["convert", "moco", str(checkpoint), out, *options])
    assert result.exit_code == 0, result.output
    assert "resnet18" in result.output and "fresh" in result.output
    assert CCSSLForImageClassification.from_pretrained(out).config.labels == ["moth", "butterfly"]


def test_an_error_is_one_line(tmp_path: Path) -> None:
    missing, out = str(tmp_path / "none.pth"), str(tmp_path / "out")
    arguments = ["convert", "usb", missing, out, "--labels", "a,b", "--backbone", "wide_resnet28_2_cifar"]
    code = "from ccssl_hf.cli import app; app()"
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert run.returncode == 2
    [line] = [line for line in run.stderr.splitlines() if line.strip()]
    assert line.startswith("error: ") and "none.pth" in line
