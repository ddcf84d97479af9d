"""What a run logs and shows."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.trainer_callback import ProgressCallback

from ccssl_hf import callbacks
from ccssl_hf.algorithms import SSLLoss
from ccssl_hf.callbacks import StepMonitor
from tiny_runs import trainer_of

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
    monkeypatch.setattr("ccssl_hf.callbacks.is_in_notebook", lambda: True)
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
