"""What a run logs and shows."""

from __future__ import annotations

import re
import sys
import time
from functools import partial
from itertools import count
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.trainer_callback import ProgressCallback

from ccssl_hf import callbacks
from ccssl_hf.algorithms import SSLLoss
from ccssl_hf.callbacks import StepMonitor, estimate
from ccssl_hf.record import duration
from tiny_runs import StopAt, copy_of, different, model_of, trainer_of

NAMES = ["ant", "bee", "cat"]


def step(loss_x: float, pseudo_labels: list[int], mask: list[float]) -> SSLLoss:
    terms = {"loss_x": torch.tensor(loss_x), "loss_u": torch.tensor(2 * loss_x)}
    return SSLLoss(
        loss=torch.tensor(3 * loss_x),
        terms=terms,
        pseudo_labels=torch.tensor(pseudo_labels),
        mask=torch.tensor(mask, dtype=torch.float32),
    )


def test_terms_and_mask_are_means_and_the_histogram_counts_what_passed():
    monitor = StepMonitor(NAMES)
    monitor.add(step(1.0, [0, 0, 1, 2], [1, 1, 0, 0]), None)
    monitor.add(step(2.0, [2, 1, 1, 0], [1, 1, 0, 0]), None)
    logs = monitor.drain()
    assert logs == pytest.approx(
        {
            "loss": 4.5,
            "loss_x": 1.5,
            "loss_u": 3.0,
            "mask_rate": 0.5,
            "pseudo_labels/ant": 0.5,
            "pseudo_labels/bee": 0.25,
            "pseudo_labels/cat": 0.25,
        }
    )


@pytest.mark.parametrize("classes", [50, 51])
def test_more_than_50_classes_are_summed_up_in_two_numbers(classes: int) -> None:
    monitor = StepMonitor([f"class {number}" for number in range(classes)])
    monitor.add(step(1.0, [0, 0, 0, 49], [1, 1, 1, 1]), None)
    shares = {name: share for name, share in monitor.drain().items() if name.startswith("pseudo_labels")}
    if classes == 50:
        assert len(shares) == 50 and (shares["pseudo_labels/class 0"], shares["pseudo_labels/class 49"]) == (0.75, 0.25)
    else:
        assert shares == {"pseudo_labels_classes": 2, "pseudo_labels_largest_share": 0.75}
    monitor.add(step(1.0, [0], [0]), None)
    assert sum(share for name, share in monitor.drain().items() if name.startswith("pseudo_labels")) == 0


def test_draining_starts_anew():
    monitor = StepMonitor(NAMES)
    monitor.add(step(1.0, [0], [1]), None)
    monitor.drain()
    assert monitor.drain() == {}
    monitor.add(step(5.0, [2], [1]), None)
    logs = monitor.drain()
    assert (logs["loss_x"], logs["pseudo_labels/ant"], logs["pseudo_labels/cat"]) == (5.0, 0.0, 1.0)


def test_precision_counts_all_images_that_passed_and_ood_images_are_wrong():
    monitor = StepMonitor(NAMES)
    monitor.add(step(1.0, [0, 1, 2, 2], [1, 1, 1, 0]), torch.tensor([0, 2, -1, 2]))
    monitor.add(step(1.0, [0, 0, 0, 1], [0, 0, 0, 1]), torch.tensor([0, 0, 0, 1]))
    assert monitor.drain()["pseudo_label_precision"] == pytest.approx(2 / 4)


def test_nothing_passed_gives_zeros_and_no_precision():
    monitor = StepMonitor(NAMES)
    monitor.add(step(1.0, [0, 1], [0, 0]), torch.tensor([0, 1]))
    logs = monitor.drain()
    assert "pseudo_label_precision" not in logs
    assert [logs[f"pseudo_labels/{name}"] for name in NAMES] == [0, 0, 0]
    assert logs["mask_rate"] == 0


