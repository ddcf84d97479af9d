"""Splits from real image folders, parquet files and packs."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import HfApi
from PIL import Image

from ccssl_hf.data import fingerprint, read_class_names, read_labels
from ccssl_hf.data.pixels import PixelTable
from ccssl_hf.data.sources import load_split, skipped
from ccssl_hf.deploy.evaluate import load_labeled
from ccssl_hf.deploy.predict import open_images
from conftest import SHARED, needs_shared
from hub_server import TOKENS, Hub
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


# ------------------------------------------------------------------------------------------------------- image folders


def paths(split: datasets.Dataset, root: Path) -> list[str]:
    encoded = split.cast_column("image", datasets.Image(decode=False))["image"]
    assert all(each["bytes"] is None for each in encoded)
    return [str(Path(each["path"]).relative_to(root)) for each in encoded]


def named(split: datasets.Dataset) -> list[str]:
    return [split.features["label"].int2str(label) for label in split["label"]]


def save(path: Path, kind: str = "PNG") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path, kind)


def messy_folder(root: Path, elsewhere: Path) -> list[str]:
    """Two classes, with all that people's folders hold. Returns the images."""
    images = ["cat/day1/1.AVIF", "cat/day2/1.png", "dog/2.qoi", "dog/3", "dog/4.png.bak", "wolf/x/5.jpg"]
    for name, kind in zip(images[:-1], ("AVIF", "PNG", "QOI", "JPEG", "PNG"), strict=True):
        save(root / name, kind)
    save(elsewhere / "x" / "5.jpg", "JPEG")
    (root / "wolf").symlink_to(elsewhere)
    for name in ("cat/.ipynb_checkpoints/1.png", "__MACOSX/cat/2.png", "dog/._2.png"):
        save(root / name)
    for name in ("dog/Thumbs.db", "dog/notes.txt", "dog/6.jxl", "dog/7.HEIC", "dog/scan.h5"):
        (root / name).write_bytes(b"P1 is a patient")
    (root / "dog" / "back").symlink_to(root)
    (root / "empty").mkdir()
    os.mkfifo(root / "dog" / "8.png")
    return images


HIDDEN = {"__MACOSX/", "cat/.ipynb_checkpoints/", "dog/._2.png", "dog/Thumbs.db"}


def test_a_folder_as_people_have_it_gives_all_images_and_names_what_is_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fault_record: Callable[[str, str, str], None]
) -> None:
    root = tmp_path / "labeled"
    images = messy_folder(root, tmp_path / "elsewhere")
    with caplog.at_level(logging.WARNING):
        split = load_split(root, role="labeled")
    assert paths(split, root) == images
    assert named(split) == ["cat", "cat", "dog", "dog", "dog", "wolf"]
    missed = skipped(split.shuffle(seed=0).select([1, 0]))  # kept with the dataset
    assert set(missed.pop("hidden files")) == HIDDEN
    assert missed == {
        "images that Pillow cannot open here, install pillow-jxl-plugin": ["dog/6.jxl"],
        "images that Pillow cannot open here, install pillow-heif": ["dog/7.HEIC"],
        "files that are no images": ["dog/notes.txt", "dog/scan.h5"],
        "links back to a folder above them": ["dog/back/"],
        "pipes, sockets and devices": ["dog/8.png"],
        "class folders without images": ["empty"],
    }
    [line] = caplog.messages
    assert "files that are no images (2): dog/notes.txt, dog/scan.h5" in line and "empty" in line
    assert not any(name in line for name in HIDDEN)
    fault = "an image folder with links, a link to itself, hidden files, a pipe, files that are no images"
    fault_record(fault, "all images are read, and what is skipped is counted and named", "0 images")


def test_training_and_predict_find_the_same_images(tmp_path: Path) -> None:
    root = tmp_path / "images"
    images = messy_folder(root, tmp_path / "elsewhere")
    for found in (load_split(root, role="unlabeled"), open_images(root), open_images(f"{root}/**/*")):
        assert paths(found, root) == images
    assert paths(open_images(f"{root}/*/*"), root) == [image for image in images if image.count("/") == 1]
    assert paths(open_images(root / "dog" / "._2.png"), root) == ["dog/._2.png"]  # the user names it
    with pytest.raises(ValueError, match=r"no image files; .*install pillow-heif \(1\): 7.HEIC"):
        open_images(root / "dog" / "7.HEIC")


