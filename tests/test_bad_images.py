"""Images that cannot be read: labeled ones stop a run, unlabeled ones are replaced, the same way in every run."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from transformers import TrainerCallback

from ccssl_hf import CCSSLTrainer
from ccssl_hf.card import write_card
from ccssl_hf.record import RunRecord, Split
from ccssl_hf.sampling import UNLABELED as STREAM
from ccssl_hf.sampling import replacements
from tiny_runs import LABELED, UNLABELED, StopAt, damaged, different, digits, everything, logs_of_steps, model_of
from tiny_runs import trainer_of as new_trainer

BAD = (3, 50, 70)
STREAMED = {"decode": "stream", "weak_crop": "resized"}
SETTINGS: dict[str, dict[str, Any]] = {
    "memory": {"decode": "memory", "weak_crop": "resized"},
    "memory, two workers": {"decode": "memory", "weak_crop": "resized", "dataloader_num_workers": 2},
    "stream": STREAMED,
    "stream, one worker": {**STREAMED, "dataloader_num_workers": 1},
    "stream, two workers": {**STREAMED, "dataloader_num_workers": 2},
}


def trainer_of(folder: Path, **changes: Any) -> CCSSLTrainer:
    return new_trainer(folder, **{"hidden_label_column": "true", "validation": None, **changes})


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    datasets.disable_progress_bars()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CCSSLTrainer]:
    """Runs of six steps by their settings, with three bad images of 96: all of them are drawn."""
    found = {}
    for name, changes in SETTINGS.items():
        found[name] = trainer_of(tmp_path_factory.mktemp("run"), unlabeled=damaged(UNLABELED, BAD), **changes)
        found[name].train()
    return found


def taken(trainer: CCSSLTrainer) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Rows, draws and hidden labels of the unlabeled images of each step."""
    names = ("unlabeled_index", "unlabeled_draws", "hidden_labels")
    return [tuple(np.asarray(batch[name]) for name in names) for batch in trainer.get_train_dataloader()]  # type: ignore[misc]


def test_one_rule_replaces_them_for_every_way_of_decoding(
    runs: dict[str, CCSSLTrainer], tmp_path: Path, fault_record: Callable[[str, str, str], None]
) -> None:
    seed, wanted = runs["stream"].args.seed, []
    for rows, draws, _ in taken(trainer_of(tmp_path, **STREAMED)):
        tries = [
            [row, *replacements(seed, STREAM, draw, len(UNLABELED))] for row, draw in zip(rows, draws, strict=True)
        ]
        wanted.append(np.array([next(row for row in each if row not in BAD) for each in tries]))
    true = np.array(UNLABELED["true"])
    for trainer in runs.values():
        for rows, (found, _, hidden) in zip(wanted, taken(trainer), strict=True):
            assert np.array_equal(found, rows) and np.array_equal(hidden, true[rows])
        assert different(everything(trainer), everything(runs["stream"])) == []
        assert logs_of_steps(trainer) == logs_of_steps(runs["stream"])
        assert trainer.unreadable.known(trainer.state).keys() == set(BAD)
    what = "replaced by other images, the same with any number of workers and either way of decoding"
    fault_record("three unreadable images among 96 unlabeled ones", what, "3 images (replaced)")


@pytest.mark.parametrize("stop", [1, 4])
def test_a_resumed_run_replaces_and_lists_the_same(
    runs: dict[str, CCSSLTrainer], tmp_path: Path, stop: int, fault_record: Callable[[str, str, str], None]
) -> None:
    """Without a log before the stop, the checkpoint itself must list what was found."""
    bad = damaged(UNLABELED, BAD)
    logging_steps = {1: 1, 4: 100}[stop]
    trainer_of(tmp_path, unlabeled=bad, callbacks=[StopAt(stop)], logging_steps=logging_steps, **STREAMED).train()
    resumed = trainer_of(tmp_path, model=model_of(seed=1), unlabeled=bad, **SETTINGS["stream, two workers"])
    resumed.train(resume_from_checkpoint=True)
    assert different(everything(resumed), everything(runs["stream"])) == []
    assert resumed.unreadable.known(resumed.state) == runs["stream"].unreadable.known(runs["stream"].state)
    if stop == 4:
        fault_record(
            "unreadable unlabeled images before and after a resume", "the same bits and the same list", "0 steps"
        )


