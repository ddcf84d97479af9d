"""A resumed run ends with the same bits as an uninterrupted run."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from ccssl_hf.algorithms import ALGORITHMS, algorithm_hyperparameters
from ccssl_hf.resume import TRAINING_STATE, is_complete, last_checkpoint
from tiny_runs import StopAt, different, everything, logs_of_steps, model_of, trainer_of

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


BREAKAGES = {
    "killed while the optimizer was written": lambda folder: [
        (folder / name).unlink() for name in (TRAINING_STATE, "rng_state.pth", "trainer_state.json")
    ],
    "killed before the last file": lambda folder: (folder / "trainer_state.json").unlink(),
    "killed inside the last file": cut_state,
    "only the folder was made": lambda folder: [path.unlink() for path in folder.iterdir()],
    "saved with save_only_model": lambda folder: (folder / TRAINING_STATE).unlink(),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_an_incomplete_checkpoint_is_skipped_and_refused_by_name(stopped, tmp_path, breakage):
    run = copy_run(stopped, tmp_path)
    BREAKAGES[breakage](run / "checkpoint-3")
    assert not is_complete(run / "checkpoint-3")
    assert last_checkpoint(run) == str(run / "checkpoint-2")

    trainer = trainer_of(run, model_of(seed=1))
    with pytest.raises(ValueError, match=r"checkpoint-3.*give an earlier checkpoint-N"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-3"))
    trainer.train(resume_from_checkpoint=True)
    whole = trainer_of(tmp_path / "whole")
    whole.train()
    assert different(everything(whole), everything(trainer)) == []


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