def test_weights_between_0_and_1_count_as_passed_and_average_as_they_are():
    monitor = StepMonitor(NAMES)
    monitor.add(step(1.0, [0, 1], [0.25, 0.75]), None)
    logs = monitor.drain()
    assert logs["mask_rate"] == 0.5
    assert logs["pseudo_labels/ant"] == logs["pseudo_labels/bee"] == 0.5


def test_terms_alone_where_there_are_no_pseudo_labels():
    monitor = StepMonitor(NAMES)
    monitor.add(SSLLoss(loss=torch.tensor(1.0), terms={"loss_x": torch.tensor(1.0)}), None)
    assert monitor.drain() == {"loss": 1.0, "loss_x": 1.0}


def test_a_nan_term_is_logged_as_nan():
    monitor = StepMonitor(NAMES)
    monitor.add(step(float("nan"), [0], [1]), None)
    monitor.add(step(1.0, [0], [1]), None)
    assert torch.tensor(monitor.drain()["loss_x"]).isnan()


def test_counting_keeps_no_graph():
    monitor = StepMonitor(NAMES)
    weight = torch.ones((), requires_grad=True)
    result = step(1.0, [0], [1])
    monitor.add(SSLLoss(result.loss, {"loss_x": 2 * weight}, result.pseudo_labels, None, result.mask * weight), None)
    assert all(isinstance(value, Tensor) and not value.requires_grad for value in monitor._sums.values())


