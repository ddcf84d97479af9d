"""Splits from real image folders, parquet files and packs."""

from __future__ import annotations

import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from ccssl_hf.data import read_class_names, read_labels
from ccssl_hf.images import PixelTable
from ccssl_hf.sources import load_split, skipped
from conftest import SHARED, needs_shared
from pictures import mixed_sizes, write

SIZE = 16


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_an_image_folder_gives_its_class_folders_as_labels(tmp_path: Path) -> None:
    root = tmp_path / "my [test] images, train"  # names of splits, and characters of a pattern
    for number, name in enumerate(("test bird/1.PNG", "test bird/2.jpg", "train cat/1.Jpeg", "dog/val/ant/1.png")):
        write(root / name, number)
    (root / "train cat" / "notes.txt").write_text("not an image")
    found = load_split(str(root), role="labeled")
    assert found.features["label"].names == ["dog", "test bird", "train cat"]  # the first folder below the root
    assert [found.features["label"].int2str(label) for label in found["label"]] == [
        "dog", "test bird", "test bird", "train cat",
    ]  # fmt: skip
    assert skipped(found) == {"files that are no images": ["train cat/notes.txt"]}


def test_unlabeled_folders_may_nest_and_lose_their_labels(tmp_path: Path) -> None:
    for name in ("1.png", "test/2.png", "train/deep/er/3.JPG"):
        write(tmp_path / "unlabeled" / name)
    (tmp_path / "unlabeled" / "metadata.csv").write_text("file_name,label\n1.png,x\n")
    found = load_split(str(tmp_path / "unlabeled"), role="unlabeled")
    assert (len(found), found.column_names) == (3, ["image"])


def test_a_changed_file_in_a_folder_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "1.png"
    rows = []
    for seed in (0, 1):
        write(file, seed)
        images = load_split(str(tmp_path / "folder"), role="unlabeled")
        rows.append(PixelTable(images, image_column="image", size=SIZE, role="unlabeled").read(np.array([0])))
        time.sleep(0.02)  # for file systems with coarse clocks
    assert not torch.equal(*rows)


def test_parquet_is_read_from_a_file_a_folder_and_a_glob(tmp_path: Path) -> None:
    folder = tmp_path / "pack [1]"
    folder.mkdir()
    mixed_sizes(2).to_parquet(folder / "a.parquet")
    mixed_sizes(3, first=2).to_parquet(folder / "b.parquet")
    assert len(load_split(str(folder / "a.parquet"), role="labeled")) == 2
    assert len(load_split(str(folder), role="labeled")) == 5
    plain = tmp_path / "plain"
    plain.mkdir()
    mixed_sizes(2).to_parquet(plain / "x-0.parquet")
    mixed_sizes(3).to_parquet(plain / "x-1.parquet")
    assert len(load_split(f"{plain}/x-*.parquet", role="test")) == 5


@needs_shared
def test_a_pack_is_read_with_its_class_names() -> None:
    found = load_split(str(SHARED / "data" / "butterfly10_mini" / "labeled.parquet"), role="labeled")
    names = read_class_names(found, "label")
    assert (len(found), len(names)) == (73, 10)
    assert read_labels(found, "label", names, role="labeled", allow_ood=False).tolist() == found["label"]
