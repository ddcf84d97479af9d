"""A resumed run ends with the same bits as an uninterrupted run."""

from __future__ import annotations

import dataclasses
import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from transformers.trainer_utils import rotate_checkpoints

from ccssl_hf import hub, recipe, resume
from ccssl_hf.algorithms import ALGORITHMS, algorithm_hyperparameters
from ccssl_hf.output_folder import LOCK
from ccssl_hf.resume import MANIFEST, RUN, TRAINING_STATE, flaws, is_complete, last_checkpoint
from ccssl_hf.training_args import HyperparameterArguments
from tiny_runs import LABELED, UNLABELED, StopAt, different, everything, logs_of_steps, model_of, trainer_of

DROPOUT = {"backbone": "test_vit", "drop_rate": 0.3, "drop_path_rate": 0.3}
CASES = {
    "ccssl": ({}, {}, {}, {}),
    "other_workers": ({}, {}, {"dataloader_num_workers": 2}, {}),
    "dropout": (DROPOUT, {}, {}, {}),
    "dropout_and_evaluation_in_one_of_them": (DROPOUT, {"eval_strategy": "steps", "eval_steps": 2}, {}, {}),
    "dropout_and_evaluation_in_the_other": (DROPOUT, {}, {"eval_strategy": "steps", "eval_steps": 1}, {}),
    "accumulation": ({}, {}, {}, {"gradient_accumulation_steps": 2, "max_steps": 4}),
    "alignment": ({}, {}, {}, {"distribution_alignment_window": 4}),
    "streamed": ({"backbone": "test_resnet"}, {}, {}, {"decode": "stream", "weak_crop": "resized"}),
    "separate": ({}, {}, {}, {"weak_forward": "separate"}),
    "adamw": ({}, {}, {}, {"optim": "adamw_torch", "learning_rate": 0.001, "warmup_steps": 2}),
    "no_average": ({}, {}, {}, {"ema_decay": 0.0, "eval_weights": "raw"}),
}
"""Name: the model, and arguments of the uninterrupted run only, of the resumed run only, and of both."""


def interrupted(folder: Path, model: dict, stop: int = 3, **changes):
    """Train to step `stop`, write a checkpoint, and resume in a new trainer with a new model of another seed."""
    trainer_of(folder, model_of(**model), callbacks=[StopAt(stop)], **changes).train()
    trainer = trainer_of(folder, model_of(**model, seed=1), **changes)
    torch.manual_seed(99)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{stop}"))
    return trainer


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(tmp_path, case):
    model, only_one, only_other, both = CASES[case]
    whole = trainer_of(tmp_path / "whole", model_of(**model), **both, **only_one)
    whole.train()
    resumed = interrupted(tmp_path / "parts", model, **both, **only_other)
    assert resumed.state.global_step == whole.state.global_step
    assert different(everything(whole), everything(resumed)) == []
    assert logs_of_steps(whole) == logs_of_steps(resumed)


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "fixmatch"])
def test_every_algorithm_resumes_with_its_statistics(tmp_path, algorithm):
    changes = {"algorithm": algorithm}
    if "confidence_threshold" not in algorithm_hyperparameters(algorithm):
        changes["confidence_threshold"] = None
    if algorithm == "supervised":
        changes |= {"unlabeled": None, "lambda_contrast": 0, "push_threshold": None}
    whole = trainer_of(tmp_path / "whole", **changes)
    whole.train()
    resumed = interrupted(tmp_path / "parts", {}, **changes)
    assert different(everything(whole), everything(resumed)) == []
    assert logs_of_steps(whole) == logs_of_steps(resumed)


def test_a_seed_repeats_a_run_and_another_does_not(tmp_path):
    runs = [trainer_of(tmp_path / str(i), model_of(**DROPOUT), seed=seed) for i, seed in enumerate([5, 5, 6])]
    for run in runs:
        run.train()
    assert different(everything(runs[0]), everything(runs[1])) == []
    assert logs_of_steps(runs[0]) == logs_of_steps(runs[1])
    assert different(everything(runs[0]), everything(runs[2]))


