"""Predictions against transformers' pipeline and the model, and the parquet file of them."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest
import timm
import torch
import transformers
from PIL import Image, ImageOps
from torch import nn
from typer.testing import CliRunner

from ccssl_hf import CCSSLForImageClassification
from ccssl_hf.cli import app
from ccssl_hf.deploy import predict as inference
from ccssl_hf.deploy.predict import Classifier, open_images, predict_to_file
from ccssl_hf.deploy.rows import FORMATS, partial_file
from small_models import LABELS, picture, published


def write_pictures(folder: Path) -> list[str]:
    """Images of many modes and formats in nested folders; the sorted paths."""
    (folder / "more" / "still more").mkdir(parents=True)
    picture(60, 40).save(folder / "a.jpg")
    picture(40, 60).convert("L").save(folder / "b_grey.png")
    picture(33, 47).convert("CMYK").save(folder / "c_cmyk.jpg")
    translucent = picture(50, 50)
    translucent.putalpha(Image.linear_gradient("L").resize((50, 50)))
    translucent.save(folder / "d_rgba.png")
    picture(70, 30).quantize(16).save(folder / "e_palette.gif")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(64, 32).save(folder / "more" / "f_turned.JPG", exif=exif)
    picture(31, 90).convert("1").save(folder / "more" / "g_bits.png")
    picture(3, 2).save(folder / "more" / "h_tiny.bmp")
    picture(20, 20).save(folder / "more" / "still more" / "i.webp")
    return sorted(str(path) for path in folder.rglob("*.*"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("pictures")
    return folder, write_pictures(folder)


@pytest.fixture(scope="module")
def wide_resnet(tmp_path_factory: pytest.TempPathFactory) -> Classifier:
    folder = published(tmp_path_factory.mktemp("wide_resnet"), "wide_resnet10_1_cifar", 16)
    return Classifier.from_pretrained(folder, device="cpu")


def rows_of(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


@pytest.mark.parametrize("with_head", [True, False])
@pytest.mark.parametrize(
    ("backbone", "size"),
    [("test_resnet", 96), ("wide_resnet10_1_cifar", 32), ("test_vit", 64), ("test_efficientnet", 128)],
)
def test_labels_and_scores_are_those_of_the_pipeline(backbone, size, with_head, pictures, tmp_path):
    model = published(tmp_path / "model", backbone, size, with_head=with_head)
    folder, files = pictures
    pipeline = transformers.pipeline("image-classification", model=str(model), device="cpu")
    expected = [pipeline(file) for file in files]
    assert len({answer[0]["label"] for answer in expected}) > 1  # else equal labels would say little
    classifier = Classifier.from_pretrained(model, device="cpu")
    assert predict_to_file(classifier, folder, tmp_path / "out.parquet").images == len(files)
    rows = rows_of(tmp_path / "out.parquet")
    assert [row["path"] for row in rows] == files and all(row["error"] is None for row in rows)
    assert [row["label"] for row in rows] == [answer[0]["label"] for answer in expected]
    np.testing.assert_allclose(
        [row["confidence"] for row in rows], [answer[0]["score"] for answer in expected], rtol=0, atol=1e-5
    )
    said = classifier.predict([Image.open(file) for file in files])
    for probabilities, answer in zip(said.probabilities, expected, strict=True):
        scores = {entry["label"]: entry["score"] for entry in answer}
        np.testing.assert_allclose(probabilities, [scores[label] for label in LABELS], rtol=0, atol=1e-5)


def test_folded_convolutions_leave_no_batch_norm(tmp_path):
    classifier = Classifier.from_pretrained(published(tmp_path, "test_resnet", 64), device="cpu")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in classifier._network.modules())


def test_a_folder_that_timm_saved(pictures, tmp_path):
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=len(LABELS)).eval()
    config = {"label_names": LABELS}
    timm.models.save_for_hf(network, tmp_path / "model", model_config=config, safe_serialization=True)
    classifier = Classifier.from_pretrained(tmp_path / "model", device="cpu")
    images = [ImageOps.exif_transpose(Image.open(file)).convert("RGB") for file in pictures[1]]
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    with torch.no_grad():
        expected = network(torch.stack([transform(image) for image in images])).softmax(dim=1)
    torch.testing.assert_close(classifier.predict(images).probabilities, expected, rtol=0, atol=1e-5)
    assert classifier.labels == LABELS and classifier.embedding == "pre_logits"


@pytest.mark.parametrize(("with_head", "kind"), [(True, "projection"), (False, "pre_logits")])
@pytest.mark.parametrize("backbone", ["test_resnet", "wide_resnet10_1_cifar"])
def test_embeddings_are_the_models_and_the_file_says_which(backbone, with_head, kind, pictures, tmp_path):
    folder = published(tmp_path / "model", backbone, 32)
    model = CCSSLForImageClassification.from_pretrained(folder)
    if not with_head:
        (folder / "ccssl_head.safetensors").unlink()
    classifier = Classifier.from_pretrained(folder, device="cpu")
    paths = [file for file in pictures[1] if "turned" not in file]
    out = tmp_path / "out.parquet"
    predict_to_file(classifier, paths, out, embedding=True, batch_size=3)
    embeddings = torch.tensor([row["embedding"] for row in rows_of(out)])
    data_config = timm.data.resolve_data_config(pretrained_cfg=model.backbone.pretrained_cfg)
    transform = timm.data.create_transform(**data_config)
    batch = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
    with torch.no_grad():
        if with_head:
            expected = model(batch, return_embeddings=True).embeddings
            torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(len(paths)))
        else:
            expected = model.backbone.forward_head(model.backbone.forward_features(batch), pre_logits=True)
    torch.testing.assert_close(embeddings, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(classifier.predict(batch).embeddings, expected, rtol=1e-4, atol=1e-5)
    metadata = pq.read_schema(out).metadata
    assert metadata[b"embedding"].decode() == kind and metadata[b"model"].decode() == str(folder)


def test_a_broken_image_is_a_row_and_other_files_are_passed_over(wide_resnet, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    picture(40, 40).save(folder / "a.png")
    (folder / "b.jpg").write_bytes(b"no image")
    whole = tmp_path / "whole.jpg"
    picture(90, 90).save(whole)
    (folder / "c.jpg").write_bytes(whole.read_bytes()[:700])
    (folder / "d.png").write_bytes(b"")
    picture(40, 40).save(folder / "e.png")
    (folder / "notes.txt").write_text("no image, and named so")
    out = tmp_path / "out.parquet"
    written = predict_to_file(wide_resnet, folder, out, embedding=True, batch_size=2)
    rows = rows_of(out)
    assert (written.images, written.unreadable) == (5, 3)
    assert [Path(row["path"]).name for row in rows] == ["a.png", "b.jpg", "c.jpg", "d.png", "e.png"]
    for row in rows[1:4]:
        assert row["label"] is row["confidence"] is row["embedding"] is None and row["error"].startswith(
            "not a readable image ("
        )
    assert all(row["label"] in LABELS and row["error"] is None for row in (rows[0], rows[4]))


def test_a_run_that_ends_early_leaves_the_old_file_and_its_rows(wide_resnet, tmp_path):
    folder, out = tmp_path / "images", tmp_path / "out.parquet"
    folder.mkdir()
    for number in range(40):
        picture(16, 16).save(folder / f"{number:02}.png")
    (folder / "99.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"99\.png can't be read .*: repair or remove"):
        predict_to_file(wide_resnet, folder, out, strict=True, batch_size=4)
    assert not out.exists()
    assert [Path(row["path"]).stem for row in rows_of(tmp_path / "_out.parquet.partial")] == [
        f"{number:02}" for number in range(40)
    ]
    predict_to_file(wide_resnet, folder, out)
    before = out.read_bytes()
    assert not (tmp_path / "_out.parquet.partial").exists()
    with pytest.raises(ValueError, match="99"):
        predict_to_file(wide_resnet, folder, out, strict=True)
    assert out.read_bytes() == before


def test_every_kind_of_source_gives_the_same_rows(wide_resnet, pictures, tmp_path, monkeypatch):
    folder, files = pictures
    out = tmp_path / "out.parquet"

    def predicted(source: Any) -> list[tuple[str, float]]:
        predict_to_file(wide_resnet, source, out, batch_size=2)
        return [(row["label"], pytest.approx(row["confidence"], abs=1e-6)) for row in rows_of(out)]

    expected = predicted(folder)
    assert predicted(str(folder)) == predicted(f"{folder}/**/*") == predicted(files) == expected
    assert predicted(files[0]) == expected[:1]
    dataset = datasets.Dataset.from_dict({"image": files}, features=datasets.Features({"image": datasets.Image()}))
    assert predicted(dataset) == expected
    embedded = [{"bytes": Path(file).read_bytes(), "path": None} for file in files]
    dataset = datasets.Dataset.from_dict({"image": embedded}, features=dataset.features)
    dataset.to_parquet(tmp_path / "images.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert predicted(tmp_path / "images.parquet") == expected
    assert [row["path"] for row in rows_of(out)] == [str(number) for number in range(len(files))]


def test_rows_keep_their_order_on_any_number_of_threads_and_torch_its_own(wide_resnet, pictures, tmp_path):
    files = pictures[1] * 12
    threads = torch.get_num_threads()
    tables = []
    for workers in (1, 3):
        out = tmp_path / f"{workers}.parquet"
        predict_to_file(wide_resnet, files, out, batch_size=5, num_workers=workers)
        tables.append(rows_of(out))
    assert [row["path"] for row in tables[0]] == files
    assert [(row["path"], row["label"]) for row in tables[0]] == [(row["path"], row["label"]) for row in tables[1]]
    assert torch.get_num_threads() == threads


def test_rows_are_written_in_groups(wide_resnet, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "ROW_GROUP", 40)
    predict_to_file(wide_resnet, pictures[1] * 10, tmp_path / "out.parquet", batch_size=4)
    metadata = pq.read_metadata(tmp_path / "out.parquet")
    assert [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)] == [40, 40, 10]


ODD_NAMES = (
    "=cmd.png",
    "a, b.png",
    'q"uote.png',
    "new\nline.png",
    "carriage\rreturn.png",
    "ünïcode 猫.png",
    "zz broken.png",
)


def read_back(file: Path) -> list[dict[str, Any]]:
    """The rows of a file as pandas reads them, with None for missing values."""
    read = {".csv": pandas.read_csv, ".jsonl": partial(pandas.read_json, lines=True), ".parquet": pandas.read_parquet}
    table = read[file.suffix](file)
    return table.astype(object).where(table.notna(), None).to_dict("records")


def test_the_suffix_chooses_the_format_and_every_format_has_the_same_rows(tmp_path):
    labels = ["path", "error", "label", 'a "class", =1\n']  # the names of columns are no problem
    torch.manual_seed(0)
    model = CCSSLForImageClassification.from_timm("test_resnet", labels=labels, image_size=32)
    model.save_pretrained(tmp_path / "model")
    classifier, folder = Classifier.from_pretrained(tmp_path / "model", device="cpu"), tmp_path / "images"
    folder.mkdir()
    for name in ODD_NAMES[:-1]:
        picture(30, 30).save(folder / name)
    (folder / ODD_NAMES[-1]).write_bytes(b"no image")
    files = {suffix: tmp_path / f"out{suffix}" for suffix in FORMATS}
    for file in files.values():
        done = predict_to_file(classifier, folder, file, top_k=3, probabilities=True, embedding=True)
        assert (done.images, done.unreadable) == (len(ODD_NAMES), 1)
    tables = {suffix: read_back(file) for suffix, file in files.items()}
    paths = sorted(str(folder / name) for name in ODD_NAMES)
    ranked = ["label", "confidence", "label_2", "confidence_2", "label_3", "confidence_3"]
    assert list(tables[".parquet"][0]) == list(tables[".jsonl"][0])
    assert list(tables[".parquet"][0]) == ["path", *ranked, "probabilities", "embedding", "error"]
    assert list(tables[".csv"][0]) == [
        "path",
        *ranked,
        *(f"probability_{each}" for each in labels),
        "embedding",
        "error",
    ]
    assert json.loads(pq.read_schema(files[".parquet"]).metadata[b"labels"]) == labels
    for of_csv, of_json, of_parquet in zip(*(tables[suffix] for suffix in (".csv", ".jsonl", ".parquet")), strict=True):
        for name in ("path", "error", *ranked[::2]):
            assert of_csv[name] == of_json[name] == of_parquet[name]
        if of_csv["error"]:
            assert all(value is None for name, value in of_csv.items() if name not in ("path", "error"))
            assert all(value is None for name, value in of_json.items() if name not in ("path", "error"))
            continue
        probabilities = of_parquet["probabilities"]
        best = probabilities.argsort()[::-1][:3]
        assert [of_csv[name] for name in ranked[::2]] == [labels[number] for number in best]
        for row in (of_csv, of_json, of_parquet):
            assert [row[name] for name in ranked[1::2]] == pytest.approx(probabilities[best].tolist(), abs=1e-6)
        assert of_json["probabilities"] == pytest.approx(
            dict(zip(labels, probabilities.tolist(), strict=True)), abs=1e-6
        )
        assert [of_csv[f"probability_{each}"] for each in labels] == pytest.approx(probabilities.tolist(), abs=1e-6)
        np.testing.assert_array_equal(np.float32(json.loads(of_csv["embedding"])), of_parquet["embedding"])
        np.testing.assert_array_equal(np.float32(of_json["embedding"]), of_parquet["embedding"])
    assert sorted(row["path"] for row in tables[".csv"]) == paths  # unchanged


def test_more_classes_than_there_are_and_equal_probabilities(wide_resnet, tmp_path, monkeypatch):
    picture(20, 20).save(tmp_path / "a.png")
    said = dataclasses.replace(wide_resnet.predict([picture(16, 16)]), probabilities=torch.full((1, 4), 0.25))
    with monkeypatch.context() as patch:
        patch.setattr(wide_resnet, "predict_unchecked", lambda batch: said)
        predict_to_file(wide_resnet, tmp_path / "a.png", tmp_path / "equal.jsonl", top_k=4)
    [row] = read_back(tmp_path / "equal.jsonl")
    assert [row[f"label_{rank}"] for rank in (2, 3, 4)] == LABELS[1:]  # the first is `label`
    predict_to_file(wide_resnet, tmp_path / "a.png", tmp_path / "out.jsonl", top_k=99)
    [row] = read_back(tmp_path / "out.jsonl")
    assert sorted(value for name, value in row.items() if name.startswith("label")) == sorted(LABELS)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_an_interrupted_run_leaves_a_text_file_with_its_rows(wide_resnet, suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "ROW_GROUP", 8)
    folder, out = tmp_path / "images", tmp_path / f"out{suffix}"
    folder.mkdir()
    for number in range(20):
        picture(16, 16).save(folder / f"{number:02}.png")
    (folder / "99.png").write_bytes(b"no image")
    out.write_text("an earlier file")
    with pytest.raises(ValueError, match="99"):
        predict_to_file(wide_resnet, folder, out, strict=True, batch_size=4)
    assert out.read_text() == "an earlier file"
    left = partial_file(out).rename(tmp_path / f"left{suffix}")
    assert [Path(row["path"]).stem for row in read_back(left)] == [f"{number:02}" for number in range(20)]


def test_uint8_pixels_and_normalised_tensors_say_the_same(wide_resnet):
    pixels = torch.stack([wide_resnet.pixels(picture(30, 40)) for _ in range(3)])
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 3, 16, 16)
    floats = (pixels / 255 - wide_resnet._mean) / wide_resnet._std
    torch.testing.assert_close(
        wide_resnet.predict(pixels).probabilities, wide_resnet.predict(floats).probabilities, rtol=0, atol=1e-6
    )


def test_half_precision_answers_in_float32(pictures, tmp_path):
    folder = published(tmp_path, "test_vit", 32)
    said = Classifier.from_pretrained(folder, device="cpu", dtype=torch.bfloat16).predict([Image.open(pictures[1][0])])
    assert said.probabilities.dtype == said.embeddings.dtype == torch.float32
    assert said.probabilities.sum().item() == pytest.approx(1, abs=1e-5)


def test_classes_that_do_not_exclude_each_other_have_their_own_probabilities(pictures, tmp_path):
    folder = published(tmp_path, "test_resnet", 32)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"problem_type": "multi_label_classification"}))
    pipeline = transformers.pipeline("image-classification", model=str(folder), device="cpu")
    image = Image.open(pictures[1][0])
    scores = {entry["label"]: entry["score"] for entry in pipeline(image)}
    said = Classifier.from_pretrained(folder, device="cpu").predict([image])
    np.testing.assert_allclose(said.probabilities[0], [scores[label] for label in LABELS], rtol=0, atol=1e-5)


def test_what_a_user_can_get_wrong(wide_resnet, pictures, tmp_path):
    folder = pictures[0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image files; name a folder"):
        open_images(tmp_path / "empty")
    with pytest.raises(ValueError, match="list of images is empty"):
        open_images([])
    with pytest.raises(ValueError, match=r"'nowhere\.parquet' does not exist \(no such parquet file\)"):
        open_images("nowhere.parquet")
    with pytest.raises(ValueError, match="is a folder: name the file to write"):
        predict_to_file(wide_resnet, folder, tmp_path)
    for name in ("out", "out.json", "out.xlsx", "-"):
        with pytest.raises(ValueError, match=rf"{name} has none of the suffixes \.parquet, \.csv, \.jsonl: name"):
            predict_to_file(wide_resnet, "nowhere", name)
    with pytest.raises(ValueError, match="is also the source"):
        predict_to_file(wide_resnet, f"{tmp_path}/x.parquet", tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="top_k is 0: set it to 1 or more"):
        predict_to_file(wide_resnet, folder, tmp_path / "out.csv", top_k=0)
    with pytest.raises(ValueError, match="no device 'gpu' here"):
        Classifier.from_pretrained(tmp_path, device="gpu")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        Classifier.from_pretrained(tmp_path / "empty", device="cpu")


def test_sigterm_leaves_the_rows_so_far_in_a_whole_file(wide_resnet, tmp_path, monkeypatch):
    images, calls = tmp_path / "images", iter(range(9))
    images.mkdir()
    for number in range(20):
        picture(16, 16).save(images / f"{number:02}.png")
    pixels = wide_resnet.pixels

    def stopped(image):
        if next(calls, 0) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return pixels(image)

    monkeypatch.setattr(wide_resnet, "pixels", stopped)
    monkeypatch.setattr(Classifier, "from_pretrained", lambda *_, **__: wide_resnet)
    out, before = tmp_path / "out.parquet", signal.getsignal(signal.SIGTERM)
    given = [str(tmp_path), str(images), str(out), "--batch-size", "1", "--num-workers", "1"]
    try:
        result = CliRunner().invoke(app, ["predict", *given])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert result.exit_code == 143 and f"are in {partial_file(out)}." in result.stderr
    rows = [Path(row["path"]).stem for row in read_back(partial_file(out).rename(tmp_path / "left.parquet"))]
    assert rows == [f"{number:02}" for number in range(20)][: len(rows)] and not out.exists()


def test_rows_whose_output_is_not_finite_say_so_beside_the_others(wide_resnet, tmp_path, monkeypatch):
    for number in range(3):
        picture(16, 16).save(tmp_path / f"{number}.png")
    predict = wide_resnet.predict_unchecked

    def broken(batch):
        found = predict(batch)
        return dataclasses.replace(found, logits=found.logits * torch.tensor([[1], [torch.nan], [1]]))

    monkeypatch.setattr(wide_resnet, "predict_unchecked", broken)
    written = predict_to_file(wide_resnet, tmp_path, tmp_path / "out.csv", top_k=2, probabilities=True, embedding=True)
    first, second, third = read_back(tmp_path / "out.csv")
    assert written.unreadable == 1 and second["label"] is None and "NaN or infinite" in second["error"]
    assert {first["error"], third["error"]} == {None} and None not in {first["label_2"], first["embedding"]}
