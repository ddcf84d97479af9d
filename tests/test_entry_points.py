"""Bad input at every public entry point: one sentence that names what is wrong and the fix, and no traceback."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from ccssl_hf import (
    CCSSLForImageClassification,
    CCSSLTrainingArguments,
    SSLBatch,
    build_algorithm,
    class_aware_contrastive_loss,
    load_split,
)
from ccssl_hf.cli import app
from ccssl_hf.data import check_images, read_class_names, read_labels
from ccssl_hf.data.images import open_image
from ccssl_hf.deploy.convert import convert
from ccssl_hf.deploy.evaluate import evaluate
from ccssl_hf.deploy.export import export_onnx, write_handler
from ccssl_hf.deploy.predict import Classifier
from ccssl_hf.deploy.space import write_space
from ccssl_hf.hub import plan_push, upload
from ccssl_hf.metrics import classification_metrics, top_k_accuracy
from ccssl_hf.recipe import FolderArguments, RecipeArguments, load_splits
from small_models import published

RUN = CliRunner()
NAMES = ["ant", "bee"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a published model, images, and files that are none."""
    root = tmp_path_factory.mktemp("place")
    published(root / "model", "test_resnet", 32)
    for name in ("labeled/moth/1.png", "labeled/moth/2.png", "labeled/fly/1.png", "labeled/fly/2.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(len(name)).integers(0, 256, (32, 32, 3), np.uint8)).save(root / name)
    shutil.copytree(root / "labeled", root / "broken")
    (root / "broken" / "moth" / "3.png").write_bytes(b"not an image")
    (root / "broken" / "fly" / "4.png").write_bytes((root / "labeled/fly/1.png").read_bytes()[:60])
    (root / "empty").mkdir()
    (root / "a_file").write_text("text")
    (root / "weights.pth").write_bytes(b"damaged")
    write_bad_data(root)
    for name, change in CONFIGS.items():
        folder = shutil.copytree(root / "model", root / name)
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))
    return root


def write_bad_data(root: Path) -> None:
    """Folders and tables as people have them, each with one mistake."""
    content = (root / "labeled/fly/1.png").read_bytes()
    for name in (
        *("hidden/.1.png", "hidden/ant/._2.png", "stray/1.png", "stray/ant/2.png", "one_class/ant/1.png"),
        *("splits/train/1.png", "splits/val/1.png", "named/training/ant/1.png", "cased/Moth/1.png", "cased/fly/1.png"),
        *("alike/Polar Bear/1.png", "alike/polar_bear/2.png", "few/ant/1.png", "few/bee/1.png", "few/bee/2.png"),
        *("tables/1.png", "tables/2.png", "none_of_them/wolf/1.png"),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    if hasattr(os, "mkfifo"):
        (root / "pipes").mkdir()
        os.mkfifo(root / "pipes" / "1.png")
    shutil.copytree(root / "labeled", root / "float")
    Image.fromarray(np.random.default_rng(0).random((8, 8), np.float32)).save(root / "float" / "moth" / "3.tiff")
    for name, lines in TABLES.items():
        (root / "tables" / name).write_text("\n".join(lines))
    encoded = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    for name, path in {"url": "http://127.0.0.1:9/1.png", "outside": "../labeled/fly/1.png"}.items():
        image = pa.array([{"bytes": None, "path": path}], encoded)
        pq.write_table(pa.table({"image": image, "label": ["ant"]}), root / f"{name}.parquet")


TABLES = {
    "outside.csv": ["file_name,label", "../labeled/fly/1.png,fly", "1.png,moth", "/etc/passwd,moth"],
    "missing.jsonl": ['{"file_name": "1.png", "label": "ant"}', '{"file_name": "3.png", "label": "bee"}'],
    "twice.csv": ["file_name,label", "1.png,ant", "1.png,bee"],
    "no_names.csv": ["path,label", "1.png,ant"],
    "no_table.csv": ["file_name,label", '1.png,"ant', "2.png,a,b"],
}
# Published folders with one wrong entry in config.json, by the name of the folder.
CONFIGS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no_architecture": lambda config: config.pop("architecture"),
    "other_architecture": lambda config: config.update(architecture="resnet5O"),
    "few_labels": lambda config: config.update(label_names=["moth"]),
    "many_classes": lambda config: config.update(num_classes=10**9),
}


