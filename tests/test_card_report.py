"""`ccssl-hf evaluate` and `ccssl-hf report`, on folders and on the Hub: the trainer's results, and renewed cards."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub import HfApi, ModelCard
from PIL import Image
from typer.testing import CliRunner, Result

from ccssl_hf import CCSSLForImageClassification, CCSSLTrainer
from ccssl_hf.card.report import describe
from ccssl_hf.cli import app
from ccssl_hf.data.sources import load_split
from ccssl_hf.deploy.evaluate import split_name
from hub_server import TOKENS
from test_trainer import with_ood_images
from tiny_runs import LABELS, trainer_of

OOD_NAME = "a stranger"
OWN_FILE = Path(__file__)


def ccssl_hf(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def the_error(result: Result) -> str:
    assert result.exit_code == 2, result.output
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The validation split and OOD images as <class>/<image>."""
    folder = tmp_path_factory.mktemp("images") / "open"
    split = with_ood_images()
    names = split.features["label"].names
    for number, row in enumerate(split):
        (folder / names[row["label"]]).mkdir(parents=True, exist_ok=True)
        row["image"].save(folder / names[row["label"]] / f"{number:03}.png")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, images: Path) -> tuple[CCSSLTrainer, Path, dict[str, float]]:
    """A trained run, its folder, and what the trainer measures of it on the images."""
    folder = tmp_path_factory.mktemp("run") / "digits"
    trainer = trainer_of(folder, max_steps=40, ema_decay=0.9, learning_rate=0.1, per_device_eval_batch_size=16)
    trainer.train()
    metrics = trainer.evaluate(load_split(str(images), role="test"), metric_key_prefix="test")
    trainer.save_model()
    return trainer, folder, {name.removeprefix("test_"): value for name, value in metrics.items()}


def test_evaluate_measures_what_the_trainer_does(run: Any, images: Path, tmp_path: Path) -> None:
    result = ccssl_hf("evaluate", run[1], images, "--json", tmp_path / "made" / "out.json", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert re.search(r"^open +47 +4 +8 \(zero\) +10 \(two\) +10$", result.stdout, re.MULTILINE)
    counted = "10 images of the open split show no class of the model and count as out-of-distribution (OOD): "
    assert f"{counted}{OOD_NAME} (10)." in result.stdout
    assert f"\nWritten to {tmp_path / 'made' / 'out.json'}.\n" in result.stdout
    written = json.loads((tmp_path / "made" / "out.json").read_text())
    for name in ("top1", "top5", "macro_f1", "ece", "auroc"):
        # To the last digit but for what a convolution rounds in another memory format.
        assert written[name] == pytest.approx(run[2][name], abs=1e-7)
        assert f"{run[2][name]:.4f}" in result.stdout
    assert (written["images"], written["unknown"], written["split"]) == (47, 10, "open")  # the folder's name
    assert written["ood_images"] == {OOD_NAME: 10}
    assert written["weights"] == "EMA weights, last step 40, seed 42"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        *[("user/name", "test"), ("user/name:validation", "validation"), ("photos/none", "test")],
        *[("holdout.parquet", "holdout"), ("a/test-00000-of-00001.parquet", "test"), ("a/val-*.parquet", "val")],
        ("a/holdout/*.parquet", "holdout"),
    ],
)
def test_a_split_is_named_after_its_source(source: str, name: str) -> None:
    assert split_name(source) == name


def test_a_folder_names_its_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set 1.2").mkdir()
    monkeypatch.chdir(tmp_path / "set 1.2")
    assert {split_name(each) for each in (".", str(tmp_path / "set 1.2"), "../set 1.2/")} == {"set 1.2"}


def test_evaluate_reads_folder_and_dataset_from_the_hub(run: Any, images: Path, hub: Any, tmp_path: Path) -> None:
    api = HfApi(token=TOKENS["anna"])
    api.create_repo("anna/evaluated-digits")
    api.upload_folder(repo_id="anna/evaluated-digits", folder_path=run[1], ignore_patterns=["checkpoint-*"])
    split = with_ood_images().remove_columns("true").rename_columns({"image": "photo", "label": "kind"})
    split.push_to_hub("anna/open-digits", split="hard", token=TOKENS["anna"])
    columns = ["--image-column", "photo", "--label-column", "kind"]
    result = ccssl_hf("evaluate", "anna/evaluated-digits", "anna/open-digits", "--split", "hard", *columns)
    assert result.exit_code == 0, result.output
    assert f"{run[2]['top1']:.4f}  hard   EMA weights, last step 40, seed 42" in result.stdout
    assert "no split 'test'" in the_error(ccssl_hf("evaluate", "anna/evaluated-digits", "anna/open-digits"))

    out = tmp_path / "card"
    assert "name the folder" in the_error(
        ccssl_hf("report", "anna/evaluated-digits", "--split", "hard=anna/open-digits:hard", *columns)
    )
    result = ccssl_hf("report", "anna/evaluated-digits", out, "--split", "hard=anna/open-digits:hard", *columns)
    assert result.exit_code == 0, result.output
    card = ModelCard.load(out / "README.md")
    assert {(r.dataset_split, r.dataset_name) for r in card.data.eval_results} >= {("hard", "anna/open-digits")}
    for file in re.findall(r"!\[.*?\]\((.*?)\)", card.text):
        assert (out / file).is_file()
    card.validate(repo_type="model")
    assert "Top-1 accuracy" in ccssl_hf("report", "anna/evaluated-digits").stdout