def test_links_to_each_other_end_and_a_link_to_nowhere_is_an_unreadable_image(tmp_path: Path) -> None:
    root = tmp_path / "images"
    for name, other in (("a", "b"), ("b", "a")):
        save(root / name / "1.png")
        (root / name / "other").symlink_to(root / other)
        (root / name / "up").symlink_to(tmp_path)
    (root / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    found = paths(load_split(root, role="labeled"), root)
    assert found == ["a/1.png", "a/gone.png", "a/other/1.png", "b/1.png", "b/other/1.png", "b/other/gone.png"]


def test_names_that_are_not_utf8_are_skipped_and_named(tmp_path: Path) -> None:
    save(tmp_path / "images" / "1.png")
    (Path(os.fsdecode(os.fsencode(tmp_path / "images") + b"/caf\xe9.png"))).write_bytes(b"")
    split = load_split(tmp_path / "images", role="unlabeled")
    assert len(split) == 1 and skipped(split) == {"files whose names are not UTF-8": ["caf\\udce9.png"]}


def test_folders_that_cannot_be_opened_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "c"):
        save(tmp_path / name / "1.png")
    opened = os.scandir

    def scandir(path: Any) -> Any:  # root may open folders of any mode
        if str(path).endswith(("/b", "/c")):
            raise PermissionError(13, "Permission denied", path)
        return opened(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match=r"Folders cannot be opened: .*/b, .*/c\."):
        load_split(tmp_path, role="labeled")


@pytest.mark.parametrize(
    ("files", "role", "sentence"),
    [
        (["train/cat/1.png", "val/cat/1.png"], "labeled", r"named like splits \(train, val\).*such as .*/train"),
        (["Test/cat/1.png", "labeled/cat/1.png", "x/1.png"], "test", r"named like splits \(Test, labeled\)"),
        (["train/1.png"], "validation", r"named like splits \(train\)"),
        (
            ["photos/cat/1.png", "photos/dog/1.png"],
            "labeled",
            r"\(photos\): if the folders in it \(cat, dog\).*/photos",
        ),
        (["1.png", "2.png", "a/1.png"], "labeled", r"outside of class folders \(1.png, 2.png\): sort images"),
    ],
)
def test_a_folder_whose_folders_are_no_classes_is_refused(
    files: list[str], role: str, sentence: str, tmp_path: Path
) -> None:
    for name in files:
        save(tmp_path / name)
    with pytest.raises(ValueError, match=sentence):
        load_split(tmp_path, role=role)
    assert len(load_split(tmp_path, role="unlabeled")) == len(files)


def test_one_class_may_be_called_train(tmp_path: Path) -> None:
    for name in ("car/1.png", "train/1.png", "test bird/1.png"):
        save(tmp_path / name)
    assert read_class_names(load_split(tmp_path, role="labeled"), "label") == ["car", "test bird", "train"]


# ----------------------------------------------------------------------------------------- metadata and tables of files


def table(file: Path, text: str, *images: str) -> Path:
    for name in images:
        save(file.parent / name)
    file.write_text(text, encoding="utf-8")
    return file


def test_metadata_gives_labels_and_other_columns(tmp_path: Path) -> None:
    images = ("a/1.png", "2.png", "3.png")
    table(tmp_path / "metadata.csv", "file_name,label,place\na/1.png,NA,7\n2.png,cat,8\n", *images)
    split = load_split(tmp_path, role="labeled")
    assert split.column_names == ["image", "label", "place"] and paths(split, tmp_path) == ["a/1.png", "2.png"]
    assert (list(split["label"]), list(split["place"])) == (["NA", "cat"], [7, 8])  # NA is a word
    assert skipped(split) == {"images without a row in the metadata": ["3.png"]}
    theirs = datasets.load_dataset("imagefolder", data_files=[f"{tmp_path}/**"], split="train")
    assert theirs.column_names == ["image", "label", "place"] and theirs["place"] == list(split["place"])
    assert fingerprint(theirs, "image") == fingerprint(split, "image")


def test_metadata_may_lie_in_folders_and_be_json_or_parquet(tmp_path: Path) -> None:
    for folder, number in (("x", 1), ("y", 2)):
        text = f'{{"image_file_name": "{number}.png", "label": "0{number}"}}\n'
        table(tmp_path / "nested" / folder / "metadata.jsonl", text, f"{number}.png")
    split = load_split(tmp_path / "nested", role="validation")
    assert paths(split, tmp_path / "nested") == ["x/1.png", "y/2.png"] and list(split["label"]) == ["01", "02"]
    save(tmp_path / "pq" / "1.png")
    pq.write_table(pa.table({"file_name": ["1.png"], "label": ["cat"]}), tmp_path / "pq" / "metadata.parquet")
    split = load_split(tmp_path / "pq", role="test")
    assert paths(split, tmp_path / "pq") == ["1.png"] and list(split["label"]) == ["cat"]
    assert len(open_images(tmp_path / "pq")) == 1


