"""Losses, gradients and weights that are NaN or infinite: in real runs, at save, at load and in predictions."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from starlette.testclient import TestClient

from ccssl_hf import CCSSLForImageClassification, CCSSLTrainer
from ccssl_hf.callbacks.nonfinite import FiniteGuard, NonFiniteError
from ccssl_hf.checkpoint import HEAD_FILE, WEIGHTS_FILE, check_finite, save_tensors
from ccssl_hf.deploy.export import export_onnx, write_handler
from ccssl_hf.deploy.handler import EndpointHandler
from ccssl_hf.deploy.predict import Classifier, open_images, predict_all, predict_to_file
from ccssl_hf.deploy.serve import create_app
from ccssl_hf.deploy.space import write_space
from ccssl_hf.deploy.space_page import app
from ccssl_hf.hub import plan_push
from ccssl_hf.resume import TRAINING_STATE
from nonfinite_runs import break_gradient, break_term
from small_models import picture, published
from tiny_runs import LABELED, VALIDATION, StopAt, different, everything, logs_of_steps, model_of, trainer_of

Record = Callable[[str, str, str], None]
EACH_STEP: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
ROOT = Path(__file__).resolve().parents[1]


def checkpoints(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("checkpoint-*")}


def not_finite(trainer: CCSSLTrainer) -> list[str]:
    return [name for name, value in everything(trainer).items() if not value.float().isfinite().all()]


# --------------------------------------------------------------------------------------------------------------- stop


def test_a_loss_that_explodes_stops_the_run(tmp_path: Path, fault_record: Record) -> None:
    trainer = trainer_of(tmp_path, learning_rate=1e20, **EACH_STEP)
    with pytest.raises(NonFiniteError) as caught:
        trainer.train()
    text = str(caught.value)
    assert text.startswith("Step 2: loss_x, loss_u, loss_contrast, ")
    assert f"the last checkpoint is {tmp_path / 'checkpoint-1'}" in text and "lower learning_rate (1e+20)" in text
    assert checkpoints(tmp_path) == {"checkpoint-1"}
    state = load_file(tmp_path / "checkpoint-1" / TRAINING_STATE)
    assert all(value.isfinite().all() for value in state.values() if value.is_floating_point())
    fault_record(
        "Loss becomes NaN (learning rate 1e20)",
        "the run stops and names step, terms and rows; the last finite checkpoint stays",
        "0 steps before the NaN",
    )


def test_a_gradient_that_is_nan_names_its_parameter(tmp_path: Path, fault_record: Record) -> None:
    trainer = trainer_of(tmp_path, **EACH_STEP)
    break_gradient(trainer, 3)
    with pytest.raises(NonFiniteError, match=r"^Step 3: the gradient of backbone.conv1.weight is NaN or infinite \("):
        trainer.train()
    assert checkpoints(tmp_path) == {"checkpoint-2"}
    assert not [name for name in not_finite(trainer) if "running" not in name]  # stopped before the update
    fault_record(
        "Gradient becomes NaN", "the run stops before the update and names the parameter", "0 steps before the NaN"
    )


def test_a_term_that_is_infinite_is_named_with_the_rows_of_its_step(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, gradient_accumulation_steps=2, max_grad_norm=1.0, max_steps=3)
    taken = [batch for batch in trainer.get_train_dataloader()][3]  # the second one of step 2
    break_term(trainer, 4, value=float("inf"))
    with pytest.raises(NonFiniteError, match=r"^Step 2: loss_u is NaN or infinite") as caught:
        trainer.train()
    rows = ", ".join(map(str, sorted(taken["unlabeled_index"].tolist())))
    assert f"unlabeled rows {rows}" in str(caught.value)
    labeled = str(caught.value).split("labeled rows ")[1].split(";")[0].split(", ")
    assert sorted(LABELED[[int(row) for row in labeled]]["label"]) == sorted(taken["labels"].tolist())


def test_rows_are_narrowed_to_those_whose_outputs_are_not_finite(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, model_of("test_vit"), max_steps=2)  # without BatchNorm, which mixes images
    taken = next(iter(trainer.get_train_dataloader()))
    views = len(taken["labels"])

    def break_two(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        bad = torch.zeros(len(output), 1)
        bad[views + 2] = float("nan")  # weak view of the third unlabeled image
        return output + bad

    trainer.model.backbone.get_classifier().register_forward_hook(break_two)
    row = int(taken["unlabeled_index"][2])
    with pytest.raises(NonFiniteError, match=rf"unlabeled rows {row}\)"):
        trainer.train()


def test_flags_that_come_late_are_read_before_a_save_an_evaluation_and_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an accelerator, where the run goes on until the device has got there."""
    monkeypatch.setattr(FiniteGuard, "_is_there", lambda *args: False)
    for name, changes in {
        "save": {"save_strategy": "steps", "save_steps": 4},
        "evaluation": {"eval_strategy": "steps", "eval_steps": 4},
        "end": {},
    }.items():
        trainer = trainer_of(tmp_path / name, **changes)
        break_gradient(trainer, 2)
        with pytest.raises(NonFiniteError, match=r"^Step 2: the gradient of backbone.conv1.weight"):
            trainer.train()
        assert trainer.state.global_step == (6 if name == "end" else 4)
        assert checkpoints(tmp_path / name) == set()