def test_report_renews_the_card_of_a_folder(run: Any, images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    run[0].save_model(str(folder))
    card = (folder / "README.md").read_text().replace("## Intended use", "## By hand\n\nKept.\n\n## Intended use")
    (folder / "README.md").write_text(card)
    result = ccssl_hf("report", folder, "--split", f"field={images}", "--embeddings")
    assert result.exit_code == 0, result.output
    last = result.stdout.splitlines()[-1]
    assert last.startswith(f"Written to {folder}: README.md, images/") and last.endswith("images/embeddings.png.")
    text = (folder / "README.md").read_text()
    assert "## By hand\n\nKept.\n\n## Intended use" in text
    assert ModelCard.load(folder / "README.md").data["ccssl_hf"]["splits"]["field"]["ood_images"] == 10
    for split in ("test", "field"):
        assert f"| Top-1 accuracy | {run[2]['top1']:.4f} | {split} | EMA | 40 (last) | 42 |" in text
    assert "; field split, EMA weights, last step 40, seed 42.](images/confusion_matrix.png)" in text
    assert "](images/curves.png)" in text and str(images) not in text
    with Image.open(folder / "images" / "embeddings.png") as picture:
        assert min(picture.size) > 500


def test_report_says_what_a_folder_is(run: Any) -> None:
    result = ccssl_hf("report", run[1])
    assert result.exit_code == 0, result.output
    assert "wide_resnet10_1_cifar, 16 px, 0.3 MB, 4 classes (zero, one, two, three)" in result.stdout
    assert "Top-1 accuracy" in result.stdout and re.search(r"^confidence_threshold +0\.3$", result.stdout, re.MULTILINE)
    assert re.search(r"^unlabeled  .* 96$", result.stdout, re.MULTILINE)
    assert "![" not in result.stdout and "bibtex" not in result.stdout


def test_report_writes_the_first_card_of_a_folder(images: Path, tmp_path: Path) -> None:
    model = CCSSLForImageClassification.from_timm("test_resnet", labels=LABELS, image_size=32)
    model.save_pretrained(tmp_path / "bare")
    assert "It has no card" in ccssl_hf("report", tmp_path / "bare").stdout
    result = ccssl_hf("report", tmp_path / "bare", "--split", f"test={images}")
    assert result.exit_code == 0, result.output
    card = ModelCard.load(tmp_path / "bare" / "README.md")
    assert "| test | published | – | – |" in card.text and card.data.model_name == "bare"
    assert all(result.metric_name.endswith("(published weights)") for result in card.data.eval_results)


def test_tables_fit_the_terminal_and_keep_every_word(run: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(run[1], tmp_path / "model")
    name = "photographs of " + "moths and butterflies " * 8 + "x" * 90
    card = (folder / "README.md").read_text(encoding="utf-8")
    (folder / "README.md").write_text(card.replace("in-memory dataset", name), encoding="utf-8")
    full, narrow = describe(str(folder)), describe(str(folder), width=80)
    tables = narrow.partition("\n\n")[2].splitlines()
    assert max(map(len, full.splitlines())) > 200 and max(map(len, tables)) <= 80
    assert sorted(narrow.replace(" ", "").replace("\n", "").replace("-", "")) == sorted(
        full.replace(" ", "").replace("\n", "").replace("-", "")
    )


def test_what_a_user_can_get_wrong(run: Any, images: Path, tmp_path: Path) -> None:
    assert "<class>/<image>" in the_error(ccssl_hf("evaluate", run[1], images / OOD_NAME))
    assert "not a folder" in the_error(ccssl_hf("evaluate", run[1], tmp_path / "none"))
    assert "config.json" in the_error(ccssl_hf("evaluate", images, images))
    assert "has no config.json: pass a " in the_error(ccssl_hf("report", images))
    for out, words in ((tmp_path, "is a folder: name a file"), (OWN_FILE / "x.json", "cannot be written to")):
        assert words in the_error(ccssl_hf("evaluate", run[1], images, "--json", out))  # before any work
    assert "it has no SOURCE; use NAME=SOURCE" in the_error(ccssl_hf("report", run[1], "--split", "test="))
    assert "at least one --split" in the_error(ccssl_hf("report", run[1], tmp_path / "out"))
    broken = tmp_path / "broken" / "zero"
    broken.mkdir(parents=True)
    for name in ("0.png", "1.png"):
        (broken / name).write_bytes(b"no image")
    for call in (["evaluate", run[1], broken.parent], ["report", run[1], "--split", f"test={broken.parent}"]):
        result = ccssl_hf(*call)
        assert "split has 2 unreadable images. Repair or remove them" in the_error(result)
        lines = [line.split(":")[0].strip() for line in result.stderr.splitlines() if line.startswith("  ")]
        assert lines == [str(broken / name) for name in ("0.png", "1.png")]
    (tmp_path / "model").mkdir()
    run[0].save_model(str(tmp_path / "model"))
    for metadata in ("model-index: [{name: x, results: [{}]}]", "ccssl_hf: {provenance: {weights: EMA}}"):
        (tmp_path / "model" / "README.md").write_text(f"---\n{metadata}\n---\n")
        assert "metadata that cannot be read" in the_error(
            ccssl_hf("report", tmp_path / "model", "--split", f"test={images}")
        )
    assert isinstance(load_split(str(images), role="test"), datasets.Dataset)
