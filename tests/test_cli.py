"""The `ccssl-hf` command, in another process and in this one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from PIL import Image
from typer.testing import CliRunner

from ccssl_hf import CCSSLForImageClassification
from ccssl_hf.cli import app
from ccssl_hf.deploy.predict import Classifier

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


def model_and_images(folder: Path) -> tuple[str, Path]:
    model = CCSSLForImageClassification.from_timm("test_resnet", labels=["moth", "fly"], image_size=32)
    model.save_pretrained(folder / "model")
    images = folder / "images"
    images.mkdir()
    for grey in (0, 128):
        Image.new("RGB", (40, 30), (grey, 0, 0)).save(images / f"{grey}.png")
    return str(folder / "model"), images


def test_predict_writes_a_row_for_each_image_and_says_how_many(tmp_path: Path) -> None:
    model, images = model_and_images(tmp_path)
    (images / "broken.jpg").write_bytes(b"no image")
    out = tmp_path / "made" / "out.parquet"
    given = [model, str(images), str(out)]
    result = RUN.invoke(app, ["predict", *given, "--embedding", "--batch_size", "1", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("3 images (1 could not be read, see column error) at ")
    assert result.stdout.endswith(f" a second, written to {out}.\n")
    table = pq.read_table(out)
    assert table.column_names == ["path", "label", "confidence", "embedding", "error"]
    assert [Path(path).name for path in table["path"].to_pylist()] == ["0.png", "128.png", "broken.jpg"]
    assert [len(row or []) for row in table["embedding"].to_pylist()] == [64, 64, 0]


def test_predict_ends_with_one_line_and_writes_nothing_where_it_must_stop(tmp_path: Path) -> None:
    model, images = model_and_images(tmp_path)
    out = tmp_path / "out.parquet"
    (images / "broken.jpg").write_bytes(b"no image")
    for arguments, words in (
        ([model, str(images), str(out), "--strict"], "broken.jpg can't be read"),
        ([model, str(tmp_path / "model"), str(out)], "no image files"),
        ([str(images), str(images), str(out)], "config.json"),
    ):
        result = RUN.invoke(app, ["predict", *arguments, "--device", "cpu"])
        assert result.exit_code == 2 and not out.exists()
        [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert words in line


def test_predict_writes_csv_and_an_unknown_suffix_is_refused_before_any_work(tmp_path: Path) -> None:
    model, images = model_and_images(tmp_path)
    given = [model, str(images), str(tmp_path / "out.csv"), "--top-k", "2", "--probabilities", "--device", "cpu"]
    result = RUN.invoke(app, ["predict", *given])
    assert result.exit_code == 0, result.output
    head = (tmp_path / "out.csv").read_text().splitlines()[0]
    assert head == '"path","label","confidence","label_2","confidence_2","probability_moth","probability_fly","error"'
    result = RUN.invoke(app, ["predict", "no model", "no images", str(tmp_path / "out.json")])
    assert result.exit_code == 2 and "has none of the suffixes .parquet, .csv, .jsonl" in result.stderr


def test_an_interrupted_predict_says_where_its_rows_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = model_and_images(tmp_path)
    predict, calls = Classifier.predict_unchecked, iter(range(9))

    def interrupted(self: Classifier, batch: Any) -> Any:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return predict(self, batch)

    monkeypatch.setattr(Classifier, "predict_unchecked", interrupted)
    given = [model, str(images), str(tmp_path / "out.csv"), "--batch-size", "1", "--num-workers", "1"]
    result = RUN.invoke(app, ["predict", *given, "--device", "cpu"])
    [line] = [line for line in result.stderr.splitlines() if line and not line.startswith(("Predicting", "\r"))][-1:]
    assert (
        result.exit_code == 130
        and line == f"Interrupted: the rows of the first images are in {tmp_path}/_out.csv.partial."
    )
    assert (tmp_path / "_out.csv.partial").read_text().count(".png") == 1 and not (tmp_path / "out.csv").exists()


def test_evaluate_names_the_split_after_its_source(tmp_path: Path) -> None:
    model, _ = model_and_images(tmp_path)
    for name in ("holdout", "unlabeled"):
        for grey, label in enumerate(("moth", "fly")):
            (tmp_path / name / label).mkdir(parents=True)
            Image.new("RGB", (32, 32), (90 * grey, 0, 0)).save(tmp_path / name / label / "a.png")
    for name in ("holdout", "unlabeled"):
        facts = tmp_path / f"{name}.json"
        result = RUN.invoke(app, ["evaluate", model, str(tmp_path / name), "--json", str(facts), "--device", "cpu"])
        assert result.exit_code == 0, result.output
        assert json.loads(facts.read_text())["split"] == name
        assert any(line.split()[3:4] == [name] for line in result.stdout.splitlines() if line.startswith("Top-1"))
    splits = [word for name in ("holdout", "unlabeled") for word in ("--split", str(tmp_path / name))]
    splits += ["--split", f"again={tmp_path / 'holdout'}"]
    result = RUN.invoke(app, ["report", model, *splits, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    measured = [line.split()[3] for line in result.stdout.splitlines() if line.startswith("Top-1")]
    assert measured == ["holdout", "unlabeled", "again"]
    result = RUN.invoke(app, ["report", model, *splits[:2], *splits[:2]])
    assert result.exit_code == 2 and "two splits are named holdout" in result.stderr