def model(labels: Any = NAMES, name: str = "test_resnet", **options: Any) -> CCSSLForImageClassification:
    return CCSSLForImageClassification.from_timm(name, labels=labels, **{"image_size": 32, **options})


def arguments(**changes: Any) -> CCSSLTrainingArguments:
    return CCSSLTrainingArguments(output_dir="unused", use_cpu=True, **changes)


def loss(**changes: Any) -> torch.Tensor:
    embeddings = torch.nn.functional.normalize(torch.randn(3, 2, 4), dim=2)
    fitting = {"embeddings": embeddings, "pseudo_labels": torch.tensor([0, 1, 0]), "confidences": torch.ones(3)}
    return class_aware_contrastive_loss(**{**fitting, **changes})


def classifier(place: Path) -> Classifier:
    return Classifier.from_pretrained(place / "model", device="cpu")


def batch() -> SSLBatch:
    return SSLBatch(torch.randn(2, 2), torch.tensor([0, 1]))


def column(**columns: Any) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns)


def fraction(labeled: Path, share: float) -> Any:
    return load_splits(RecipeArguments(labeled=str(labeled), validation_fraction=share))


def labels(values: list[Any], classes: Any = ("ant", "cow"), role: str = "validation") -> Any:
    return read_labels(column(label=values), "label", classes, role=role, allow_ood=role != "labeled")


def images(split: Any) -> None:
    check_images(split, role="test", image_column="image")