def test_the_same_trainer_can_resume(tmp_path):
    whole = trainer_of(tmp_path / "whole")
    whole.train()
    trainer = trainer_of(tmp_path / "parts", save_strategy="steps", save_steps=3)
    trainer.train()
    trainer.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    assert different(everything(whole), everything(trainer)) == []


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A folder with the complete checkpoints 1, 2 and 3 of a run."""
    folder = tmp_path_factory.mktemp("stopped")
    trainer_of(folder, save_strategy="steps", save_steps=1, callbacks=[StopAt(3)]).train()
    return folder


def copy_run(stopped: Path, tmp_path: Path) -> Path:
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path / "run"


def cut_state(folder: Path) -> None:
    text = (folder / "trainer_state.json").read_text()
    (folder / "trainer_state.json").write_text(text[: len(text) // 2])


def damage(folder: Path) -> None:
    content = bytearray((folder / "optimizer.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "optimizer.pt").write_bytes(content)


BREAKAGES = {
    "one bit of the optimizer is wrong": damage,
    "the optimizer is missing": lambda folder: (folder / "optimizer.pt").unlink(),
    "the schedule is missing": lambda folder: (folder / "scheduler.pt").unlink(),
    "the random numbers are missing": lambda folder: (folder / "rng_state.pth").unlink(),
    "killed before the manifest": lambda folder: (folder / MANIFEST).unlink(),
    "killed while the optimizer was written": lambda folder: [
        (folder / name).unlink() for name in (TRAINING_STATE, "rng_state.pth", "trainer_state.json", RUN, MANIFEST)
    ],
    "killed before the last file": lambda folder: [
        (folder / name).unlink() for name in ("trainer_state.json", RUN, MANIFEST)
    ],
    "killed inside the last file": cut_state,
    "only the folder was made": lambda folder: [path.unlink() for path in folder.iterdir()],
    "saved with save_only_model": lambda folder: [(folder / name).unlink() for name in (TRAINING_STATE, MANIFEST)],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    trainer = trainer_of(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_an_incomplete_checkpoint_is_skipped_and_refused_by_name(
    stopped, whole, tmp_path, breakage, caplog, fault_record
):
    run = copy_run(stopped, tmp_path)
    BREAKAGES[breakage](run / "checkpoint-3")
    assert not is_complete(run / "checkpoint-3")
    assert last_checkpoint(run) == str(run / "checkpoint-2")
    assert f"{run}/checkpoint-3 is passed over: " in caplog.text

    trainer = trainer_of(run, model_of(seed=1))
    with pytest.raises(ValueError, match=r"checkpoint-3.*give an earlier checkpoint-N"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-3"))
    trainer.train(resume_from_checkpoint=True)
    assert different(everything(whole), everything(trainer)) == []
    fault_record(f"Last checkpoint: {breakage}", "named and passed over; the resumed run has the same bits", "1 step")


def test_every_file_that_is_missing_or_damaged_is_named(stopped, tmp_path):
    folder = copy_run(stopped, tmp_path) / "checkpoint-3"
    seals = json.loads((folder / MANIFEST).read_text())["files"]
    names = {path.name for path in folder.iterdir()}
    plain = {"config.json", "model.safetensors", "ccssl_head.safetensors", "wide_resnet_cifar.py"}
    assert seals.keys() == names - plain - {MANIFEST}  # those that resuming reads
    assert flaws(folder) == []
    for name in seals:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    found = flaws(folder)
    assert sorted(flaw.split()[0] for flaw in found) == sorted(seals)
    assert f"{TRAINING_STATE} has other content than was saved" in found
    (folder / TRAINING_STATE).write_bytes(b"")
    assert any(re.fullmatch(rf"{TRAINING_STATE} has 0 bytes instead of [\d,]+", flaw) for flaw in flaws(folder))
    with pytest.raises(ValueError, match=r"optimizer.pt has other content") as error:
        trainer_of(tmp_path / "run", model_of(seed=1)).train(resume_from_checkpoint=str(folder))
    assert all(f"\n  {name} " in str(error.value) for name in seals)


@pytest.mark.parametrize("text", ["", "[]", '{"files": []}', '{"files": {"x": 1}}', '{"files": {}}'])
def test_a_damaged_manifest_is_no_manifest(stopped, tmp_path, text):
    folder = copy_run(stopped, tmp_path) / "checkpoint-3"
    (folder / MANIFEST).write_text(text)
    assert all(MANIFEST in flaw for flaw in flaws(folder)) and not is_complete(folder)


def test_what_a_push_uploads_resumes_elsewhere(stopped, whole, tmp_path):
    """The trainer's state is uploaded without local paths."""
    folder = copy_run(stopped, tmp_path) / "checkpoint-3"
    state = json.loads((folder / "trainer_state.json").read_text())
    (folder / "trainer_state.json").write_text(
        json.dumps(state | {"best_model_checkpoint": f"{tmp_path}/checkpoint-1"})
    )
    resume.write_manifest(folder)
    files = hub.plan_push(folder, with_head=True, with_training_state=True).files
    hub.check_texts(files)
    elsewhere = tmp_path / "elsewhere" / "last-checkpoint"
    elsewhere.mkdir(parents=True)
    for name, path in files.items():
        (elsewhere / name).write_bytes(hub._content(path))
    assert {MANIFEST, RUN} <= files.keys() and flaws(elsewhere) == [] == flaws(folder)
    assert str(tmp_path) not in (elsewhere / "trainer_state.json").read_text()
    trainer = trainer_of(tmp_path / "out", model_of(seed=1))
    trainer.train(resume_from_checkpoint=str(elsewhere))
    assert different(everything(whole), everything(trainer)) == []


