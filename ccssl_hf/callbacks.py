"""Callbacks of a run: logging of loss terms and pseudo labels, progress bars, averaged weights, a time limit."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback
from transformers.utils import is_in_notebook

from .algorithms import SSLLoss
from .distributed import all_reduce_mean
from .ema import WeightAverage

logger = logging.getLogger(__name__)


class StepMonitor:
    """Sums what each step reports, on the device, and reads the sums back once per log.

    Args:
        class_names: Names of the classes, for the histogram of pseudo labels.
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        self.class_names = list(class_names)
        self._reset()

    def _reset(self) -> None:
        self._steps = 0
        self._sums: dict[str, Tensor] = {}
        self._histogram: Tensor | None = None

    def _add(self, name: str, value: Tensor) -> None:
        value = value.detach().double() if value.device.type != "mps" else value.detach().float()
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def add(self, result: SSLLoss, hidden_labels: Tensor | None) -> None:
        """Count one step. An image passes the threshold where its mask is above 0."""
        self._steps += 1
        for name, term in result.terms.items():
            self._add(name, term)
        if result.mask is None or result.pseudo_labels is None:
            return
        passed = result.mask.detach() > 0
        self._add("mask_rate", result.mask.mean())
        self._add("_passed", passed.sum())
        if self._histogram is None:
            self._histogram = torch.zeros(len(self.class_names), device=passed.device)
        self._histogram.index_add_(0, result.pseudo_labels, passed.to(self._histogram.dtype))
        if hidden_labels is not None:
            self._add("_correct", (passed & (result.pseudo_labels == hidden_labels)).sum())

    def drain(self) -> dict[str, float]:
        """Return the means since the last call, over all processes, and start again from zero."""
        if not self._steps:
            return {}
        values = torch.stack([value.reshape(()) for value in self._sums.values()])
        if self._histogram is not None:
            values = torch.cat([values, self._histogram.to(values.dtype)])
        processes = 1
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(values)
            processes = dist.get_world_size()
        numbers = values.tolist()
        sums = dict(zip(self._sums, numbers, strict=False))
        passed, correct = sums.pop("_passed", 0.0), sums.pop("_correct", None)
        logs = {name: total / (self._steps * processes) for name, total in sums.items()}
        if correct is not None and passed:
            logs["pseudo_label_precision"] = correct / passed
        if self._histogram is not None:
            for name, count in zip(self.class_names, numbers[len(self._sums) :], strict=True):
                logs[f"pseudo_labels/{name}"] = count / max(passed, 1.0)
        self._reset()
        return logs


class ProgressBar(ProgressCallback):
    """A progress bar that shows loss, mask rate and top-1 accuracy, and does not print each log."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[str, str] = {}

    def on_prediction_step(self, *args: Any, eval_dataloader: Any = None, **kwargs: Any) -> None:
        if len(eval_dataloader) > 10:  # the bar of a shorter evaluation only flickers
            super().on_prediction_step(*args, eval_dataloader=eval_dataloader, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        for name in ("loss", "mask_rate", "eval_top1"):
            if name in logs:
                self._shown[name.removeprefix("eval_")] = f"{logs[name]:.3f}"
        self.training_bar.set_postfix(self._shown)


def progress_callback() -> TrainerCallback:
    """The progress bar of a run: in a notebook a bar with a table of metrics, elsewhere a `ProgressBar`."""
    if not is_in_notebook():
        return ProgressBar()
    from transformers.utils.notebook import NotebookProgressCallback  # imports IPython

    class NotebookProgress(NotebookProgressCallback):
        """The bar and table of transformers, with a column for the mask rate."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if args.eval_strategy == "no" and "loss" in logs:  # otherwise each evaluation adds a row
                row = {"Step": state.global_step, "Training Loss": logs["loss"], "Mask Rate": logs.get("mask_rate")}
                self.training_tracker.write_line({name: value for name, value in row.items() if value is not None})

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            shown = dict(metrics or {})  # a copy: transformers removes entries, and Trainer.evaluate returns `metrics`
            if self.training_tracker is not None:
                logged = [logs["mask_rate"] for logs in state.log_history if "mask_rate" in logs]
                shown = {**({"eval_mask_rate": logged[-1]} if logged else {}), **shown}
            elif self.prediction_bar is not None:
                self.prediction_bar.close()  # transformers leaves it above the table
            super().on_evaluate(args, state, control, metrics=shown, **kwargs)

    return NotebookProgress()


class UpdateAverage(TrainerCallback):
    """Updates the averaged weights after each optimizer step. It has no state, which a resumed run would lose."""

    def __init__(self, average: WeightAverage) -> None:
        self.average = average

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.average.update()


class TimeLimit(TrainerCallback):
    """Saves a checkpoint and ends training at the first logged step after a time limit.

    A resumed run equals an uninterrupted one. Only logged steps check the time: they wait for the device anyway.

    Args:
        minutes: Time limit in minutes of wall time, counted from the creation of this callback.

    Raises:
        ValueError: `minutes` is not positive.
    """

    def __init__(self, minutes: float) -> None:
        if minutes <= 0:
            raise ValueError(f"time_limit is {minutes}: give minutes above 0, or none for no limit.")
        self.minutes, self._end = minutes, time.monotonic() + 60 * minutes

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not control.should_log or state.global_step >= state.max_steps:
            return
        late = torch.tensor(float(time.monotonic() >= self._end), device=args.device)
        if all_reduce_mean(late).item() > 0:  # the clocks of processes differ, but all must stop at the same step
            control.should_save = control.should_training_stop = True
            logger.warning(
                "Stopped after %d of %d steps by time_limit (%g minutes): use resume_from_checkpoint to continue.",
                state.global_step,
                state.max_steps,
                self.minutes,
            )
