"""What is said of the splits before a run starts, on small real folders."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image
from transformers.utils import logging

from ccssl_hf import CCSSLTrainer
from ccssl_hf.card.facts import read_facts
from ccssl_hf.card.model_card import render_card
from ccssl_hf.card.report import describe
from ccssl_hf.data import survey
from ccssl_hf.data.copies import find_copies
from ccssl_hf.data.images import EncodedImages
from ccssl_hf.data.sources import load_split
from ccssl_hf.errors import UserError
from ccssl_hf.record import RunRecord, Split
from pictures import dataset, encoded, picture
from tiny_runs import LABELED, VALIDATION, different, everything, trainer_of

CLASSES = ["ant", "bee", "cow"]
look_at = survey.survey


@pytest.fixture(autouse=True)
def verbosity() -> Iterator[None]:
    """A trainer with another `log_level` changes it for all that follow."""
    logging.set_verbosity_warning()
    yield
    logging.set_verbosity_warning()


def labeled(images: list[Any], names: list[Any]) -> datasets.Dataset:
    """Images with labels that are names."""
    return dataset(images, label=names)


def pictures(first: int, count: int, size: int = 24) -> list[Image.Image]:
    return [picture(first + i, size, size) for i in range(count)]


def write_splits(root: Path) -> Path:
    """Everything that `check` should find, in folders."""
    content = iter(range(100))

    def write(*names: str, size: int = 40) -> None:
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            picture(next(content), size, size).save(root / name)

    def copy(old: str, new: str) -> None:
        (root / new).parent.mkdir(parents=True, exist_ok=True)
        (root / new).write_bytes((root / old).read_bytes())

    write(*(f"labeled/{name}/{i}.png" for name in ("ant", "bee") for i in range(3)))
    write(*(f"unlabeled/{i}.png" for i in range(20)), size=40)
    write("unlabeled/small.png", size=9)
    write(*(f"validation/{name}/{i}.png" for name, n in (("ant", 2), ("wolf", 3), ("fox", 1)) for i in range(n)))
    write("test/bee/0.png", "test/bee/1.png")
    copy("labeled/ant/0.png", "labeled/bee/again.png")
    copy("labeled/ant/1.png", "unlabeled/same.png")
    copy("labeled/ant/2.png", "validation/ant/leak.png")
    copy("unlabeled/4.png", "test/bee/leak.png")
    (root / "unlabeled/broken.jpg").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_splits(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def splits(folders: Path) -> dict[str, datasets.Dataset]:
    return {role: load_split(folders / role, role=role) for role in ("labeled", "unlabeled", "validation", "test")}


@pytest.fixture(scope="module")
def found(splits: dict[str, datasets.Dataset]) -> survey.Survey:
    return look_at(splits, CLASSES, image_size=32)


def test_the_table_has_a_row_for_each_split(found: survey.Survey) -> None:
    head, *rows = (line.split("  ") for line in found.table().splitlines())
    cells = [[cell.strip() for cell in line if cell] for line in (head, *rows)]
    assert cells == [
        [
            "split",
            "images",
            "classes",
            "fewest per class",
            "most per class",
            "OOD",
            "in training",
            "small",
            "unreadable",
        ],
        ["labeled", "7", "2", "3 (ant)", "4 (bee)"],
        ["unlabeled", "23", "1", "1"],
        ["validation", "7", "1", "3 (ant)", "3 (ant)", "4", "1"],
        ["test", "3", "1", "3 (bee)", "3 (bee)", "1"],
    ]
    assert found.table(["test"]).splitlines()[1].startswith("test   3")
    assert "OOD" not in found.table(["test"])  # a column of zeros


def test_sentences_name_what_the_table_counts(found: survey.Survey, folders: Path) -> None:
    assert found.errors() == []
    assert found.texts("note") == [
        "4 images of the validation split show no class of the model and count as out-of-distribution (OOD): "
        "wolf (3), fox (1).",
        "The validation split has no image of 2 of the 3 classes: bee, cow.",
        "The test split has no image of 2 of the 3 classes: ant, cow.",
        "The labeled split shares 1 image with the unlabeled split, which does no harm.",
    ]
    first, again = folders / "labeled/ant/0.png", folders / "labeled/bee/again.png"
    assert found.texts("warning") == [
        "The labeled split has no image of 1 of the 3 classes: cow.",
        f"The unlabeled split has 1 unreadable image: {folders / 'unlabeled/broken.jpg'}: unknown format.",
        "The unlabeled split has 1 image much smaller than the training size of 32 px (the smallest: 9 x 9 px).",
        f"The labeled split has 1 image with different labels: {first} (ant) = {again} (bee). "
        "Keep the right one of each.",
        f"The validation split shares 1 image with the labeled split, so its results will be too high: "
        f"{folders / 'validation/ant/leak.png'}. Remove them from one of the two.",
        f"The test split shares 1 image with the unlabeled split, so its results will be too high: "
        f"{folders / 'test/bee/leak.png'}. Remove them from one of the two.",
    ]


def test_all_unreadable_images_are_named(tmp_path: Path) -> None:
    write_splits(tmp_path)
    whole = (tmp_path / "labeled/bee/0.png").read_bytes()
    for number in range(12):
        (tmp_path / f"labeled/bee/cut{number:02}.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "validation/ant/empty.png").write_bytes(b"")
    splits = {role: load_split(tmp_path / role, role=role) for role in ("labeled", "validation")}
    first, second = look_at(splits, CLASSES).errors()
    lines = first.splitlines()
    assert lines[0].startswith("The labeled split has 12 unreadable images. Repair or remove them, or drop such rows")
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        str(tmp_path / f"labeled/bee/cut{number:02}.png") for number in range(12)
    ]
    assert second.splitlines()[1].startswith(f"  {tmp_path / 'validation/ant/empty.png'}: ")


def test_a_split_is_decoded_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_splits(tmp_path)
    calls: list[int] = []
    monkeypatch.setattr(survey, "unreadable", lambda dataset, *a, **k: calls.append(len(dataset)) or [])

    def look() -> None:
        look_at({"labeled": load_split(tmp_path / "labeled", role="labeled")}, CLASSES)

    look()
    look()
    assert calls == [7]
    (tmp_path / "labeled/bee/0.png").write_bytes((tmp_path / "labeled/bee/1.png").read_bytes())
    look()
    assert calls == [7, 7]


@pytest.mark.parametrize("share", [1, 2])
def test_many_unreadable_unlabeled_images_are_an_error(share: int) -> None:
    images = [*pictures(0, 30), *[{"bytes": b"x", "path": None}] * share]
    found = look_at({"unlabeled": dataset(images)}, CLASSES)
    assert len(found.errors()) == (share > 1) and len(found.splits["unlabeled"].unreadable) == share
    assert len(look_at({"unlabeled": dataset(images)}, CLASSES, skip_bad=False).errors()) == 1


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "ICO"])
@pytest.mark.parametrize("embedded", [False, True])
def test_headers_of_all_formats_are_read(kind: str, embedded: bool, tmp_path: Path) -> None:
    images = [encoded(image, kind) for image in pictures(0, 4, 32)]
    for number, image in enumerate(images if not embedded else ()):
        (tmp_path / str(number)).write_bytes(image["bytes"])
        images[number] = {"bytes": None, "path": str(tmp_path / str(number))}
    found = look_at({"unlabeled": dataset(images)}, None, image_size=100).splits["unlabeled"]
    assert (found.unreadable, found.small, found.smallest) == ([], 4, (32, 32))


def test_rows_without_a_class_are_counted_apart() -> None:
    values = ["ant", "bee", "wolf", "wolf", None]
    named = look_at({"validation": labeled(pictures(0, 5), values)}, CLASSES).splits["validation"]
    assert named.per_class == {"ant": 1, "bee": 1} and named.ood == {"wolf": 2, "": 1}
    feature = datasets.ClassLabel(names=["ant", "wolf"])
    numbered = dataset(pictures(0, 4), label=[0, 1, -1, None]).cast_column("label", feature)
    found = look_at({"test": numbered.select([3, 2, 1, 0])}, CLASSES)
    assert found.splits["test"].ood == {"wolf": 1, "": 2}
    assert "wolf (1), no label (2)" in found.texts("note")[0]
    withheld = look_at({"test": dataset(pictures(0, 2), label=[-1, -1])}, CLASSES)
    assert withheld.texts("note") == ["The test split has no labels."]


def test_errors_of_all_splits_are_collected() -> None:
    wrong = labeled(pictures(0, 2), ["ant", "owl"])
    found = look_at({"labeled": wrong, "validation": labeled(pictures(0, 2), ["x", "y"]), "test": wrong}, CLASSES)
    assert len(found.errors()) == 2 and "owl" in found.errors()[0] and "x, y" in found.errors()[1]
    no_column = look_at({"labeled": wrong, "test": wrong.rename_column("image", "photo")}, CLASSES)
    assert "The test split has no column 'image'" in no_column.errors()[1]


def test_names_do_not_control_the_terminal() -> None:
    names = ["ant", "\x1b[31mred\nline"]
    found = look_at({"test": labeled(pictures(0, 3), [*names, "\x1b[2J"])}, names)
    said = found.table() + "".join(found.texts("note"))
    assert "\x1b" not in said and len(found.table().splitlines()) == 2 and r"\x1b[2J (1)" in said


@pytest.mark.parametrize("shuffled", [False, True])
def test_copies_are_found_by_content_however_they_are_stored(shuffled: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    raw = [encoded(Image.fromarray(rng.integers(0, 256, (30, 30), dtype=np.uint8)), "BMP") for _ in range(6)]
    assert len({len(each["bytes"]) for each in raw}) == 1  # all of one length: contents decide
    (tmp_path / "file.bmp").write_bytes(raw[2]["bytes"])
    one = dataset([*raw[:4], {"bytes": None, "path": str(tmp_path / "missing.png")}, None])
    other = dataset([raw[5], raw[1], {"bytes": None, "path": str(tmp_path / "file.bmp")}])
    if shuffled:
        one, other = one.select([5, 4, 3, 2, 1, 0]), other.select([2, 1, 0])
    files = {"labeled": EncodedImages(one, "image"), "test": EncodedImages(other, "image")}
    groups = find_copies(files, ())
    expected = [[("labeled", 3), ("test", 0)], [("labeled", 4), ("test", 1)]] if shuffled else []
    assert sorted(groups) == (expected or [[("labeled", 1), ("test", 1)], [("labeled", 2), ("test", 2)]])


def test_only_images_of_one_length_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    sample = EncodedImages.sample
    monkeypatch.setattr(EncodedImages, "sample", lambda self, row: read.append(row) or sample(self, row))
    look_at({"labeled": LABELED.select(range(3)), "unlabeled": dataset(pictures(0, 5, size=64))}, None)
    assert read == []


# --------------------------------------------------------------------------------------------------------- in a trainer


def spoiled(split: datasets.Dataset, rows: list[int]) -> datasets.Dataset:
    """`split` with images that cannot be decoded."""
    images = split.cast_column("image", datasets.Image(decode=False))["image"]
    images = [{"bytes": b"bad", "path": f"{row}.png"} if row in rows else image for row, image in enumerate(images)]
    return split.remove_columns("image").add_column("image", images).cast_column("image", datasets.Image())


def test_training_says_what_it_found_before_the_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    leaky = datasets.concatenate_datasets([VALIDATION, LABELED.select([0, 1])])
    trainer = trainer_of(tmp_path / "run", validation={"clean": VALIDATION, "leaky": leaky}, max_steps=1)
    trainer.train()
    said = capsys.readouterr().out
    assert said.index("split      images") < said.index("'loss'")
    assert "\nclean      37      4        8 (zero)          10 (two)" in said
    assert "The leaky split shares 2 images with the labeled split" in caplog.text
    assert "The leaky split shares 37 images with the clean split." in said
    card = render_card(trainer.run_record(), model_name="digits")
    assert read_facts(card).splits["labeled"].fewest_class == "three"


def test_a_broken_image_stops_a_run_before_its_first_step(tmp_path: Path, fault_record: Any) -> None:
    trainer = trainer_of(tmp_path, labeled=spoiled(LABELED, [1, 7]), validation=spoiled(VALIDATION, [3]), max_steps=1)
    with pytest.raises(UserError) as error:
        trainer.train()
    lines = str(error.value).splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("  ")] == ["  1.png", "  7.png", "  3.png"]
    assert trainer.state.global_step == 0
    with pytest.raises(UserError):  # not taken for checked
        trainer.train()
    what = "an error before step 1 that names every unreadable image"
    fault_record("Unreadable images in the labeled and validation split", what, "0 steps")


def test_the_survey_changes_no_bit_and_can_be_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, silent = (trainer_of(tmp_path / level, max_steps=2, log_level=level) for level in ("warning", "error"))
    plain.check_data()
    said = capsys.readouterr().out
    assert "\nlabeled     24" in said
    plain.train()
    silent.train()
    assert "\nlabeled     24" not in capsys.readouterr().out  # plain has said it
    assert not different(everything(plain), everything(silent))


def test_a_new_split_is_looked_at_when_it_is_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = trainer_of(tmp_path, validation=None)
    names = datasets.ClassLabel(names=["zero", "one", "two", "nine"])
    test = VALIDATION.select(range(12)).cast_column("label", names)
    trainer.evaluate(test, metric_key_prefix="test")
    said = capsys.readouterr().out
    assert "count as out-of-distribution (OOD): nine (" in said and "\nlabeled" not in said
    trainer.evaluate(test, metric_key_prefix="test")
    assert "nine" not in capsys.readouterr().out
    for call in (trainer.evaluate, trainer.predict):
        with pytest.raises(UserError, match=r"2 unreadable images(.|\n)*\n  2\.png: .*\n  5\.png: "):
            call(spoiled(test, [2, 5]))
    trainer.evaluate(LABELED.select(range(9)), metric_key_prefix="eval_labeled")  # not mistaken for the labeled split
    said = capsys.readouterr().out
    assert "\nevaluation labeled  9 " in said and "shares" not in said
    trainer.predict(test.remove_columns("label"))
    assert "test   12" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------- on the card


def test_the_card_shows_what_was_found_and_no_folder(found: survey.Survey, folders: Path, tmp_path: Path) -> None:
    splits = {name: Split(str(folders / name), each.images, **each.facts()) for name, each in found.splits.items()}
    record = RunRecord("test_resnet", ["ant|x", "bee"], algorithm="fixmatch", splits=splits)
    card = render_card(record, model_name="mine")
    assert (
        "| Split | Classes | Fewest per class | Most per class | OOD | Also in training | Much smaller | Unreadable |"
        in card.text
    )
    assert "| validation | 1 | 3 (ant) | 3 (ant) | 4 | 1 | 0 | 0 |" in card.text
    assert "| unlabeled | – | – | – | – | 0 | 1 | 1 |" in card.text
    assert str(folders.parent) not in str(card) and "broken.jpg" not in str(card)
    assert read_facts(card).splits["test"] == Split("test", 3, **found.splits["test"].facts())


def test_a_card_without_these_facts_still_loads(tmp_path: Path) -> None:
    card = render_card(RunRecord("test_resnet", ["a", "b"], splits={"test": Split("x", 3)}), model_name="mine")
    assert read_facts(card).splits == {"test": Split("x", 3)} and "Also in training" not in card.text
    assert "Fewest" not in json.dumps(card.data.to_dict())


def test_report_prints_them(tmp_path: Path) -> None:
    trainer: CCSSLTrainer = trainer_of(tmp_path / "run", max_steps=1)
    trainer.train()
    trainer.save_model()
    assert "validation  4        8 (zero)          10 (two)" in describe(str(tmp_path / "run"))