# Entry point and case: the call, and the sentence that answers it.
CALLS: dict[str, tuple[Callable[[Path], Any], str]] = {
    # Data
    "load_split: no such folder": (lambda p: load_split(p / "nowhere", role="labeled"), "nowhere' is not a folder"),
    "load_split: an empty folder": (lambda p: load_split(p / "empty", role="labeled"), "has no images in this folder"),
    "load_split: a text file": (lambda p: load_split(p / "a_file", role="test"), "a_file' is not a folder"),
    "load_split: hidden files alone": (lambda p: load_split(p / "hidden", role="labeled"), "has no images in this"),
    "load_split: images beside class folders": (
        lambda p: load_split(p / "stray", role="labeled"),
        r"outside of class folders \(1\.png\): sort images as",
    ),
    "load_split: splits as classes": (
        lambda p: load_split(p / "splits", role="labeled"),
        r"\(train, val\).*splits/train",
    ),
    "load_split: names outside of the folder": (
        lambda p: load_split(p / "tables/outside.csv", role="labeled"),
        r"outside of its folder.*not opened \(2\): \.\./labeled/fly/1\.png, /etc/passwd",
    ),
    "load_split: names of no files": (
        lambda p: load_split(p / "tables/missing.jsonl", role="test"),
        r"do not exist in its folder or in image_root \(1\): 3\.png",
    ),
    "load_split: a file in two rows": (
        lambda p: load_split(p / "tables/twice.csv", role="labeled"),
        "files in several rows.*1.png",
    ),
    "load_split: a table without file names": (
        lambda p: load_split(p / "tables/no_names.csv", role="labeled"),
        r"needs one column file_name .*\(it has path, label\)",
    ),
    "load_split: a damaged table": (lambda p: load_split(p / "tables/no_table.csv", role="test"), "cannot be read"),
    "load_split: a URL in a parquet file": (
        lambda p: load_split(p / "url.parquet", role="test"),
        r"URLs, which are not opened \(1\): http://127\.0\.0\.1:9/1\.png",
    ),
    "load_split: a parquet file of files elsewhere": (
        lambda p: load_split(p / "outside.parquet", role="test"),
        r"outside of its folder and of image_root.*\.\./labeled/fly/1\.png",
    ),
    "load_split: no such image_root": (
        lambda p: load_split(p / "labeled", role="test", image_root=p / "nowhere"),
        "image_root .*nowhere is not a folder",
    ),
    "load_splits: a fraction of zero": (lambda p: fraction(p / "few", 0), "fraction of validation images is 0"),
    "load_splits: a fraction of one": (lambda p: fraction(p / "few", 1), "fraction of validation images is 1"),
    "load_splits: a class of one image": (lambda p: fraction(p / "few", 0.5), r"no labeled image \(ant\)"),
    "load_splits: a fraction without an image of each class": (
        lambda p: fraction(p / "labeled", 0.1),
        "A fraction of 0.1 of 4 labeled images does not suit 2 classes",
    ),
    "load_splits: a fraction and a split": (
        lambda p: load_splits(RecipeArguments(labeled="a", validation="b", validation_fraction=0.1)),
        "validation_fraction is 0.1: leave one out",
    ),
    "FolderArguments: folders of other names": (
        lambda p: FolderArguments(data_dir=str(p / "named")),
        "rename training/ to labeled/",
    ),
    "read_class_names: one class": (
        lambda p: read_class_names(load_split(p / "one_class", role="test"), "label"),
        r"has one class only \(ant\)",
    ),
    "read_class_names: two names of one class": (
        lambda p: read_class_names(load_split(p / "alike", role="labeled"), "label"),
        "'polar_bear' and 'Polar Bear'|'Polar Bear' and 'polar_bear'",
    ),
    "read_labels: a class in another case": (lambda p: labels(["Cow", "ant"]), "write 'Cow' as 'cow'"),
    "read_labels: a class in another Unicode form": (lambda p: labels(["a\u0308", "ant"], ["\u00e4", "ant"]), "write"),
    "read_labels: names that are no class": (lambda p: labels(["wolf", "fox"]), r"\(wolf, fox\)"),
    "read_labels: numbers from one": (lambda p: labels([1, 2]), "start at 1 and not at 0: subtract 1"),
    "read_labels: numbers beyond the classes": (lambda p: labels([0, 7], role="labeled"), r"classes \(7\)"),
    "read_labels: halves": (lambda p: labels([0.5, 1.0]), "holds .*, not labels: set label_column"),
    "open_image: floats without a range": (
        lambda p: open_image(p / "float/moth/3.tiff"),
        "float values without a declared range: convert the image",
    ),
    "open_image: too many pixels": (
        lambda p: open_image(p / "labeled/fly/1.png", max_pixels=100),
        "32 x 32 pixels, at most 100 are allowed",
    ),
    "check_images: splits in a dictionary": (lambda p: images(datasets.DatasetDict(test=column(x=[1]))), "pass one of"),
    "check_images: a streamed split": (lambda p: images(column(x=[1]).to_iterable_dataset()), "streaming=False"),
    "check_images: no images": (lambda p: images(column(image=["1.png"])), "cast it with cast_column"),
    "check_images: no rows": (lambda p: images(column(image=[])), "test split is empty"),
    # Models
    "from_timm: no such backbone": (lambda p: model(name="resnet5O"), "no model 'resnet5O'.*resnet50"),
    "from_timm: a hub id": (lambda p: model(name="timm/resnet18"), "is not a timm name"),
    "from_timm: one text as labels": (lambda p: model(labels="ant,bee"), "labels must be a list of class names"),
    "from_timm: numbers as labels": (lambda p: model(labels=[0, 1]), "labels must be a list of class names"),
    "from_timm: no labels": (lambda p: model(labels=[]), "labels must be distinct and not empty"),
    "from_timm: a label twice": (lambda p: model(labels=["a", "a"]), r"labels must be distinct.*\['a'\]"),
    "from_timm: a number of classes": (lambda p: model(num_classes=3), "num_classes follows from the labels"),
    "from_timm: two sizes": (lambda p: model(name="test_vit", img_size=64), "image_size is 32 but img_size is 64"),
    "from_timm: images that are not square": (lambda p: model(image_size=(64, 128)), "image_size"),
    "from_timm: a size of zero": (lambda p: model(image_size=0), "image_size"),
    "from_timm: a negative size": (lambda p: model(image_size=-32), "image_size"),
    "from_timm: one channel": (lambda p: model(in_chans=1), "in_chans"),
    "from_timm: a head with a layer that cannot be saved": (
        lambda p: model(heads={"own": torch.nn.Conv2d(1, 1, 1)}),
        "A head cannot contain Conv2d",
    ),
    "from_pretrained: no such folder": (
        lambda p: CCSSLForImageClassification.from_pretrained(str(p / "nowhere")),
        "is neither a local folder nor a readable Hub repository",
    ),
    "from_pretrained: an empty folder": (
        lambda p: CCSSLForImageClassification.from_pretrained(p / "empty"),
        "has no config.json",
    ),
    "from_pretrained: no architecture": (
        lambda p: CCSSLForImageClassification.from_pretrained(p / "no_architecture"),
        "architecture",
    ),
    "from_pretrained: an unknown architecture": (
        lambda p: CCSSLForImageClassification.from_pretrained(p / "other_architecture"),
        "no model 'resnet5O'",
    ),
    "from_pretrained: too few label names": (
        lambda p: CCSSLForImageClassification.from_pretrained(p / "few_labels"),
        "label_names",
    ),
    "from_pretrained: a billion classes": (
        lambda p: CCSSLForImageClassification.from_pretrained(p / "many_classes"),
        "classes",
    ),
    "save_pretrained: other keys": (
        lambda p: model().save_pretrained(p / "out", state_dict={"x": torch.zeros(1)}),
        "state_dict must have the model's keys",
    ),
    # Algorithms and losses
    "build_algorithm: an unknown name": (lambda p: build_algorithm("fixmtach", num_classes=2), "'fixmtach'.*fixmatch"),
    "build_algorithm: an unknown hyperparameter": (
        lambda p: build_algorithm("fixmatch", num_classes=2, treshold=0.9),
        "no hyperparameter 'treshold'",
    ),
    "build_algorithm: a threshold above one": (
        lambda p: build_algorithm("fixmatch", num_classes=2, confidence_threshold=95),
        "confidence_threshold is 95",
    ),
    "build_algorithm: flexmatch without a number of images": (
        lambda p: build_algorithm("flexmatch", num_classes=2),
        "num_unlabeled",
    ),
    "an algorithm: a batch without unlabeled views": (
        lambda p: build_algorithm("fixmatch", num_classes=2, lambda_contrast=0.0)(batch()),
        "logits_weak",
    ),
    "the loss: embeddings of one view": (lambda p: loss(embeddings=torch.randn(3, 4)), r"embeddings.*\[N, 2, D\]"),
    "the loss: too few pseudo labels": (lambda p: loss(pseudo_labels=torch.tensor([0, 1])), "pseudo_labels"),
    "the loss: too few confidences": (lambda p: loss(confidences=torch.ones(2)), "confidences"),
    "the loss: a temperature of zero": (lambda p: loss(temperature=0.0), "temperature"),
    "the loss: another weight of a pair": (lambda p: loss(own_pair_weight="two"), "own_pair_weight"),
    # Settings
    "arguments: mu of zero": (lambda p: arguments(mu=0), "mu is 0: set it to 1 or more"),
    "arguments: no steps": (lambda p: arguments(max_steps=0), "max_steps is 0"),
    "arguments: a decay of one": (lambda p: arguments(ema_decay=1.0), "ema_decay is 1.0"),
    "arguments: epochs": (lambda p: arguments(num_train_epochs=3), "num_train_epochs.*set max_steps"),
    "arguments: an evaluation each epoch": (lambda p: arguments(eval_strategy="epoch"), "eval_strategy"),
    "arguments: a negative learning rate": (lambda p: arguments(learning_rate=-0.1), "learning_rate"),
    "arguments: a learning rate of NaN": (
        lambda p: arguments(learning_rate=float("nan")),
        "learning_rate",
    ),
    "arguments: another crop": (lambda p: arguments(weak_crop="none"), "weak_crop is 'none': choose one of"),
    "arguments: momentum without SGD": (lambda p: arguments(optim="adamw_torch", nesterov=False), "no effect"),
    "arguments: an unknown packaged config": (
        lambda p: CCSSLTrainingArguments.from_config("nowhere"),
        "config nowhere cannot be read",
    ),
    "arguments: a config with an unknown key": (
        lambda p: CCSSLTrainingArguments.from_config(text(p / "a.yaml", "output_dir: x\nmue: 3\n")),
        "unknown key 'mue'. Did you mean 'mu'",
    ),
    "arguments: a config with a text for a number": (
        lambda p: CCSSLTrainingArguments.from_config(text(p / "b.yaml", "output_dir: x\nmu: many\n")),
        "mu",
    ),
    "arguments: a config of a list": (
        lambda p: CCSSLTrainingArguments.from_config(text(p / "c.yaml", "- mu\n")),
        "has no settings",
    ),
    # Metrics
    "metrics: other lengths": (lambda p: classification_metrics(np.zeros((3, 2)), np.zeros(4, int)), "3.*4|4.*3"),
    "metrics: logits that are not finite": (
        lambda p: classification_metrics(np.full((2, 2), np.nan), np.array([0, 1])),
        "finite|NaN",
    ),
    "metrics: k of zero": (lambda p: top_k_accuracy(np.zeros((2, 2)), np.array([0, 1]), 0), "k"),
    # Published models
    "Classifier: no such device": (
        lambda p: Classifier.from_pretrained(p / "model", device="gpu"),
        "no device 'gpu' here",
    ),
    "evaluate: no label column": (
        lambda p: evaluate(classifier(p), load_split(p / "labeled", role="unlabeled"), "test"),
        "has no column 'label'",
    ),
    "evaluate: images that cannot be read": (
        lambda p: evaluate(classifier(p), load_split(p / "broken", role="test"), "test"),
        r"(?s)(3\.png.*4\.png|4\.png.*3\.png)",
    ),
    "plan_push: no model": (lambda p: plan_push(p / "empty"), "has no config.json"),
    "upload: an invalid name": (lambda p: upload({}, "a/b/c"), "is not a Hub id"),
    "write_handler: no model": (lambda p: write_handler(p / "empty"), "has no config.json"),
    "export_onnx: into the published folder": (
        lambda p: export_onnx(CCSSLForImageClassification.from_pretrained(p / "model"), p / "model"),
        "is a published folder",
    ),
    "write_space: no model": (lambda p: write_space(p / "empty", p / "space"), "config.json"),
    "convert: no such file": (
        lambda p: convert("usb", p / "none.pth", p / "out", labels=NAMES, backbone="wide_resnet28_2_cifar"),
        "There is no file",
    ),
    "convert: a damaged file": (
        lambda p: convert("usb", p / "weights.pth", p / "out", labels=NAMES, backbone="wide_resnet28_2_cifar"),
        "is not a checkpoint of torch.save, or is damaged",
    ),
    "convert: an unknown source of weights": (
        lambda p: convert("usb", p / "weights.pth", p / "out", labels=NAMES, backbone="resnet50", weights="best"),
        "weights is 'best'",
    ),
}