def test_a_manifest_names_no_other_files(stopped, tmp_path):
    folder = copy_run(stopped, tmp_path) / "checkpoint-3"
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["../../secret"] = {"size": 1, "sha256": "0"}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert flaws(folder) == ["manifest.json lists '../../secret', which is no file of a checkpoint"]


@pytest.mark.parametrize("wanted", ["checkpoint-7", "nowhere/checkpoint-3", ""])
def test_a_checkpoint_that_is_not_there_is_answered_with_those_that_are(stopped, tmp_path, wanted):
    run = copy_run(stopped, tmp_path)
    damage(run / "checkpoint-2")
    with pytest.raises(ValueError, match=rf"{run}/{wanted}.*is no checkpoint|{run} is no checkpoint") as error:
        trainer_of(run, model_of(seed=1)).train(resume_from_checkpoint=str(run / wanted))
    assert str(error.value).endswith(f"choose one of\n  {run}/checkpoint-3\n  {run}/checkpoint-1")


def test_a_checkpoint_is_whole_before_older_ones_are_removed(tmp_path, monkeypatch):
    """A run that is killed in between keeps one of the two."""
    seen = []

    def rotate(output_dir, **settings):
        seen.append([path.name for path in resume.checkpoints(output_dir) if is_complete(path)])
        rotate_checkpoints(output_dir, **settings)

    monkeypatch.setattr(resume, "rotate_checkpoints", rotate)
    monkeypatch.setattr("transformers.trainer.rotate_checkpoints", rotate)
    trainer_of(tmp_path, save_strategy="steps", save_steps=2, save_total_limit=1).train()
    mine = seen[1::2]  # upstream's own calls keep all
    assert mine == [["checkpoint-2"], ["checkpoint-4", "checkpoint-2"], ["checkpoint-6", "checkpoint-4"]]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]


def test_a_damaged_best_checkpoint_is_not_loaded(tmp_path):
    class Damage(StopAt):
        def on_train_end(self, args, state, control, **kwargs):
            pass

        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 6:
                damage(Path(state.best_model_checkpoint))

    changes = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "top1",
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    trainer = trainer_of(tmp_path, save_strategy="steps", save_steps=2, callbacks=[Damage(99)], **changes)
    with pytest.raises(ValueError, match=r"is incomplete.*\n  optimizer.pt has other content"):
        trainer.train()


# ------------------------------------------------------------------------------------------------------ other settings

OTHER = {
    "mu": ({"mu": 3}, ["mu: 2 in the checkpoint, 3 now"]),
    "steps and rate": (
        {"max_steps": 8, "learning_rate": 0.01},
        ["learning_rate: 0.03 in the checkpoint, 0.01 now", "max_steps: 6 in the checkpoint, 8 now"],
    ),
    "batch": (
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        [
            "gradient_accumulation_steps: 1 in",
            "labeled images of each batch, over all processes: 4 in the checkpoint, 2",
        ],
    ),
    "seed": ({"seed": 1}, ["seed: 42 in the checkpoint, 1 now"]),
    "hyperparameter": ({"lambda_u": 2.0}, ["lambda_u: 1.0 in the checkpoint, 2.0 now"]),
    "views": ({"horizontal_flip": False, "cutout_size": 4}, ["cutout_size: 16 in", "horizontal_flip: True in"]),
    "precision": ({"bf16": True}, ["bf16: False in the checkpoint, True now"]),
    "optimizer": ({"optim": "adamw_torch"}, ["optim: 'sgd' in the checkpoint, 'adamw_torch' now"]),
    "order of the images": ({"unlabeled": UNLABELED.select(range(95, -1, -1))}, ["unlabeled data: '96 images"]),
    "labeled split": ({"labeled": LABELED.select(range(20))}, ["labeled data: '24 images"]),
    "labels": (
        {"labeled": LABELED.map(lambda row: {"label": (row["label"] + 1) % 4}, load_from_cache_file=False)},
        ["labeled data: '24 images"],
    ),
    "ema": ({"ema_decay": 0.99}, ["ema_decay: 0.999 in the checkpoint, 0.99 now"]),
    "classes": ({"model": model_of("wide_resnet10_1_cifar", projection_dim=32)}, ["projection_dim: 64 in the"]),
}


