"""Two real processes, launched as the recipes are, against one with twice the batch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ccssl_hf import CCSSLForImageClassification
from ccssl_hf.resume import is_complete
from distributed_runs import BAD_IMAGES, STOPPED, WITHOUT_BATCHNORM, batches
from sync_runs import CASES
from tiny_runs import VALIDATION, different, everything, logs_of_steps, model_of, trainer_of

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder that two processes wrote to, and the notes of each."""
    folder = tmp_path_factory.mktemp("two_processes")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    config = "recipes/accelerate_configs/two_cpu_processes.yaml"
    options = ["--config_file", config, "--main_process_port", str(port)]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *options, "tests/distributed_runs.py", str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    # Written by the processes just now, with arrays and floats beside the tensors.
    return folder, [torch.load(folder / f"notes_{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Any:
    doubled = {**WITHOUT_BATCHNORM, "per_device_train_batch_size": 4}
    trainer = trainer_of(tmp_path_factory.mktemp("one_process"), model_of("test_vit"), **doubled)
    taken = batches(trainer)
    trainer.train()
    return trainer, taken


def test_there_are_two_processes(runs):
    assert [notes["world_size"] for notes in runs[1]] == [2, 2]


def test_the_global_batch_is_that_of_one_process(runs, one_process):
    _, taken = one_process
    shares = [notes["batches"] for notes in runs[1]]
    assert len(taken) == len(shares[0]) == len(shares[1]) == 6
    for whole, *parts in zip(taken, *shares, strict=True):
        for name, values in whole.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), values)


def test_losses_and_weights_are_those_of_one_process(runs, one_process):
    trainer, _ = one_process
    expected = everything(trainer)
    for notes in runs[1]:
        for ours, theirs in zip(notes["plain"]["logs"], logs_of_steps(trainer), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
        for name, tensor in notes["plain"]["weights"].items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)


def test_unreadable_images_are_replaced_and_listed_as_in_one_process(runs, tmp_path, fault_record):
    settings = {**BAD_IMAGES, **WITHOUT_BATCHNORM, "per_device_train_batch_size": 4, "dataloader_num_workers": 1}
    trainer = trainer_of(tmp_path, model_of("test_vit"), **settings)
    taken = batches(trainer)
    trainer.train()
    first, second = (notes["bad_images"] for notes in runs[1])
    for whole, *parts in zip(taken, first["batches"], second["batches"], strict=True):
        for name, values in whole.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), values)
    assert different(first["weights"], second["weights"]) == []
    for name, tensor in everything(trainer).items():
        torch.testing.assert_close(first["weights"][name], tensor, rtol=1e-4, atol=1e-5)
    assert first["known"] == second["known"] == trainer.unreadable.known(trainer.state)
    assert first["known"].keys() == {3, 50, 70}
    fault_record(
        "unreadable unlabeled images, two processes", "the same images as in one process, one list", "3 images"
    )


def test_both_processes_hold_the_same_weights(runs):
    first, second = (notes["plain"]["weights"] for notes in runs[1])
    assert different(first, second) == []


@pytest.mark.parametrize("name", STOPPED)
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(runs, name):
    """On each process, although one of them has been evaluated more often."""
    for notes in runs[1]:
        (whole, whole_logs), (resumed, resumed_logs) = notes[name]["whole"], notes[name]["resumed"]
        assert different(whole, resumed) == []
        assert whole_logs == resumed_logs


def test_a_signal_to_one_process_stops_both_after_the_same_step(runs, fault_record):
    folder, notes = runs
    first, second = (note["signal"] for note in notes)
    assert first["code"] == second["code"] == 143 and first["step"] == second["step"] < 6
    assert [path.name for path in (folder / "signal").iterdir()] == [f"checkpoint-{first['step']}"]
    assert is_complete(folder / "signal" / f"checkpoint-{first['step']}")
    for note in notes:
        (whole, whole_logs), (resumed, resumed_logs) = note["batchnorm"]["whole"], note["signal"]["resumed"]
        assert different(whole, resumed) == [] and whole_logs == resumed_logs
    fault_record(
        "SIGTERM to one of two processes", "both save one checkpoint; the resumed run has the same bits", "0 steps"
    )


def test_batchnorm_of_both_processes_is_published(runs):
    folder, notes = runs
    first, second = (note["batchnorm"]["own_batchnorm"] for note in notes)
    assert set(different(first, second)) >= {"bn1.running_mean", "bn1.running_var"}
    saved = load_file(folder / "batchnorm" / "parts" / "checkpoint-3" / "model.safetensors")
    for name, tensor in first.items():
        torch.testing.assert_close(saved[name], (tensor + second[name]) / 2, rtol=1e-6, atol=1e-7)


