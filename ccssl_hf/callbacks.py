"""What a run says while it runs: named terms, masks and pseudo labels to the log, a bar to the terminal."""

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

from .algorithms import SSLLoss
from .distributed import all_reduce_mean
from .ema import WeightAverage

logger = logging.getLogger(__name__)


class StepMonitor:
    """Sums what each step reports, on the device; reads it back only when it is logged, once.

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
        """Count one step. An image counts as passed where its mask is above 0."""
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
        """Means since the last call, over all processes, and start anew."""
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
            counts = numbers[len(self._sums) :]
            logs |= {
                f"pseudo_labels/{name}": count / max(passed, 1.0)
                for name, count in zip(self.class_names, counts, strict=True)
            }
        self._reset()
        return logs


_FEW_BATCHES = 10


class ProgressBar(ProgressCallback):
    """The Trainer's bar, with the few numbers that matter beside it instead of a printed dictionary for each log."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[str, str] = {}

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if len(eval_dataloader) > _FEW_BATCHES:  # a bar that is over at once only flickers
            super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        for name in ("loss", "mask_rate", "eval_top1"):
            if name in logs:
                self._shown[name.removeprefix("eval_")] = f"{logs[name]:.3f}"
        self.training_bar.set_postfix(self._shown)


class UpdateAverage(TrainerCallback):
    """Moves the averaged weights after each optimizer step. Holds no state of its own: it would be lost on resume."""

    def __init__(self, average: WeightAverage) -> None:
        self.average = average

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.average.update()


class TimeLimit(TrainerCallback):
    """Ends training with a checkpoint, from which it can go on, at the first log after `minutes` of wall time.

    Which images a step sees and which learning rate it has still follow from its number alone: a run that is cut short
    is the beginning of the whole one. Looked at on steps that are logged, as these wait for the device anyway.

    Args:
        minutes: Counted from here on.
    """

    def __init__(self, minutes: float) -> None:
        if minutes <= 0:
            raise ValueError(f"time_limit is {minutes}: give minutes above 0, or none for no limit.")
        self.minutes, self._end = minutes, time.monotonic() + 60 * minutes

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not control.should_log or state.global_step >= state.max_steps:
            return
        late = torch.tensor(float(time.monotonic() >= self._end), device=args.device)
        if all_reduce_mean(late).item() > 0:  # processes have clocks of their own, and must stop at one step
            control.should_save = control.should_training_stop = True
            logger.warning(
                "Stopped after %d of %d steps by time_limit (%g minutes): resume_from_checkpoint goes on from here.",
                state.global_step,
                state.max_steps,
                self.minutes,
            )