@pytest.mark.parametrize("case", OTHER)
def test_other_settings_are_refused_with_both_values(stopped, tmp_path, case, fault_record):
    changes, lines = OTHER[case]
    with pytest.raises(ValueError, match=r"with the arguments of that run, or set allow_changes=True") as error:
        trainer_of(tmp_path, **changes).train(resume_from_checkpoint=str(stopped / "checkpoint-3"))
    found = str(error.value).split("\n  ")[1:]
    assert all(any(line.startswith(start) for line in found) for start in lines), found
    assert len(found) <= len(lines) + 1, found  # one setting may change a second one
    fault_record(f"Resumed with another value: {case}", "refused, naming both values", "0 steps")


def test_what_is_allowed_takes_effect_and_is_said(stopped, tmp_path, caplog):
    changes = {"learning_rate": 0.01, "max_steps": 8, "schedule": "lr_scheduler_type", "lr_scheduler_type": "constant"}
    trainer = trainer_of(tmp_path, model_of(seed=1), allow_changes=True, **changes)
    trainer.train(resume_from_checkpoint=str(stopped / "checkpoint-3"))
    assert "learning_rate: 0.03 in the checkpoint, 0.01 now" in caplog.text
    assert trainer.state.global_step == 8
    assert [entry["learning_rate"] for entry in logs_of_steps(trainer)[3:]] == [0.01] * 5


def test_settings_that_do_not_change_weights_may_differ_and_take_effect(stopped, whole, tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 3, "dataloader_num_workers": 1}
    trainer = trainer_of(tmp_path, model_of(seed=1), **changes)
    trainer.train(resume_from_checkpoint=str(stopped / "checkpoint-3"))
    assert different(everything(whole), everything(trainer)) == []
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-4", "checkpoint-6"}
    assert [entry["step"] for entry in logs_of_steps(trainer)] == [1, 2, 3, 6]


def test_other_releases_are_named(stopped, tmp_path, caplog):
    folder = copy_run(stopped, tmp_path) / "checkpoint-3"
    run = json.loads((folder / RUN).read_text())
    run["environment"]["timm"] = "0.1"
    (folder / RUN).write_text(json.dumps(run))
    resume.write_manifest(folder)
    trainer_of(tmp_path / "run", model_of(seed=1)).train(resume_from_checkpoint=True)
    assert "Bits may differ from an uninterrupted run" in caplog.text and "timm: '0.1' in the checkpoint" in caplog.text


def test_every_argument_is_compared_or_listed_as_one_that_may_differ(tmp_path):
    trainer = trainer_of(tmp_path, hub_token="hf_" + "a" * 30)
    compared = resume.run_settings(trainer)["settings"].keys()
    hyper = {f.name for f in dataclasses.fields(HyperparameterArguments)}  # those of this algorithm
    for f in dataclasses.fields(trainer.args):
        if f.name not in hyper or f.name in trainer.algorithm.hyperparameters:
            assert (f.name in compared) != (f.name in resume.NOT_COMPARED), f.name
    assert not (hyper | {"mu", "max_steps", "seed", "optim", "bf16", "torch_compile"}) & resume.NOT_COMPARED


def test_the_settings_of_a_checkpoint_hold_no_token_and_no_local_path(tmp_path):
    trainer = trainer_of(tmp_path, hub_token="hf_" + "a" * 30, callbacks=[StopAt(1)])
    trainer.train()
    text = (tmp_path / "checkpoint-1" / RUN).read_text()
    assert "hf_a" not in text and str(tmp_path) not in text and str(Path.home()) not in text


# ----------------------------------------------------------------------------------------------- runs in one folder