def text(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("case", CALLS)
def test_a_call_with_bad_input_raises_one_sentence(case: str, place: Path) -> None:
    call, sentence = CALLS[case]
    with pytest.raises((ValueError, TypeError, OSError), match=sentence) as caught:
        call(place)
    assert len(str(caught.value)) < 1500 and "Traceback" not in str(caught.value)


SUPERVISED = "--algorithm supervised --lambda_contrast 0 --push_threshold none --confidence_threshold none"
# A command line after `ccssl-hf`, with {p} for the folder of this file's fixture, and the sentence that answers it.
COMMANDS: dict[str, str] = {
    "train": "no labeled split",
    "train --data_dir {p}/nowhere": "nowhere' has no folder labeled/",
    "train --labeled {p}/nowhere --output_dir {p}/out": "nowhere' is not a folder",
    "train --labeled {p}/empty --output_dir {p}/out": "has no images in this folder",
    "train --labeld {p}/labeled": "Unknown argument --labeld. Did you mean 'labeled'",
    "train --mu many": "mu",
    "train --config {p}/none.yaml": "cannot be read",
    "train --labeled {p}/labeled --backbone resnet5O --output_dir {p}/out": "no model 'resnet5O'",
    "train --labeled {p}/labeled --algorithm fixmtach --output_dir {p}/out": "fixmtach",
    "train --labeled {p}/labeled --model {p}/model --image_size 64 --output_dir {p}/out": "leave out pretrained",
    "train --labeled {p}/labeled --backbone test_resnet {supervised} --output_dir {p}/a_file/out": "cannot be written to",
    "train --labeled {p}/labeled --image_size 32,64 --output_dir {p}/out": "image_size",
    "train --labeled {p}/labeled --max_image_pixels 0 --output_dir {p}/out": "max_image_pixels is 0",
    "check --labeled {p}/nowhere": "nowhere' is not a folder",
    "check --labeled {p}/broken": r"(?s)2 unreadable images.*4\.png: .*3\.png: ",
    "check --labeled {p}/float": r"(?s)1 unreadable image\..*3\.tiff: .*float values without a declared range",
    "check --labeled {p}/labeled --max_image_pixels 100": "(?s)4 unreadable images.*at most 100 are allowed",
    "check --labeled {p}/labeled --validation {p}/cased": "write 'Moth' as 'moth'",
    "check --labeled {p}/few --validation_fraction 0.5": r"no labeled image \(ant\)",
    "check --labeled {p}/tables/outside.csv": r"\.\./labeled/fly/1\.png, /etc/passwd",
    "check --labeled {p}/pipes": r"pipes, sockets and devices \(1\)",
    "evaluate {p}/model {p}/cased": "write 'Moth' as 'moth'",
    "evaluate {p}/model {p}/none_of_them": r"\(wolf\)",
    "evaluate {p}/model {p}/float": "float values without a declared range",
    "evaluate {p}/model {p}/url.parquet": "URLs, which are not opened",
    "evaluate {p}/nowhere {p}/labeled": "neither a local folder nor",
    "evaluate {p}/model {p}/nowhere": "nowhere' is not a folder",
    "evaluate {p}/model {p}/broken": r"[34]\.png",
    "evaluate {p}/model {p}/labeled --label-column kind": "no column 'kind'",
    "predict {p}/nowhere {p}/labeled {p}/out.parquet": "neither a local folder nor",
    "predict {p}/model {p}/empty {p}/out.parquet": "no image files",
    "predict {p}/model {p}/labeled {p}/out.xlsx": "xlsx",
    "predict {p}/model {p}/labeled {p}/empty": "is a folder",
    "predict {p}/model {p}/broken {p}/out.parquet --strict": r"[34]\.png",
    "report {p}/nowhere": "neither a local folder nor",
    "report {p}/model --split test={p}/nowhere": "nowhere' is not a folder",
    "push {p}/empty user/name": "has no config.json",
    "push {p}/model not/a/name --dry-run": "is not a Hub id",
    "serve {p}/nowhere": "neither a local folder nor",
    "space {p}/nowhere {p}/space": "neither a local folder nor",
    "space {p}/model {p}/space --labeled {p}/nowhere": "nowhere' is not a folder",
    "export onnx {p}/nowhere": "neither a local folder nor",
    "export handler {p}/empty": "has no config.json",
    "convert usb {p}/none.pth {p}/out --labels a,b --backbone wide_resnet28_2_cifar": "There is no file",
    "convert moco {p}/weights.pth {p}/out --labels a,b": "is damaged",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_with_bad_input_ends_with_one_line(command: str, place: Path) -> None:
    result = RUN.invoke(app, command.replace("{supervised}", SUPERVISED).replace("{p}", str(place)).split())
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in result.output
    assert re.search(COMMANDS[command], result.stderr), result.stderr


def test_there_are_at_least_a_hundred_cases() -> None:
    assert len(CALLS) + len(COMMANDS) >= 100