def test_metadata_files_of_different_columns_are_refused(tmp_path: Path) -> None:
    table(tmp_path / "x" / "metadata.csv", "file_name,label\n1.png,cat\n", "1.png")
    table(tmp_path / "y" / "metadata.csv", "file_name,label\n1.png,7\n", "1.png")
    for text in ("file_name,label\n1.png,7\n", "file_name,mask_file_name,label\n1.png,1.png,cat\n"):
        (tmp_path / "y" / "metadata.csv").write_text(text)
        with pytest.raises(ValueError, match=r"has metadata files of different columns .*: make them alike"):
            load_split(tmp_path, role="labeled")


@pytest.mark.parametrize(
    ("name", "text", "labels"),
    [
        ("labels.csv", "file_name,label\n1.png,cat\n2.png,dog\n", ["cat", "dog"]),
        ("labels.csv", "\ufefffile_name;label\r\n1.png;true\r\n2.png;\r\n", ["true", None]),  # from a spreadsheet
        ("labels.tsv", "file_name\tlabel\n1.png\t3\n2.png\t0\n", [3, 0]),
        ("labels.csv", "file_name, label\n1.png, 01\n2.png, 2\n", ["01", "2"]),
        ("labels.jsonl", '{"file_name": "1.png", "label": "1"}\n{"file_name": "2.png", "label": null}\n', ["1", None]),
    ],
)
def test_a_table_names_files_and_labels(name: str, text: str, labels: list[Any], tmp_path: Path) -> None:
    file = table(tmp_path / name, text, "1.png", "2.png")
    for role in ("labeled", "unlabeled"):  # hidden labels stay a column
        split = load_split(file, role=role)
        assert paths(split, tmp_path) == ["1.png", "2.png"] and list(split["label"]) == labels
    assert len(open_images(file)) == 2


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("name,label\n1.png,cat\n", r"labels.csv needs one column file_name .*\(it has name, label\)"),
        ("file_name,image,label\n1.png,x,cat\n", r"and none named image \(it has file_name, image, label\)"),
        (
            "file_name,label\n1.png,a\nno.png,a\n,a\n",
            r"do not exist in its folder or in image_root \(2\): no.png, row 2 names none\.",
        ),
        ("file_name,label\n1.png,a\n1.png,b\n", r"files in several rows \(1\): .*1.png"),
        ("", r"labels.csv cannot be read \(No columns"),
        ("file_name,label\n1.png,a,b,c\n1.png,a,b,c,d\n", r"labels.csv cannot be read"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        load_split(table(tmp_path / "labels.csv", text, "1.png"), role="labeled")
    with pytest.raises(ValueError, match="no such csv file"):
        load_split(tmp_path / "none.csv", role="labeled")


# --------------------------------------------------------------------------------------------------------- paths inside

OUTSIDE = ["http://127.0.0.1:9/1.png", "file:///etc/hostname", "/etc/hostname", "../other/1.png", "zip://1.png::a.zip"]


def write_rows(file: Path, rows: list[Any]) -> None:
    """A parquet file as other libraries write it, without the features of `datasets`."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(rows, kind), "label": ["cat"] * len(rows)}), file)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "metadata.csv", "parquet"])
def test_no_path_in_a_dataset_leads_out_of_its_folder(
    kind: str, tmp_path: Path, fault_record: Callable[[str, str, str], None]
) -> None:
    data, other = tmp_path / "data", tmp_path / "other"
    save(data / "1.png"), save(other / "1.png")
    names, file = [*OUTSIDE, "1.png"], data / ("metadata.csv" if kind == "metadata.csv" else f"rows.{kind}")
    if kind == "jsonl":
        file.write_text("".join(f'{{"file_name": "{name}", "label": "cat"}}\n' for name in names))
    elif kind == "parquet":
        write_rows(file, [{"bytes": None, "path": name} for name in names])
    else:
        file.write_text("file_name,label\n" + "".join(f"{name},cat\n" for name in names))
    source = data if kind == "metadata.csv" else file
    with pytest.raises(ValueError, match=r"which are not opened \(5\): ") as error:
        load_split(source, role="labeled")
    assert all(name in str(error.value) for name in OUTSIDE)
    with pytest.raises(ValueError, match=r"which are not opened \(4\): ") as error:
        load_split(source, role="labeled", image_root=tmp_path)
    assert "../other/1.png" not in str(error.value)
    with pytest.raises(ValueError, match=r"image_root .* is not a folder"):
        load_split(source, role="labeled", image_root=tmp_path / "none")
    fault_record(f"Rows that name URLs and files outside of their folder: {kind}", "refused, all named", "nothing")


def test_rows_of_parquet_may_name_files_in_their_folder(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        save(tmp_path / folder / "1.png")
        content = (tmp_path / folder / "1.png").read_bytes()
        write_rows(
            tmp_path / folder / "rows.parquet", [{"bytes": content, "path": "/gone"}, {"bytes": None, "path": "1.png"}]
        )
    split = load_split(f"{tmp_path}/*/rows.parquet", role="labeled")
    rows = split.cast_column("image", datasets.Image(decode=False))["image"]
    assert [row["path"] for row in rows] == ["/gone", f"{tmp_path}/x/1.png", "/gone", f"{tmp_path}/y/1.png"]
    assert [row["bytes"] is None for row in rows] == [False, True, False, True]


def test_image_root_is_looked_up_after_the_folder_of_the_file(tmp_path: Path) -> None:
    root = tmp_path / "images"
    save(root / "a" / "1.png"), save(root / "2.png")
    file = table(tmp_path / "meta" / "labels.csv", f"file_name,label\na/1.png,x\n{root}/2.png,y\n3.png,x\n", "3.png")
    split = load_split(file, role="labeled", image_root=root)
    assert paths(split, tmp_path) == ["images/a/1.png", "images/2.png", "meta/3.png"]
    assert paths(open_images(file, image_root=root), tmp_path) == paths(split, tmp_path)
    assert paths(load_labeled(str(file), "test", str(root)), tmp_path) == paths(split, tmp_path)


def test_a_folder_of_several_splits_as_parquet_is_refused(tmp_path: Path) -> None:
    for name in ("train-0.parquet", "train-1.parquet", "test-0.parquet"):
        mixed_sizes(2).to_parquet(tmp_path / name)
    for source in (str(tmp_path), f"{tmp_path}/*.parquet"):
        with pytest.raises(ValueError, match=r"several splits \(test, train\): give .*/test\*.parquet"):
            load_split(source, role="labeled")
    assert len(load_split(f"{tmp_path}/train*.parquet", role="labeled")) == 4
    assert len(load_split(tmp_path, role="unlabeled")) == 6


def test_datasets_on_the_hub_name_no_files_outside_of_the_cache(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = TOKENS["anna"]
    monkeypatch.setenv("HF_TOKEN", token)
    api, secret = HfApi(token=token), tmp_path / "secret.png"
    save(secret)
    folders = {"hostile": tmp_path / "hostile", "folder": tmp_path / "folder"}
    folders["hostile"].mkdir()
    write_rows(
        folders["hostile"] / "train-0.parquet", [{"bytes": None, "path": path} for path in (OUTSIDE[0], str(secret))]
    )
    for name in ("cat/1.png", "dog/1.png"):
        save(folders["folder"] / "train" / name)
    for name, folder in folders.items():
        api.create_repo(f"anna/sources-{name}", repo_type="dataset")
        api.upload_folder(repo_id=f"anna/sources-{name}", folder_path=folder, repo_type="dataset")
    with pytest.raises(ValueError, match=r"which are not opened \(2\): http.*secret.png"):
        load_split("anna/sources-hostile", role="labeled")
    split = load_split("anna/sources-folder", role="labeled")
    assert sorted(named(split)) == ["cat", "dog"] and split[0]["image"].size == (8, 8)
    with pytest.raises(ValueError, match=r"no split 'trian' \(only train\); .*Did you mean 'train'"):
        load_split("anna/sources-folder:trian", role="labeled")


@needs_shared
def test_a_pack_is_read_with_its_class_names() -> None:
    found = load_split(str(SHARED / "data" / "butterfly10_mini" / "labeled.parquet"), role="labeled")
    names = read_class_names(found, "label")
    assert (len(found), len(names)) == (73, 10)
    assert read_labels(found, "label", names, role="labeled", allow_ood=False).tolist() == found["label"]