def test_a_second_run_in_a_folder_is_refused_and_overwrites_if_told(stopped, tmp_path, caplog, fault_record):
    run = copy_run(stopped, tmp_path)
    trainer = trainer_of(run, max_steps=2, save_strategy="steps", save_steps=2)
    with pytest.raises(ValueError, match="has results of an earlier run: resume it with resume_from_checkpoint=True, "):
        trainer.train()
    (run / "notes.txt").write_text("mine")
    trainer.save_model()
    (run / "test_results.json").write_text("{}")
    trainer.args.overwrite = True
    trainer.train()
    assert {path.name for path in run.iterdir()} == {"checkpoint-2", "notes.txt", "images"}
    assert "Removed from" in caplog.text and "\n  checkpoint-3\n" in caplog.text and "\n  README.md" in caplog.text
    with pytest.raises(ValueError, match=r"overwrite=True to delete them.\n  checkpoint-2"):
        trainer_of(run).train()
    fault_record("A second run into the same folder", "refused unless it resumes or overwrites", "0 bytes")


def test_a_checkpoint_folder_with_files_of_others_is_not_removed(tmp_path):
    other = tmp_path / "checkpoint-7" / "weights" / "model.bin"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"overwrite=True to delete them.\n  checkpoint-7"):
        trainer_of(tmp_path, max_steps=1).train()
    assert other.read_bytes() == b"mine"


def test_a_finished_model_is_not_overwritten_either(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=1)
    trainer.train()
    trainer.train()  # nothing was saved that could be lost
    trainer.save_model()
    with pytest.raises(ValueError, match=r"overwrite=True to delete them.\n  model.safetensors"):
        trainer_of(tmp_path).train()


def test_resuming_never_deletes_what_it_resumes_from(stopped, whole, tmp_path):
    run = copy_run(stopped, tmp_path)
    trainer = trainer_of(run, model_of(seed=1), overwrite=True)
    trainer.train(resume_from_checkpoint="true")
    assert different(everything(whole), everything(trainer)) == []
    assert (run / "checkpoint-1").is_dir()
    with pytest.raises(ValueError, match="has results of an earlier run"):  # of another one than that of the checkpoint
        trainer_of(run).train(resume_from_checkpoint=str(stopped / "checkpoint-3"))


def test_a_run_killed_before_its_first_checkpoint_starts_again(stopped, tmp_path):
    run = copy_run(stopped, tmp_path)
    shutil.rmtree(run / "checkpoint-1")
    shutil.rmtree(run / "checkpoint-2")
    BREAKAGES["killed before the last file"](run / "checkpoint-3")
    (run / LOCK).write_text("process 1 on a machine that was switched off")
    trainer_of(run, max_steps=1).train()
    assert list(run.iterdir()) == []


ALIVE = """
    import sys
    from pathlib import Path
    from ccssl_hf.output_folder import one_run_in

    with one_run_in(sys.argv[1], resume=None, overwrite=False):
        print("in", flush=True)
        sys.stdin.read()
"""


def test_two_runs_at_once_in_a_folder_are_refused_until_one_is_killed(tmp_path, fault_record):
    words = [sys.executable, "-c", textwrap.dedent(ALIVE), str(tmp_path)]
    other = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "in\n"
        for changes in ({}, {"overwrite": True}):
            with pytest.raises(ValueError, match=rf"Another run \(process {other.pid} on .*is writing to output_dir"):
                trainer_of(tmp_path, **changes).train()
    finally:
        other.kill()
        other.communicate()
    trainer_of(tmp_path, max_steps=1).train()
    fault_record("Two runs at once in one folder", "the second is refused; a killed one is no obstacle", "0 bytes")


# ---------------------------------------------------------------------------------------------------------- the disk