def test_a_step_costs_no_more_reads_than_before(tmp_path: Path) -> None:
    """The loss has the same bits, and so have weights and logs, with the check and without it."""
    runs = []
    for number in range(2):
        trainer = trainer_of(tmp_path / str(number), max_grad_norm=0.5)
        if number:
            trainer.guard.add = lambda result, batch, inputs: result.loss  # type: ignore[method-assign]
            trainer.guard.after_backward = lambda loss: loss  # type: ignore[method-assign]
        trainer.train()
        runs.append(trainer)
    assert different(*map(everything, runs)) == []
    assert logs_of_steps(runs[0]) == logs_of_steps(runs[1])


# --------------------------------------------------------------------------------------------------------------- skip


ALGORITHMS: dict[str, dict[str, Any]] = {
    "fixmatch": {"distribution_alignment_window": 3},
    "comatch": {"confidence_threshold": None, "push_threshold": None},
    "freematch": {"confidence_threshold": None},
    "softmatch": {"confidence_threshold": None},
    "flexmatch": {},
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_skipped_step_leaves_no_trace_but_a_count(algorithm: str, tmp_path: Path) -> None:
    changes = {"algorithm": algorithm, "ema_decay": 0.5, **ALGORITHMS[algorithm]}
    stopped = trainer_of(tmp_path / "before", max_steps=2, callbacks=[StopAt(1)], **changes)
    trainer = trainer_of(tmp_path / "skipped", max_steps=2, on_nonfinite="skip", **changes)
    break_term(trainer, 2)
    trainer.train()
    stopped.train()
    found, expected = everything(trainer), everything(stopped)
    weights = [name for name in found if not name.startswith(("ema.", "optimizer.")) or "momentum" in name]
    assert [name for name in weights if not torch.equal(found[name], expected[name])] == []
    assert not_finite(trainer) == []
    assert [entry for entry in trainer.state.log_history if "skipped" in entry] == [{"step": 2, "skipped": "loss_u"}]


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch_fused", "adamw_torch"])
@pytest.mark.parametrize("on_device", [False, True])
def test_the_run_goes_on_after_a_skipped_step(
    optim: str, on_device: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`on_device`: the fused optimizer leaves out the update by itself, as on an accelerator."""
    if on_device:
        fused = lambda self, optimizer, flag: bool(optimizer.defaults.get("fused") and optimizer.state)  # noqa: E731
        monkeypatch.setattr(FiniteGuard, "_leaves_out_itself", fused)
    trainer = trainer_of(tmp_path, on_nonfinite="skip", optim=optim, max_grad_norm=1.0, logging_steps=3, max_steps=6)
    break_gradient(trainer, 1)
    break_term(trainer, 4)
    result = trainer.train()
    assert trainer.state.global_step == 6 and not_finite(trainer) == []
    logs = logs_of_steps(trainer)
    assert [entry["skipped_steps"] for entry in logs] == [1, 2]
    assert all(value == value for entry in logs for name, value in entry.items() if name != "grad_norm")
    assert "2 of 6 steps were skipped: 1 (the gradient of backbone.conv1.weight), 4 (loss_u)." in caplog.text
    assert result.metrics["skipped_steps"] == 2
    assert 3 < result.metrics["train_loss"] < 7


def test_too_many_skipped_steps_in_a_row_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ccssl_hf.callbacks.nonfinite.MOST_IN_A_ROW", 3)
    trainer = trainer_of(tmp_path, on_nonfinite="skip")
    for step in range(1, 7):
        break_term(trainer, step)
    with pytest.raises(NonFiniteError, match=r"^Step 4: loss_u is .*, the 4th step in a row. The run"):
        trainer.train()


# ---------------------------------------------------------------------------------------------------- two processes


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("nonfinite")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    options = ["--config_file", "recipes/accelerate_configs/two_cpu_processes.yaml", "--main_process_port", str(port)]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, "tests/nonfinite_runs.py", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, [torch.load(folder / f"notes_{rank}.pt", weights_only=True) for rank in range(2)]


def test_all_processes_stop_at_the_step_of_one(two_processes: Any, fault_record: Record) -> None:
    folder, notes = two_processes
    assert [note["world"] for note in notes] == [2, 2]
    errors = [note["stop"]["error"] for note in notes]
    assert errors[0] == errors[1] and errors[0].startswith("Step 3: loss_u is NaN or infinite (labeled rows ")
    assert "the last checkpoint is /stop/checkpoint-2" in errors[0]
    labeled, unlabeled = (part.split("rows ")[1].split(")")[0].split(", ") for part in errors[0].split(";")[:2])
    assert (len(labeled), len(unlabeled)) == (2, 4)  # of the process that has the NaN
    assert checkpoints(folder / "stop") == {"checkpoint-1", "checkpoint-2"}
    fault_record(
        "Loss becomes NaN in one of two processes",
        "both stop at the same step and name the rows of the one",
        "0 steps before the NaN",
    )


def test_all_processes_skip_the_step_of_one(two_processes: Any) -> None:
    _, notes = two_processes
    for note in notes:
        assert note["skip"]["error"] is None and note["skip"]["step"] == 4
        assert note["skip"]["skipped"] == [{"step": 3, "skipped": "loss_u"}]
        assert all(value.float().isfinite().all() for value in note["skip"]["weights"].values())
    first, second = (note["skip"]["weights"] for note in notes)
    assert [name for name in different(first, second) if "running" not in name] == []


# ------------------------------------------------------------------------------------------ saved, loaded, published


def test_all_tensors_that_are_not_finite_are_named() -> None:
    tensors = {f"t{number}": torch.tensor([1.0, float("nan")]) for number in range(12)}
    with pytest.raises(ValueError, match=r"^X has NaN .* in 12 of 14 tensors \(t0, .*, t9 and 2 more\)"):
        check_finite({**tensors, "fine": torch.ones(2), "whole": torch.ones(2, dtype=torch.int64)}, "X")
    check_finite({"half": torch.ones(2, dtype=torch.bfloat16), "none": torch.empty(0)}, "X")


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, fault_record: Record) -> None:
    trainer = trainer_of(tmp_path / "run", max_steps=1)
    trainer.train()
    trainer.save_model()
    kept = (tmp_path / "run" / WEIGHTS_FILE).read_bytes()
    with torch.no_grad():
        trainer.model.backbone.conv1.weight[0] = float("inf")
    with pytest.raises(ValueError, match=r"training state has NaN .*model.backbone.conv1.weight.*Nothing was"):
        trainer.save_model()
    with pytest.raises(ValueError, match=r"^The model has NaN or infinite numbers in 1 of .*backbone.conv1.weight"):
        trainer.model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "run" / WEIGHTS_FILE).read_bytes() == kept and not (tmp_path / "out").exists()
    fault_record(
        "NaN weights are to be saved", "refused with the names of the tensors; the earlier file stays", "0 bytes"
    )


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A published folder with a NaN weight, as an earlier release would have written it."""
    folder = published(tmp_path / "broken", "wide_resnet10_1_cifar", 16)
    state = load_file(folder / WEIGHTS_FILE)
    state["fc.bias"][0] = float("nan")
    save_tensors(folder / WEIGHTS_FILE, state)
    return folder


def test_a_model_that_is_not_finite_is_not_loaded(broken: Path, tmp_path: Path, fault_record: Record) -> None:
    for load in (CCSSLForImageClassification.from_pretrained, Classifier.from_pretrained):
        with pytest.raises(ValueError, match=r"^The model in '.*broken' has NaN or infinite .*\(backbone.fc.bias\)"):
            load(broken)
    whole = published(tmp_path / "whole", "wide_resnet10_1_cifar", 16)
    heads = load_file(whole / HEAD_FILE)
    next(iter(heads.values()))[:] = float("inf")
    save_tensors(whole / HEAD_FILE, heads, metadata={"ccssl": '{"projection_dim": 64, "heads": {}}'})
    with pytest.raises(ValueError, match=r"infinite .*\(projection"):
        CCSSLForImageClassification.from_pretrained(whole)
    fault_record("A published model with NaN weights is loaded", "refused with the names of the tensors", "0 bytes")


def test_a_run_does_not_resume_from_weights_that_are_not_finite(tmp_path: Path) -> None:
    trainer_of(tmp_path, max_steps=1, **EACH_STEP).train()
    path = tmp_path / "checkpoint-1" / TRAINING_STATE
    state = load_file(path)
    next(value for value in state.values() if value.is_floating_point())[:] = float("nan")
    save_tensors(path, state)
    with pytest.raises(ValueError):
        trainer_of(tmp_path, max_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_predictions_that_are_not_finite_are_errors_of_their_rows(tmp_path: Path, fault_record: Record) -> None:
    import pyarrow.parquet as pq

    classifier = Classifier.from_pretrained(published(tmp_path / "model", "wide_resnet10_1_cifar", 16), device="cpu")
    network, calls = classifier._network, [0]

    def third_is_nan(module: Any, inputs: Any, output: Any) -> Any:
        first, calls[0] = calls[0], calls[0] + len(output[0])
        if first <= 2 < calls[0]:
            output[0][2 - first] = float("nan")
        return output

    network.register_forward_hook(third_is_nan)
    images = open_images(VALIDATION.select(range(6)))
    done = predict_to_file(classifier, images, tmp_path / "out.parquet", num_workers=1)
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["error"] is None for row in rows] == [True, True, False, True, True, True]
    assert (
        "output is NaN or infinite" in rows[2]["error"] and rows[2]["label"] is None and rows[2]["confidence"] is None
    )
    assert done.unreadable == 1
    calls[0] = 0
    with pytest.raises(ValueError, match=r"\n  2: the network's output is NaN or infinite"):
        predict_all(classifier, VALIDATION.select(range(6)), num_workers=1)
    calls[0] = 0
    with pytest.raises(ValueError, match=r"Image 2 of the batch: the network's output is NaN"):
        classifier.predict([VALIDATION[row]["image"] for row in range(4)])
    fault_record("An image whose prediction is NaN", "an error in the row of that image", "1 prediction")


def test_a_model_that_is_not_finite_goes_nowhere(broken: Path, tmp_path: Path) -> None:
    for go in (
        lambda: plan_push(broken),
        lambda: write_handler(broken, tmp_path / "handler"),
        lambda: EndpointHandler(str(broken)),
        lambda: app.Model(broken),
        lambda: write_space(broken, tmp_path / "space"),
    ):
        with pytest.raises(ValueError, match=r"NaN or infinite numbers in .*fc\.bias"):
            go()
    assert not (tmp_path / "handler").exists()
    model = CCSSLForImageClassification.from_pretrained(published(tmp_path / "whole", "wide_resnet10_1_cifar", 16))
    with torch.no_grad():
        model.backbone.fc.bias[0] = float("inf")
    with pytest.raises(ValueError, match=r"^The model has NaN or infinite numbers in 1 of .*fc.bias"):
        export_onnx(model, tmp_path / "onnx")


def test_answers_that_are_not_finite_are_errors_in_a_sentence(tmp_path: Path, fault_record: Record) -> None:
    folder = published(tmp_path / "model", "wide_resnet10_1_cifar", 16)
    content = io.BytesIO()
    picture(20, 20).save(content, "PNG")

    def is_nan(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * float("nan")

    classifier = Classifier.from_pretrained(folder, device="cpu", fold=False)
    classifier._network.backbone.get_classifier().register_forward_hook(is_nan)
    with TestClient(create_app(classifier), raise_server_exceptions=False) as client:
        answer = client.post("/", content=content.getvalue())
        assert client.get("/health").status_code == 200
    assert (answer.status_code, answer.json()) == (
        500,
        {"error": "For this image the network's output is NaN or infinite: use float32 or weights of an earlier step."},
    )
    handler, page = EndpointHandler(str(folder)), app.Model(folder)
    for network in (handler._pipeline.model.timm_model, page.network):
        network.get_classifier().register_forward_hook(is_nan)
    with pytest.raises(ValueError, match="output for image 0 is NaN or infinite"):
        handler({"inputs": content.getvalue()})
    with pytest.raises(ValueError, match="output for this image is NaN or infinite"):
        page.logits_and_features([picture(20, 20)])
    fault_record("The served model's output is NaN", "status 500 with a sentence; the server goes on", "1 answer")
