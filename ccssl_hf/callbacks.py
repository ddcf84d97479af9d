"""Callbacks of a run: logging of loss terms and pseudo labels, progress bars, averaged weights, a time limit."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ProgressCallback
from transformers.utils import is_in_notebook

from .algorithms import SSLLoss
from .distributed import all_gather_json, all_reduce_mean
from .ema import WeightAverage
from .images import REPAIR, encoded_images, listed, name_of_image

logger = logging.getLogger(__name__)


class StepMonitor:
    """Sums what each step reports, on the device, and reads the sums back once per log."""

    def __init__(self, class_names: Sequence[str]) -> None:
        self.class_names = list(class_names)
        self._steps = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, result: SSLLoss, hidden_labels: Tensor | None) -> None:
        """Count one step. An image passes the threshold where its mask is above 0."""
        self._steps += 1
        values = dict(result.terms)
        if result.mask is not None and result.pseudo_labels is not None:
            passed = result.mask.detach() > 0
            by_class = torch.zeros(len(self.class_names), device=passed.device)
            values["mask_rate"] = result.mask.mean()
            values["_passed"] = by_class.index_add_(0, result.pseudo_labels, passed.to(by_class.dtype))
            if hidden_labels is not None:
                values["_correct"] = (passed & (result.pseudo_labels == hidden_labels)).sum()
        for name, value in values.items():
            value = value.detach().to(torch.float32 if value.device.type == "mps" else torch.float64)
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def drain(self) -> dict[str, float]:
        """Return the means since the last call, over all processes, and start again from zero."""
        if not self._steps:
            return {}
        flat = [value.reshape(-1) for value in self._sums.values()]
        parts = all_reduce_mean(torch.cat(flat)).cpu().split([len(value) for value in flat])
        sums = {name: part.tolist() for name, part in zip(self._sums, parts, strict=True)}
        by_class, correct = sums.pop("_passed", None), sums.pop("_correct", None)
        logs = {name: total / self._steps for name, [total] in sums.items()}
        if by_class is not None:
            passed = sum(by_class)
            if correct is not None and passed:
                logs["pseudo_label_precision"] = correct[0] / passed
            shares = [count / (passed or 1.0) for count in by_class]
            logs |= {f"pseudo_labels/{name}": share for name, share in zip(self.class_names, shares, strict=True)}
        self._steps, self._sums = 0, {}
        return logs


class UnreadableImages:
    """The unlabeled images of a run that could not be read, which other images replaced.

    They lie in the Trainer's log history, with which a resumed run goes on. Each process may find others.
    """

    LIMIT = 0.05
    """The share of the unlabeled images above which a run stops."""

    _ENTRY = "unreadable_images"

    def __init__(self, dataset: datasets.Dataset | None, image_column: str) -> None:
        self._images: Any = [] if dataset is None else encoded_images(dataset, image_column)
        self._column = image_column
        self._new: dict[int, str] = {}

    def add(self, found: Iterable[tuple[int, str]]) -> None:
        """Keep rows and reasons for the next report."""
        self._new.update(found)

    def known(self, state: TrainerState) -> dict[int, tuple[str, str]]:
        """All images of the reports: name without folders, and reason, by row."""
        entries = (entry.get(self._ENTRY, ()) for entry in state.log_history)
        return {row: (name, reason) for entry in entries for row, name, reason in entry}

    def report(self, state: TrainerState, device: torch.device, *, total: bool = False) -> None:
        """Log the images that are new, or in total. Call it in every process."""
        known = self.known(state)
        merged = {row: why for part in all_gather_json([*self._new.items()], device) for row, why in part}
        found = [self._named(row, merged[row]) for row in sorted(merged.keys() - known.keys())]
        self._new = {}
        if found:
            public = []  # the history may be published
            for row, path, why in found:
                name = Path(path).name
                public.append([row, name if path == f"row {row}" else f"{name} (row {row})", why.replace(path, name)])
            entry: dict[str, Any] = {self._ENTRY: public, "step": state.global_step}
            state.log_history.append(entry)
            if state.is_world_process_zero:
                logger.warning("Unreadable unlabeled images, replaced by others (%d new):%s", len(found), listed(found))
        if total and state.is_world_process_zero and (number := len(self.known(state))):
            logger.warning("%d of %d unlabeled images were unreadable and replaced.", number, len(self._images))

    def check(self, found: Mapping[int, str]) -> None:
        """Raise a ValueError if these unreadable images, reasons by row, are too many."""
        if len(found) > self.LIMIT * len(self._images):
            raise ValueError(
                f"{len(found):,} of {len(self._images):,} unlabeled images can't be decoded, more than "
                f"{self.LIMIT:.0%}: {REPAIR}{listed([self._named(*each) for each in sorted(found.items())])}"
            )

    def _named(self, row: int, reason: str) -> tuple[int, str, str]:
        return row, name_of_image(self._images[row][self._column], row), reason


class ProgressBar(ProgressCallback):
    """A progress bar that shows loss, mask rate and top-1 accuracy, and does not print each log."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[str, str] = {}

    def on_prediction_step(self, *args: Any, eval_dataloader: Any = None, **kwargs: Any) -> None:
        if len(eval_dataloader) > 10:  # the bar of a shorter evaluation only flickers
            super().on_prediction_step(*args, eval_dataloader=eval_dataloader, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs:  # the main process alone has a bar
            names = [name for name in ("loss", "mask_rate", "eval_top1") if name in logs]
            self._shown |= {name.removeprefix("eval_"): f"{logs[name]:.3f}" for name in names}
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
                rate = {"Mask Rate": logs["mask_rate"]} if "mask_rate" in logs else {}
                self.training_tracker.write_line({"Step": state.global_step, "Training Loss": logs["loss"], **rate})

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            rates = [logs["mask_rate"] for logs in state.log_history if "mask_rate" in logs]
            rate = {"eval_mask_rate": rates[-1]} if rates and self.training_tracker is not None else {}
            if self.training_tracker is None and self.prediction_bar is not None:
                self.prediction_bar.close()  # transformers leaves it above the table
            # A new dictionary: transformers removes entries, and Trainer.evaluate returns `metrics`.
            super().on_evaluate(args, state, control, metrics={**rate, **(metrics or {})}, **kwargs)

    return NotebookProgress()


class UpdateAverage(TrainerCallback):
    """Updates the averaged weights after each optimizer step. It has no state, which a resumed run would lose."""

    def __init__(self, average: WeightAverage) -> None:
        self.average = average

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.average.update()


class TimeLimit(TrainerCallback):
    """Saves a checkpoint and ends training at the first logged step after `minutes` of wall time from its creation.

    A resumed run equals an uninterrupted one. Only logged steps check the time: they wait for the device anyway.
    Raises a ValueError if `minutes` is not positive.
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
            warning = "Stopped after %d of %d steps by time_limit (%g minutes): use resume_from_checkpoint to continue."
            logger.warning(warning, state.global_step, state.max_steps, self.minutes)