class NoSpace(StopAt):
    """Lets no file of this process grow beyond 64 KiB from a step on, as on a full disk."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))


def test_a_full_disk_ends_the_run_with_the_last_whole_checkpoint(tmp_path, whole, capsys, fault_record):
    changes = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    trainer = trainer_of(tmp_path, callbacks=[NoSpace(3)], **changes)
    try:
        with pytest.raises(SystemExit) as end:
            recipe.train(trainer, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert end.value.code == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert f"error: {tmp_path}/checkpoint-3 could not be saved (" in line and "free space" in line
    assert line.endswith(f"The last complete checkpoint is {tmp_path}/checkpoint-2.")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    trainer = trainer_of(tmp_path, model_of(seed=1))
    trainer.train(resume_from_checkpoint=True)
    assert different(everything(whole), everything(trainer)) == []
    fault_record(
        "A full disk while a checkpoint is saved", "one sentence, exit code 1, earlier checkpoint whole", "1 step"
    )


def test_a_folder_that_cannot_be_written_to_ends_the_run_with_a_sentence(tmp_path, fault_record):
    """A file in place of the folder of the checkpoint, which stops the superuser, too."""

    class Block(StopAt):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                Path(args.output_dir).rename(tmp_path / "moved")
                Path(args.output_dir).write_text("a file")

    trainer = trainer_of(tmp_path / "run", save_strategy="steps", save_steps=1, callbacks=[Block(9)])
    with pytest.raises(OSError, match=r"checkpoint-2 could not be saved \(.*There is no earlier complete checkpoint"):
        trainer.train()
    assert last_checkpoint(tmp_path / "moved") == str(tmp_path / "moved" / "checkpoint-1")
    fault_record("A folder that cannot be written to any more", "one sentence, earlier checkpoint whole", "1 step")


def test_the_last_checkpoint_is_the_one_of_the_most_steps(stopped, tmp_path):
    run = copy_run(stopped, tmp_path)
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-10")
    (run / "checkpoint-100.bak").mkdir()
    assert last_checkpoint(run) == str(run / "checkpoint-10")


def test_without_a_complete_checkpoint_there_is_nothing_to_resume(tmp_path):
    with pytest.raises(ValueError, match="has no complete checkpoint: leave out resume_from_checkpoint"):
        trainer_of(tmp_path).train(resume_from_checkpoint=True)


def test_save_only_model_leaves_nothing_to_resume_from(tmp_path):
    trainer_of(tmp_path, save_only_model=True, callbacks=[StopAt(2)]).train()
    assert not (tmp_path / "checkpoint-2" / TRAINING_STATE).exists()
    with pytest.raises(ValueError, match="written with save_only_model"):
        trainer_of(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize(
    "changes",
    [
        {"ema_decay": 0.0, "eval_weights": "raw"},
        {"distribution_alignment_window": 4},
        {"algorithm": "freematch", "confidence_threshold": None},
        {"model": model_of(projection_dim=32)},
    ],
    ids=["ema", "alignment", "algorithm", "projection"],
)
def test_a_checkpoint_of_other_arguments_is_refused(stopped, tmp_path, changes):
    trainer = trainer_of(tmp_path, **changes)
    with pytest.raises(ValueError, match="resume with the arguments of that run"):
        trainer.train(resume_from_checkpoint=str(stopped / "checkpoint-3"))


def test_a_checkpoint_is_also_a_plain_folder_with_the_average(stopped):
    from safetensors.torch import load_file

    plain = load_file(stopped / "checkpoint-3" / "model.safetensors")
    state = load_file(stopped / "checkpoint-3" / TRAINING_STATE)
    assert all(torch.equal(tensor, state[f"ema.backbone.{name}"]) for name, tensor in plain.items())
    assert not all(torch.equal(tensor, state[f"model.backbone.{name}"]) for name, tensor in plain.items())


KILLED = """
    import sys
    from pathlib import Path
    from tiny_runs import trainer_of

    trainer_of(Path(sys.argv[1]), save_strategy="steps", save_steps=1, max_steps=500).train()
"""


@pytest.mark.slow
def test_a_run_killed_at_any_moment_resumes_with_the_same_bits(tmp_path):
    """Each attempt is killed a little later, mostly while a checkpoint is written, since they follow one another."""
    for attempt in range(4):
        run = tmp_path / str(attempt)
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(KILLED), str(run)], cwd=Path(__file__).parent)
        try:
            while not (run / "checkpoint-3").exists():
                assert process.poll() is None, "the run ended before it could be killed"
                time.sleep(0.001)
            time.sleep(0.004 * attempt)
            process.send_signal(signal.SIGKILL)
        finally:
            process.kill()
            process.wait()
        start = json.loads((Path(last_checkpoint(run)) / "trainer_state.json").read_text())["global_step"]
        resumed = trainer_of(run, model_of(seed=1), max_steps=500, callbacks=[StopAt(start + 2)])
        resumed.train(resume_from_checkpoint=True)
        whole = trainer_of(tmp_path / f"whole-{attempt}", max_steps=500, callbacks=[StopAt(start + 2)])
        whole.train()
        assert different(everything(whole), everything(resumed)) == []