def test_they_are_logged_once_and_listed_with_the_card(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_of(tmp_path, unlabeled=damaged(UNLABELED, BAD), **STREAMED)
    with caplog.at_level(logging.WARNING, "ccssl_hf"):
        trainer.train()
    text = "\n".join(record.getMessage() for record in caplog.records)
    for row in BAD:
        line = f"/home/anna/photos/{row}.png: not a readable image (unknown format)"
        assert text.count(line) == 1
    assert "replaced by others in this run: 3 of 96." in text
    trainer.save_model()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "Unreadable images of the unlabeled split, which other images replaced in training:" in card
    assert "- 50.png (row 50): not a readable image (unknown format)\n" in card
    for file in (tmp_path / "README.md", *tmp_path.glob("**/trainer_state.json")):
        assert "/home/anna" not in file.read_text(encoding="utf-8")


def test_many_are_listed_in_a_file_beside_the_card(tmp_path: Path) -> None:
    names = {f"{number}.png (row {number})": "not a readable image (unknown format)" for number in range(13)}
    write_card(
        RunRecord(
            "test_resnet",
            ["a", "b"],
            "fixmatch",
            splits={"unlabeled": Split("photos", 96)},
            unreadable={"unlabeled": names},
        ),
        tmp_path,
        model_name="m",
    )
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "(the first 10 of 13; `unreadable_images.txt`" in card and "- 9.png" in card and "- 10.png" not in card
    lines = (tmp_path / "unreadable_images.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 13 and lines[12] == "unlabeled: 12.png (row 12): not a readable image (unknown format)"


def cut(dataset: datasets.Dataset, rows: Iterable[int]) -> datasets.Dataset:
    """The dataset with files in these rows that end behind their headers."""
    columns = dataset.cast_column("image", datasets.Image(decode=False)).to_dict()
    for row in rows:
        image = {"bytes": columns["image"][row]["bytes"][:60], "path": f"/home/anna/photos/{row}.png"}
        columns["image"][row] = image
    return datasets.Dataset.from_dict(columns, features=dataset.features)


@pytest.mark.parametrize("decode", ["memory", "stream"])
@pytest.mark.parametrize("damage", [damaged, cut])
def test_a_run_stops_above_five_percent(
    tmp_path: Path, decode: str, damage: Any, fault_record: Callable[[str, str, str], None]
) -> None:
    bad = damage(UNLABELED, range(0, 96, 10))
    trainer = trainer_of(tmp_path, unlabeled=bad, max_steps=12, **SETTINGS[decode])
    sentence = r"of 96 unlabeled images can't be decoded, more than 5%: .*\n  .*png: "
    if damage is damaged:  # so that headers show it
        sentence = r"The unlabeled split has 10 unreadable images, more than 5%. .*\n  .*png: "
    with pytest.raises(ValueError, match=sentence) as found:
        trainer.train()
    if decode == "memory" or damage is damaged:  # known before the first step
        assert re.search("10 of 96|10 unread", str(found.value)) and trainer.state.global_step == 0
    else:
        assert 0 < trainer.state.global_step < 12
        fault_record("more than 5% of the unlabeled images are unreadable", "the run stops and names them", "none")


@pytest.mark.parametrize("decode", ["memory", "stream", "stream, two workers"])
@pytest.mark.parametrize("damage", [damaged, cut])
def test_stop_names_the_file(tmp_path: Path, decode: str, damage: Any) -> None:
    trainer = trainer_of(tmp_path, unlabeled=damage(UNLABELED, BAD), on_bad_image="stop", **SETTINGS[decode])
    sentence = "of the unlabeled split can't be decoded" if damage is cut else "unlabeled split has 3 unreadable images"
    with pytest.raises(ValueError, match=sentence) as found:
        trainer.train()
    message = str(found.value)
    named = re.findall(r"/home/anna/photos/(\d+)\.png", message)
    assert {int(row) for row in named} <= set(BAD) and "drop_unreadable(dataset)" in message
    assert len(named) == (1 if damage is cut and decode != "memory" else 3) and "Traceback" not in message


class Damage(TrainerCallback):
    """Changes files after the first step."""

    def __init__(self, change: Callable[[], object]) -> None:
        self.change = change

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.change()


def on_disk(dataset: datasets.Dataset, folder: Path) -> datasets.Dataset:
    """The dataset with its images in files, like an image folder."""
    folder.mkdir()
    columns = dataset.to_dict()
    for row, image in enumerate(dataset["image"]):
        image.save(folder / f"{row}.png")
    columns["image"] = [{"bytes": None, "path": str(folder / f"{row}.png")} for row in range(len(dataset))]
    return datasets.Dataset.from_dict(columns, features=dataset.features)


def test_files_that_vanish_during_a_run_are_replaced(
    tmp_path: Path, fault_record: Callable[[str, str, str], None]
) -> None:
    def damage() -> None:
        for row, change in zip((2, 3, 4, 5), (Path.unlink, *[lambda path: path.write_bytes(b"")] * 3), strict=True):
            change(tmp_path / "u" / f"{row}.png")

    trainer = trainer_of(
        tmp_path / "out",
        unlabeled=on_disk(UNLABELED, tmp_path / "u"),
        max_steps=24,
        callbacks=[Damage(damage)],
        **STREAMED,
    )
    trainer.train()
    assert trainer.state.global_step == 24
    known = trainer.unreadable.known(trainer.state)
    assert known.keys() == {2, 3, 4, 5} and "No such file or directory: 2.png" in known[2][1]
    trainer.save_model()
    assert "2.png (row 2): not a readable image" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    fault_record(
        "unlabeled files that vanish or are emptied during a run",
        "the run goes on and lists them",
        "4 images (replaced)",
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_labeled_file_that_vanishes_stops_the_run_in_one_line(
    tmp_path: Path, workers: int, fault_record: Callable[[str, str, str], None]
) -> None:
    files = on_disk(LABELED, tmp_path / "l")
    callback = Damage(lambda: [path.unlink() for path in (tmp_path / "l").iterdir()])
    options = {**STREAMED, "dataloader_num_workers": workers, "max_steps": 30}
    trainer = trainer_of(tmp_path / "out", labeled=files, callbacks=[callback], **options)
    with pytest.raises(
        ValueError, match=r"^Image \d+ of the labeled split can't be decoded \(.*/l/\d+\.png: "
    ) as found:
        trainer.train()
    assert "\n" not in str(found.value)
    if workers:
        fault_record(
            "a labeled file vanishes during a run", "one line that names the file", "steps since the checkpoint"
        )


def test_no_readable_image_at_all_is_an_error(tmp_path: Path) -> None:
    files = on_disk(UNLABELED, tmp_path / "u")
    callback = Damage(lambda: [path.unlink() for path in (tmp_path / "u").iterdir()])
    trainer = trainer_of(tmp_path / "out", unlabeled=files, callbacks=[callback], logging_steps=50, **STREAMED)
    with pytest.raises(
        ValueError, match=r"unlabeled images in a row can't be decoded, .* Is their folder still there\?"
    ):
        trainer.train()


def test_an_evaluation_image_that_vanishes_is_named_in_one_line(tmp_path: Path) -> None:
    files = on_disk(digits(120, 130), tmp_path / "v")
    trainer = trainer_of(tmp_path / "out", validation=files, dataloader_num_workers=1, hidden_label_column=None)
    trainer.check_data()
    (tmp_path / "v" / "4.png").unlink()
    with pytest.raises(ValueError, match=r"^Image 4 of the evaluation split can't be decoded \(.*/v/4\.png: ") as found:
        trainer.evaluate()
    assert "\n" not in str(found.value)


def test_without_bad_images_a_batch_and_the_log_are_as_before(tmp_path: Path) -> None:
    for changes in (STREAMED, SETTINGS["memory"]):
        trainer = trainer_of(tmp_path, **changes)
        trainer.train()
        assert all("unreadable" not in batch for batch in trainer.get_train_dataloader())
        assert not any("unreadable_images" in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize("decode", ["memory", "stream"])
def test_max_image_pixels_reaches_training_and_evaluation(tmp_path: Path, decode: str) -> None:
    trainer = trainer_of(tmp_path, validation=digits(120, 130), max_image_pixels=255, **SETTINGS[decode])
    for call in (trainer.train, trainer.evaluate):
        with pytest.raises(ValueError, match=r"16 x 16 pixels, at most 255 are allowed"):
            call()