def test_a_checkpoint_of_two_processes_goes_on_in_one(runs, tmp_path, caplog):
    folder, notes = runs
    model, changes = STOPPED["batchnorm"]
    trainer = trainer_of(tmp_path, model_of(**model, seed=1), **{**changes, "per_device_train_batch_size": 8})
    trainer.train(resume_from_checkpoint=str(folder / "batchnorm" / "parts" / "checkpoint-3"))
    assert trainer.state.global_step == 6
    assert "The checkpoint is of 2 processes and this run has 1: steps use the same images" in caplog.text
    before = logs_of_steps(trainer)[:3]
    assert before == notes[0]["batchnorm"]["whole"][1][:3]


def test_all_processes_start_from_the_main_one(runs):
    first, second = (notes["average_at_the_start"] for notes in runs[1])
    assert different(first, second) == []
    first, second = (notes["separate"]["weights"] for notes in runs[1])
    assert {name for name in different(first, second) if "running" not in name} == set()


def test_only_the_main_process_writes(runs):
    folder, _ = runs
    first, second = (
        {str(path.relative_to(folder / name)) for path in (folder / name).rglob("*") if path.is_file()}
        for name in ("of_process_0", "of_process_1")
    )
    assert second == {"checkpoint-3/rng_state_1.pth", "checkpoint-6/rng_state_1.pth"}
    assert {"README.md", "model.safetensors", "checkpoint-6/training_state.safetensors"} <= first
    assert not any("training_args" in name or "partial" in name for name in first)


def test_every_image_is_evaluated_once_with_the_published_weights(runs):
    """37 images in batches of 4 on two processes: the last batches are filled up with images seen before."""
    folder, notes = runs
    first, second = (note["separate"] for note in notes)
    assert first["metrics"] == second["metrics"] and first["metrics"]["test_top1"] == first["top1"] == second["top1"]
    assert first["predictions"].shape == (len(VALIDATION), 4)
    model = CCSSLForImageClassification.from_pretrained(folder / "of_process_0")
    alone = trainer_of(folder / "alone", model).predict(VALIDATION)
    np.testing.assert_allclose(first["predictions"], alone.predictions, rtol=1e-4, atol=1e-5)
    assert first["metrics"]["test_loss"] == pytest.approx(alone.metrics["test_loss"], rel=0.1)
    for name in ("test_top1", "test_macro_f1", "test_ece"):
        assert first["metrics"][name] == pytest.approx(alone.metrics[name], abs=1e-5)


def sync_runs(folder: Path, processes: int) -> list[dict[str, Any]]:
    """The notes of each of `processes` that train on one global batch."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    address |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(processes)}
    started = []
    for rank in range(processes):
        place = {} if processes == 1 else {**address, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **place}
        with (folder / f"log_{rank}.txt").open("w") as log:
            command = [sys.executable, "tests/sync_runs.py", str(folder)]
            started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
    try:
        codes = [process.wait(timeout=500) for process in started]
    finally:  # one that waits for another for ever must not outlive the test
        for process in started:
            process.kill()
    assert codes == [0] * processes, (folder / "log_0.txt").read_text()[-4000:]
    return [torch.load(folder / f"notes_{rank}.pt", weights_only=True) for rank in range(processes)]


@pytest.fixture(scope="module")
def synchronized(tmp_path_factory) -> dict[int, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("synchronized")
    return {processes: sync_runs(folder / str(processes), processes) for processes in (1, 2, 4)}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_the_number_of_processes_does_not_change_a_step(synchronized, name, processes):
    """With SyncBatchNorm, or without BatchNorm: the same images, losses and gradients to float precision."""
    [alone], together = synchronized[1], synchronized[processes]
    assert [notes["world"]["size"] for notes in together] == [processes] * processes
    expected = alone[name]
    for notes in together:
        found = notes[name]
        for ours, theirs in zip(found["rows"], expected["rows"], strict=True):
            assert sorted(ours.tolist()) == sorted(theirs.tolist())
        torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-4, atol=1e-5)
        for step, (ours, theirs) in enumerate(zip(found["gradients"], expected["gradients"], strict=True)):
            assert ours.keys() == theirs.keys()
            error, size = (
                torch.cat([each.flatten() for each in gradients]).norm()
                for gradients in ([ours[name] - theirs[name] for name in theirs], theirs.values())
            )
            # Rounding may turn single ReLUs on or off, and more of them after an update.
            assert error <= (0.005, 0.06)[step] * size
        assert found["weights"].keys() == expected["weights"].keys()  # plain names
        for weight, value in expected["weights"].items():
            torch.testing.assert_close(found["weights"][weight], value, rtol=1e-3, atol=1e-3)