class Display:
    """The part of `IPython.display` that transformers uses; `shown` has the HTML of each output of a cell."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    def display(self, html: str, display_id: bool = False) -> Any:
        self.shown.append(html)
        number, shown = len(self.shown) - 1, self.shown

        class Handle:
            def update(self, html: str) -> None:
                shown[number] = html

        return Handle()


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> Display:
    """Runs the test as in a notebook."""
    display, module = Display(), ModuleType("IPython.display")
    module.display, module.HTML = display.display, str  # type: ignore[attr-defined]
    package = ModuleType("IPython")
    package.display = module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.delitem(sys.modules, "transformers.utils.notebook", raising=False)
    from transformers.utils.notebook import NotebookProgressCallback

    monkeypatch.setattr("transformers.trainer.DEFAULT_PROGRESS_CALLBACK", NotebookProgressCallback)
    monkeypatch.setattr("ccssl_hf.trainer.DEFAULT_PROGRESS_CALLBACK", NotebookProgressCallback)
    monkeypatch.setattr("ccssl_hf.callbacks.progress.is_in_notebook", lambda: True)
    return display


def columns(html: str) -> list[str]:
    return re.findall(r"<th>(.*?)</th>", html)


def test_a_notebook_shows_one_bar_and_a_table_with_the_mask_rate(notebook: Display, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, disable_tqdm=False, eval_strategy="steps", eval_steps=2, max_steps=4)
    trainer.train()
    [shown] = notebook.shown
    assert shown.count("<progress ") == 1 and shown.count("<tr>") == 2
    training = ["Step", "Training Loss", "Validation Loss", "Mask Rate"]
    assert columns(shown) == [*training, "Top1", "Top5", "Macro F1", "Ece"]

    metrics = trainer.evaluate()  # after training: a table and no bar
    assert "eval_runtime" in metrics  # transformers would remove it
    _, bar, table = notebook.shown
    assert bar == "" and columns(table) == [
        "Training Loss",
        "Validation Loss",
        "Step",
        "Top1",
        "Top5",
        "Macro F1",
        "Ece",
    ]


def test_a_notebook_shows_each_log_of_a_run_without_evaluation(notebook: Display, tmp_path: Path) -> None:
    trainer_of(tmp_path, disable_tqdm=False, max_steps=3, validation=None).train()
    [shown] = notebook.shown
    assert columns(shown) == ["Step", "Training Loss", "Mask Rate"] and len(re.findall("<td>", shown)) == 9


def test_a_terminal_shows_one_bar_and_a_log_file_none(tmp_path: Path) -> None:
    for off, expected in ((False, [callbacks.ProgressBar]), (True, [])):
        trainer = trainer_of(tmp_path, disable_tqdm=off)
        bars = [each for each in trainer.callback_handler.callbacks if isinstance(each, ProgressCallback)]
        assert [type(bar) for bar in bars] == expected


# ------------------------------------------------------------------------------------------------------ time and memory


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "ccssl_hf.callbacks.estimate"]


def test_a_run_on_a_cpu_says_what_it_will_cost_and_a_long_one_how_to_shorten_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "_cost_of_view", lambda model, size: (1.0, 1e9))
    monkeypatch.setattr(estimate.psutil, "virtual_memory", lambda: SimpleNamespace(total=64e9))
    monkeypatch.setattr(estimate, "_memory_used", lambda device: 1e9)
    trainer_of(tmp_path, callbacks=[StopAt(1)], save_strategy="steps").train()
    views = 4 + 3 * 2 * 4  # labeled images, and three views of unlabeled ones
    [text] = said(caplog)
    facts = f"Each step: {views} views of 16 x 16 px on cpu, through wide_resnet10_1_cifar with 0.1 million parameters."
    assert text == f"{facts} Steps to train: 6. About {views} s a step, 2 min 48 s in all, and 29.0 GB."
    caplog.clear()
    resumed = trainer_of(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert said(caplog)[0] == f"{facts} Steps to train: 5. About {views} s a step, 2 min 20 s in all, and 29.0 GB."

    monkeypatch.setattr(estimate.psutil, "virtual_memory", lambda: SimpleNamespace(total=16e9))
    for changes, seconds in ({"max_steps": 20000}, 28), ({"weak_forward": "separate"}, 28 - 8 * 2 / 3):
        caplog.clear()
        trainer = trainer_of(tmp_path / f"{seconds:.0f}", callbacks=[StopAt(1)], **changes)
        trainer.train()
        facts, advice = said(caplog)[0].splitlines()
        assert f" About {seconds:.0f} s a step, " in facts
        assert advice.startswith(
            "This is too much for most CPUs. This machine has 16.0 GB. Use an accelerator, a smaller"
        )
        for name in (
            "image_size",
            "resnet18",
            "mu (now 2)",
            "batch_size (now 4)",
            "max_steps",
            "weak_forward='separate'",
        ):
            assert name in advice
    for seconds, text in ((28 * 20000, "6 days"), (3661, "1 h 1 min")):
        assert duration(seconds) == text


def test_a_run_of_less_than_a_minute_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer_of(tmp_path, max_steps=8).train()
    assert said(caplog) == []


def test_the_forecast_changes_nothing(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "with", model_of("wide_resnet10_1_cifar"))
    trainer.model.backbone.bn1.eval()  # as frozen BatchNorm
    modes = [module.training for module in trainer.model.modules()]
    before, random = copy_of(trainer.model), torch.get_rng_state()
    seconds, held = estimate._cost_of_view(trainer.model, (3, 16, 16))
    assert seconds > 0 and held > 4 * 16 * 16 * 16  # at least the first layer's output
    assert held == estimate._cost_of_view(trainer.model, (3, 16, 16))[1]
    assert different(before, copy_of(trainer.model)) == [] and torch.equal(random, torch.get_rng_state())
    assert [module.training for module in trainer.model.modules()] == modes
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_after_the_first_steps_it_says_what_steps_take_without_evaluations(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(perf_counter=partial(next, count(10.0, 10.0)), monotonic=time.monotonic)
    monkeypatch.setattr(estimate, "_cost_of_view", lambda model, size: (0.0, 0.0))
    monkeypatch.setattr(estimate, "time", clock)
    # Read at the end of the first and the sixth step, and before and after each evaluation between them: 50 s less 20.
    trainer_of(tmp_path, max_steps=20, eval_strategy="steps", eval_steps=2).train()
    [text] = said(caplog)
    assert re.fullmatch(
        r"A step takes 6 s: 1 min 24 s for the 14 steps that are left, without evaluations\. Memory so far: .* GB\.",
        text,
    )
