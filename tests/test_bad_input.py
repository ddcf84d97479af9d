"""Invalid input raises an error that names the fix, before an image is decoded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from transformers import TrainingArguments

from ccssl_hf import CCSSLForImageClassification, CCSSLTrainer, CCSSLTrainingArguments
from ccssl_hf.data import read_class_names
from ccssl_hf.data.sources import load_split
from ccssl_hf.recipe import RecipeArguments, build_trainer

NAMES = ["ant", "bee", "cat"]
BACKBONE = "wide_resnet10_1_cifar"


def rows(
    count: int, labels: list[Any] | None = None, feature: Any = None, column: str = "label", image: str = "image"
) -> datasets.Dataset:
    """Rows whose images cannot be decoded: decoding one would raise another error than the expected one."""
    labels = [i % 3 for i in range(count)] if labels is None else labels
    columns = {image: [{"bytes": b"not an image", "path": None}] * count, column: labels, "photo": ["x"] * count}
    features = {
        image: datasets.Image(),
        column: feature or datasets.ClassLabel(names=NAMES),
        "photo": datasets.Value("string"),
    }
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def model(labels: list[str] = NAMES, backbone: str = BACKBONE, **options: Any) -> CCSSLForImageClassification:
    return CCSSLForImageClassification.from_timm(backbone, labels=labels, image_size=16, **options)


@pytest.fixture(scope="module")
def network() -> CCSSLForImageClassification:
    return model()


def arguments(folder: Path, **changes: Any) -> CCSSLTrainingArguments:
    small = {"max_steps": 2, "per_device_train_batch_size": 4, "mu": 2, "use_cpu": True, "report_to": "none"}
    return CCSSLTrainingArguments(**{"output_dir": str(folder), **small, **changes})


def without_label() -> datasets.Dataset:
    return rows(12).rename_column("label", "labels")


def stream() -> Any:
    return rows(12).to_iterable_dataset()


def splits() -> datasets.DatasetDict:
    return datasets.DatasetDict(train=rows(12), test=rows(12))


# What is handed to the trainer in place of what it expects, and the sentence that answers.
DATA: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no label column": (
        {"train_dataset": without_label},
        {},
        r"labeled split has no column 'label' \(it has .*set label_column. Did you mean 'labels'",
    ),
    "no image column": (
        {"unlabeled_dataset": lambda: rows(12, image="images")},
        {},
        "unlabeled split has no column 'image'.*set image_column. Did you mean 'images'",
    ),
    "an image column of another name": (
        {},
        {"image_column": "img"},
        "labeled split has no column 'img'.*set image_column",
    ),
    "a column of text as images": (
        {},
        {"image_column": "photo"},
        r"Column 'photo' of the labeled split holds .*choose another image_column, or cast it with cast_column",
    ),
    "no hidden label column": (
        {},
        {"hidden_label_column": "truth"},
        "unlabeled split has no column 'truth'.*set hidden_label_column",
    ),
    "a label outside the classes": (
        {"train_dataset": lambda: rows(3, [0, 1, 3], datasets.Value("int64"))},
        {},
        r"1 labels of the labeled split are not among the 3 classes \(3\): drop those rows, or build the model",
    ),
    "unlabeled rows in the labeled split": (
        {"train_dataset": lambda: rows(4, [0, 1, -1, -1])},
        {},
        r"2 labels of the labeled split are not among the 3 classes \(-1\): drop those rows",
    ),
    "a class the model lacks": (
        {"train_dataset": lambda: rows(12, [0, 1] * 6, datasets.ClassLabel(names=["ant", "wasp"]))},
        {},
        r"6 labels of the labeled split .*\(wasp\)",
    ),
    "other label names in validation": (
        {"eval_dataset": lambda: rows(3, [0, 1, 2], datasets.ClassLabel(names=["ants", "bees", "cats"]))},
        {},
        "3 labels of the evaluation split .*ants, bees, cats.*Did you mean 'ant'",
    ),
    "classes written in another way in validation": (
        {"eval_dataset": lambda: rows(3, [0, 1, 2], datasets.ClassLabel(names=["Ant", "bee", "CAT"]))},
        {},
        "2 labels of the evaluation split .*write 'Ant' as 'ant', 'CAT' as 'cat'",
    ),
    "hidden labels written in another way": (
        {"unlabeled_dataset": lambda: rows(24, ["Ant", "bee"] * 12, datasets.Value("string"))},
        {"hidden_label_column": "label"},
        "12 labels of the unlabeled split .*write 'Ant' as 'ant'",
    ),
    "labels that start at 1": (
        {"train_dataset": lambda: rows(3, [1, 2, 3], datasets.Value("int64"))},
        {},
        "'label' of the labeled split holds 1 to 3, so its labels seem to start at 1",
    ),
    "rows without labels": (
        {"train_dataset": lambda: rows(4, [0, None, 1, None])},
        {},
        r"2 labels of the labeled split .*\(null\).*\(rows 1, 3\)",
    ),
    "several labels an image": (
        {"train_dataset": lambda: rows(2, [[0], [1, 2]], datasets.List(datasets.Value("int64")))},
        {},
        "not labels: set label_column to a column with one label per image",
    ),
    "numbers as labels of validation": (
        {"eval_dataset": lambda: rows(3, [0, 1, 7], datasets.Value("int64"))},
        {},
        r"1 labels of the evaluation split .*\(7\)",
    ),
    "no label column in one of two validations": (
        {"eval_dataset": lambda: {"near": rows(3), "far": without_label()}},
        {},
        "The far split has no column 'label'",
    ),
    "an empty labeled split": (
        {"train_dataset": lambda: rows(0)},
        {},
        "labeled split is empty: pass a split that holds",
    ),
    "an empty unlabeled split": ({"unlabeled_dataset": lambda: rows(0)}, {}, "unlabeled split is empty"),
    "an empty validation split": ({"eval_dataset": lambda: rows(0)}, {}, "evaluation split is empty"),
    "a stream": ({"train_dataset": stream}, {}, "labeled split is streamed.*load it with streaming=False"),
    "an unlabeled stream": (
        {"unlabeled_dataset": stream},
        {},
        "unlabeled split is streamed.*load it with streaming=False",
    ),
    "a dictionary of splits": (
        {"train_dataset": splits},
        {},
        r"labeled split is a dictionary of splits \(train, test\): pass one of them",
    ),
    "a torch dataset": (
        {"train_dataset": lambda: torch.utils.data.TensorDataset(torch.zeros(3))},
        {},
        "labeled split is a TensorDataset: pass a datasets.Dataset",
    ),
    "no labeled images": ({"train_dataset": lambda: None}, {}, "labeled split is a NoneType: pass a datasets.Dataset"),
    "no unlabeled images": (
        {"unlabeled_dataset": lambda: None},
        {},
        "'fixmatch'.*pass unlabeled_dataset, or set algorithm='supervised'",
    ),
    "no unlabeled images for flexmatch": (
        {"unlabeled_dataset": lambda: None},
        {"algorithm": "flexmatch"},
        "'flexmatch'.*pass unlabeled_dataset",
    ),
    "no unlabeled images for supervised with CCSSL": (
        {"unlabeled_dataset": lambda: None},
        {"algorithm": "supervised", "lambda_contrast": 1.0},
        "'supervised'.*lambda_contrast=0",
    ),
    "fewer labeled images than a batch": (
        {"train_dataset": lambda: rows(3)},
        {},
        "3 labeled images are fewer than a batch of 4: lower per_device_train_batch_size, or set repeat_labeled=True",
    ),
    "fewer unlabeled images than a step": (
        {"unlabeled_dataset": lambda: rows(7)},
        {},
        "7 unlabeled images are fewer than the 8 of a step: lower mu",
    ),
    "an unknown algorithm": (
        {},
        {"algorithm": "fixmtach"},
        r"[Uu]nknown algorithm 'fixmtach'. Did you mean 'fixmatch'.*supervised",
    ),
    "a hyperparameter of another algorithm": ({}, {"n_sigma": 2.0}, "fixmatch has no hyperparameter 'n_sigma'"),
    "a hyperparameter out of range": (
        {},
        {"confidence_threshold": 95.0},
        r"confidence_threshold is 95.0: choose a value in \[0, 1\]",
    ),
    "shifted crops of streamed images": (
        {},
        {"decode": "stream", "weak_crop": "pad"},
        "weak_crop='pad'.*set weak_crop='resized'",
    ),
    "a cutout of a negative size": ({}, {"cutout_size": -1}, "cutout_size=-1: use 0"),
}


@pytest.mark.parametrize("case", DATA)
def test_data_that_can_not_be_trained_on_is_refused(
    case: str, network: CCSSLForImageClassification, tmp_path: Path
) -> None:
    given, changes, sentence = DATA[case]
    expected: dict[str, Any] = {"train_dataset": rows(12), "unlabeled_dataset": rows(24), "eval_dataset": rows(6)}
    with pytest.raises(ValueError, match=sentence):
        CCSSLTrainer(
            network, arguments(tmp_path / "out", **changes), **{**expected, **{k: make() for k, make in given.items()}}
        )


def test_another_class_of_arguments_is_refused(network: CCSSLForImageClassification, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"args is a TrainingArguments: pass ccssl_hf.CCSSLTrainingArguments"):
        CCSSLTrainer(network, TrainingArguments(output_dir=str(tmp_path), use_cpu=True), train_dataset=rows(12))  # type: ignore[arg-type]


def test_another_class_of_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"model is a Linear: build one with CCSSLForImageClassification.from_timm"):
        CCSSLTrainer(torch.nn.Linear(1, 1), arguments(tmp_path), train_dataset=rows(12))  # type: ignore[arg-type]


def test_an_output_folder_that_can_not_be_written_is_refused(
    network: CCSSLForImageClassification, tmp_path: Path
) -> None:
    file = tmp_path / "a file"
    file.touch()
    with pytest.raises(ValueError, match=r"The folder .*a file/out cannot be written to .*choose another folder"):
        CCSSLTrainer(network, arguments(file / "out"), train_dataset=rows(12), unlabeled_dataset=rows(24))


NETWORKS: dict[str, tuple[Callable[[], Any], str]] = {
    "a misspelt backbone": (lambda: model(backbone="resnet5O"), r"no model 'resnet5O'.*[Dd]id you mean .*resnet50"),
    "a path as backbone": (lambda: model(backbone="my/model.pt"), "is not a timm name"),
    "a tag that there is not": (lambda: model(backbone="resnet50.moco"), "resnet50.moco.*use one of"),
    "labels that repeat": (lambda: model(labels=["ant", "ant"]), "labels must be distinct.*ant"),
    "no labels": (lambda: model(labels=[]), "labels must be distinct and not empty"),
    "a size that the backbone can't take": (lambda: model(backbone="vit_tiny_patch16_224", img_size=15), "image_size"),
}


@pytest.mark.parametrize("case", NETWORKS)
def test_networks_that_there_are_not_are_refused(case: str) -> None:
    make, sentence = NETWORKS[case]
    with pytest.raises(ValueError, match=sentence):
        make()


def folder(root: Path, *files: str) -> str:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".png"):
            Image.new("RGB", (8, 8)).save(root / name)
        else:
            (root / name).write_text("text")
    return str(root)


SOURCES: dict[str, tuple[Callable[[Path], str], str]] = {
    "a path that there is not": (
        lambda p: "/nope",
        "^The labeled split '/nope' is not a folder or parquet file: give an image folder, parquet",
    ),
    "a relative path that there is not": (
        lambda p: "./nope/a",
        "^The labeled split './nope/a' is not a folder or parquet file",
    ),
    "a file of another kind": (lambda p: folder(p, "x.zip") + "/x.zip", "x.zip' is not a folder or parquet file"),
    "a parquet file that there is not": (lambda p: f"{p}/x.parquet", r"\(no such parquet file\): check the path"),
    "a pattern that matches nothing": (lambda p: f"{p}/*.parquet", r"\(no such parquet file\): check the path"),
    "a parquet file that is none": (
        lambda p: folder(p, "x.parquet") + "/x.parquet",
        "x.parquet' cannot be read .*write the file again",
    ),
    "a folder without images": (lambda p: folder(p, "a/notes.txt"), "has no images in this folder or below it: give a"),
    "an empty folder": (lambda p: folder(p / "sub", "x.txt")[: -len("/sub")], "has no images in this folder"),
    "images beside the class folders": (
        lambda p: folder(p, "cat/1.png", "dog/1.png", "3.png"),
        r"images outside of class folders \(3.png\): sort images as <class>/<image>",
    ),
    "a single class": (
        lambda p: folder(p, "cat/1.png", "cat/2.png"),
        r"has one class only \(cat\): label images of two or more",
    ),
}


@pytest.mark.parametrize("case", SOURCES)
def test_sources_that_can_not_be_read_are_refused(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    make, sentence = SOURCES[case]
    source = make(tmp_path / "data")
    with pytest.raises(ValueError, match=sentence):
        read_class_names(load_split(source, role="labeled"), "label")


def test_a_recipe_needs_labeled_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no labeled split: set labeled to an image folder"):
        build_trainer(RecipeArguments(backbone=BACKBONE), arguments(tmp_path))


def test_a_misspelt_label_column_is_named() -> None:
    with pytest.raises(ValueError, match=r"labeled split has no column 'lable'.*Did you mean 'label'"):
        read_class_names(rows(3), "lable")
