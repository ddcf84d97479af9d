"""Callbacks of a run: loss terms, progress bars, averaged weights, unreadable images, stopping early, estimates."""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ProgressCallback
from transformers.utils import is_in_notebook

from .algorithms import SSLLoss
from .distributed import all_gather_json, all_reduce_mean, launcher, rank, world_size
from .ema import WeightAverage
from .errors import summary
from .images import REPAIR, encoded_images, image_lines, name_of_image
from .record import duration

logger = logging.getLogger(__name__)


class StepMonitor:
    """Sums what each step reports, on the device, and reads the sums back once per log.

    Its sums are part of a checkpoint, so that a resumed run logs what an uninterrupted one would. With `skips`, steps
    with a loss that is not finite do not count.
    """

    def __init__(self, class_names: Sequence[str], *, skips: bool = False) -> None:
        self.class_names, self._skips = list(class_names), skips
        self._steps, self._logged_steps, self._logged_loss = 0, 0, 0.0
        self._sums: dict[str, Tensor] = {}

    def state(self) -> dict[str, Tensor]:
        """The sums of this process, each `[n]`."""
        counts = torch.tensor([self._steps, self._logged_steps, self._logged_loss], dtype=torch.float64)
        return {"_counts": counts, **self._sums}

    def load(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Continues with the result of `state`."""
        sums = dict(state)
        steps, logged_steps, self._logged_loss = sums.pop("_counts").tolist()
        self._steps, self._logged_steps = round(steps), round(logged_steps)
        self._sums = {name: value.to(device) for name, value in sums.items()}

    def add(self, result: SSLLoss, hidden_labels: Tensor | None) -> None:
        """Count one step. An image passes the threshold where its mask is above 0."""
        self._steps += 1
        values = {"loss": result.loss, **result.terms}
        if result.mask is not None and result.pseudo_labels is not None:
            passed = result.mask.detach() > 0
            by_class = torch.zeros(len(self.class_names), device=passed.device)
            values["mask_rate"] = result.mask.mean()
            values["_passed"] = by_class.index_add_(0, result.pseudo_labels, passed.to(by_class.dtype))
            if hidden_labels is not None:
                values["_correct"] = (passed & (result.pseudo_labels == hidden_labels)).sum()
        if self._skips:
            finite = result.loss.detach().isfinite()
            values = {name: torch.where(finite, value.detach(), 0) for name, value in values.items()}
            values["_finite"] = finite
        for name, value in values.items():
            value = value.detach().reshape(-1).to(torch.float32 if value.device.type == "mps" else torch.float64)
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def drain(self) -> dict[str, float]:
        """Return the means since the last call, over all processes, and start again from zero."""
        if not self._steps:
            return {}
        flat = list(self._sums.values())
        parts = all_reduce_mean(torch.cat(flat)).cpu().split([len(value) for value in flat])
        sums = {name: part.tolist() for name, part in zip(self._sums, parts, strict=True)}
        by_class, correct = sums.pop("_passed", None), sums.pop("_correct", None)
        [steps] = sums.pop("_finite", [float(self._steps)])
        logs = {name: total / (steps or math.nan) for name, [total] in sums.items()}
        if by_class is not None:
            passed = sum(by_class)
            if correct is not None and passed:
                logs["pseudo_label_precision"] = correct[0] / passed
            shares = [count / (passed or 1.0) for count in by_class]
            logs |= {f"pseudo_labels/{name}": share for name, share in zip(self.class_names, shares, strict=True)}
        self._logged_steps, self._logged_loss = self._logged_steps + round(steps), self._logged_loss + sums["loss"][0]
        self._steps, self._sums = 0, {}
        return logs

    def mean_loss(self) -> float:
        """The mean loss of all steps since the run began, over all processes. Every process must call it."""
        self.drain()
        return self._logged_loss / max(1, self._logged_steps)


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
                logger.warning(
                    "Unreadable unlabeled images, replaced by others (%d new):%s", len(found), image_lines(found)
                )
        if total and state.is_world_process_zero and (number := len(self.known(state))):
            logger.warning("%d of %d unlabeled images were unreadable and replaced.", number, len(self._images))

    def check(self, found: Mapping[int, str]) -> None:
        """Raise a ValueError if these unreadable images, reasons by row, are too many."""
        if len(found) > self.LIMIT * len(self._images):
            raise ValueError(
                f"{len(found):,} of {len(self._images):,} unlabeled images can't be decoded, more than "
                f"{self.LIMIT:.0%}: {REPAIR}{image_lines([self._named(*each) for each in sorted(found.items())])}"
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


class EvaluationStopped(Exception):
    """Ends an evaluation within training that a signal interrupts."""


class StopOnSignal(TrainerCallback):
    """On Ctrl-C or SIGTERM, ends training after the step with a checkpoint. A second Ctrl-C aborts.

    Before the first step, there is nothing to save and the signal ends the run at once. An evaluation within training
    ends early; the run that resumes repeats it. All processes stop after the same step: each hands its signals to the
    others on the CPU, and reads the answer one step later, without waiting for the accelerator. The end of a launcher
    counts as SIGTERM, because `accelerate launch` forwards no signal to a single process.
    """

    AGAIN = 1.0  # seconds after which a second signal is meant: launchers send one twice

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.command = "trainer.train(resume_from_checkpoint=True)"  # what continues the run
        self._reset()

    def _reset(self) -> None:
        self.number: int = 0  # of the signal; 0: none
        self.stopped = False  # whether all processes know of it
        self.evaluation_due = False  # whether the evaluation of this step was left out
        self.saved_step: int | None = None
        self._in_steps, self._first = False, 0.0
        self._group: Any = None
        self._asked: tuple[Any, Tensor] | None = None
        self._launcher = launcher()

    @contextmanager
    def listening(self, text: str = "Stopped before the first step: there is nothing to save.") -> Iterator[None]:
        """Handles signals within the block, in the main thread, and logs what they did. Ends with earlier handlers.

        `text` is what a signal says outside of training.
        """
        self._reset()
        self._text = text
        before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # as under nohup
                    before[number] = signal.signal(number, self._handle)
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            if self.number and rank() == 0:
                logger.warning("%s", self._text)
            raise
        finally:
            self._in_steps = False
            for each, handler in before.items():
                signal.signal(each, handler)
            if self._group is not None:
                dist.destroy_process_group(self._group)

    def _handle(self, number: int, frame: Any) -> None:
        if not self._in_steps:
            self.number = number
            raise self.error(self._text)
        if not self.number:
            self.number, self._first = number, time.monotonic()
            if rank() == 0:  # not print, which the signal may have interrupted
                hint = " Press Ctrl-C again to abort." if number == signal.SIGINT else ""
                os.write(2, f"\nStopping: a checkpoint is saved after this step.{hint}\n".encode())
        elif signal.SIGINT in (number, self.number) and time.monotonic() - self._first > self.AGAIN:
            if world_size() > 1:  # an exception would wait for the other processes
                os._exit(128 + number)
            raise self.error("Aborted: the last complete checkpoint, if there is one, is what continues the run.")

    def error(self, text: str) -> BaseException:
        """What ends the run: KeyboardInterrupt for Ctrl-C, which notebooks show, else SystemExit with its exit code."""
        self._text = text
        return KeyboardInterrupt(text) if self.number == signal.SIGINT else SystemExit(128 + self.number)

    def agree(self, *, wait: bool = False) -> bool:
        """Whether a process had a signal one call ago, or with `wait` now. All processes must call it, and agree."""
        if self._launcher and os.getppid() != self._launcher.pid:
            self.number = self.number or int(signal.SIGTERM)
        if world_size() == 1 or self._group is None:
            self.stopped = bool(self.number)
            return self.stopped
        for last in (False, True) if wait else (False,):
            if self._asked is not None:
                work, highest = self._asked
                work.wait()
                if number := int(highest.item()):  # else a signal that arrives here would be lost
                    self.stopped, self.number = True, number
            self._asked = None
            if not last:
                mine = torch.tensor([self.number])
                self._asked = dist.all_reduce(mine, dist.ReduceOp.MAX, self._group, async_op=True), mine
        return self.stopped

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._in_steps = True
        if world_size() > 1:
            self._group = dist.new_group(backend="gloo")
        if self.evaluation_due:
            self.evaluation_due = False
            metrics = self._trainer._evaluate(None, None)
            if self.evaluation_due:  # stopped again
                raise self.error(self._text)
            self._trainer._determine_best_metric(metrics, None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.agree():
            control.should_training_stop = True
            control.should_save = self.saved_step != state.global_step
            self.evaluation_due = self.evaluation_due or control.should_evaluate
            control.should_evaluate = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_step_end(args, state, control)  # of the last step, or of an evaluation that was stopped

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._in_steps and self.agree():
            self.evaluation_due, control.should_evaluate, control.should_training_stop = True, False, True
            raise EvaluationStopped

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved_step = state.global_step

    def end_training(self) -> None:
        """Ends the run if a process had a signal, after the checkpoint was saved. Every process must call it."""
        state, folder = self._trainer.state, self._trainer.args.output_dir
        if not self.agree(wait=True):
            return
        if self.saved_step != state.global_step:  # the signal came after the last step
            self._trainer._save_checkpoint(self._trainer.model, None)
        done, saved = f"{state.global_step} of {state.max_steps} steps", f"checkpoint-{state.global_step}"
        raise self.error(f"Stopped after {done}, saved in {Path(folder, saved)}. Continue with: {self.command}")


def ignore_signals(worker: int) -> None:
    """For worker processes of a DataLoader: only the training process ends them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class RunEstimate(TrainerCallback):
    """Says what a step computes before the first one, and what steps cost after the first ones. Silent below a minute.

    On a CPU it forecasts time and memory from a few images, and warns of a run that takes more than a day or more
    memory than the machine has. This changes no weights, statistics or random numbers. The device is synchronized twice
    in a run. `unlabeled_views` is the number of views of each unlabeled image.
    """

    MEASURED = 5  # steps after the first one, which is slower

    def __init__(self, unlabeled_views: int) -> None:
        self.unlabeled_views = unlabeled_views

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._marks: list[float] = []
        self._pause_from: float | None = None
        self._paused = 0.0
        self._active = state.is_world_process_zero
        self._first_step = state.global_step
        steps = state.max_steps - state.global_step
        if not self._active or steps <= 0:
            return
        channels, height, width = model.backbone.pretrained_cfg["input_size"]
        of_one = args.per_device_train_batch_size * args.gradient_accumulation_steps
        views = of_one * (1 + args.mu * self.unlabeled_views)
        # The weak view of a separate pass needs a third of the time of a view, and keeps no activations.
        no_gradient = of_one * args.mu if args.weak_forward == "separate" and self.unlabeled_views else 0
        parameters = sum(parameter.numel() for parameter in model.parameters())
        each = f" on each of {args.world_size} processes" if args.world_size > 1 else ""
        text = (
            f"Each step: {views:,} views of {width} x {height} px on {args.device.type}{each}, through "
            f"{model.config.architecture} with {parameters / 1e6:,.1f} million parameters. Steps to train: {steps:,}."
        )
        if args.device.type != "cpu":
            _say(text)
            return
        try:
            seconds_of_view, bytes_of_view = _cost_of_view(model, (channels, height, width))
        except Exception as error:  # an estimate must not end a run
            _say(f"{text} Their time cannot be estimated ({summary(error)}).")
            return
        seconds = seconds_of_view * (views - no_gradient * 2 / 3)
        held = (views - no_gradient) / args.gradient_accumulation_steps  # one pass at a time
        # Of each parameter: gradient, averaged weight, and up to two numbers of the optimizer.
        memory = (_peak_memory(args.device) or 0) + bytes_of_view * held + 16 * parameters
        if seconds * steps < 60:
            return
        text += f" About {_rounded(seconds)} s a step, {duration(seconds * steps)} in all, and {memory / 1e9:.1f} GB."
        available = _memory_of_machine()
        if seconds * steps > 86400 or memory > 0.9 * available:
            has = f"This machine has {available / 1e9:.1f} GB. " if memory > 0.9 * available else ""
            mu = f"a lower mu (now {args.mu}), " if self.unlabeled_views else ""
            text += (
                f"\nThis is too much for most CPUs. {has}Use an accelerator, a smaller image_size (half the side costs "
                f"a quarter), a smaller backbone such as resnet18, {mu}a lower per_device_train_batch_size (now "
                f"{args.per_device_train_batch_size}), fewer max_steps, or weak_forward='separate'. Each of them "
                "changes the results."
            )
        _say(text)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._pause_from is not None:  # an evaluation or a checkpoint came between
            self._paused += time.perf_counter() - self._pause_from
            self._pause_from = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = state.global_step - self._first_step
        if not self._active or done not in range(1, self.MEASURED + 2):
            return
        if done in (1, self.MEASURED + 1):
            if args.device.type != "cpu":
                torch.accelerator.synchronize()
            self._marks.append(time.perf_counter())
        if done == 1:
            self._paused = 0.0
        if control.should_evaluate or control.should_save:
            self._pause_from = time.perf_counter()
        if done == self.MEASURED + 1:
            seconds = (self._marks[1] - self._marks[0] - self._paused) / self.MEASURED
            left = state.max_steps - state.global_step
            if seconds * (state.max_steps - self._first_step) >= 60:
                peak = _peak_memory(args.device)
                memory = f" Memory so far: {peak / 1e9:.1f} GB." if peak else ""
                time_left = f"{duration(seconds * left)} for the {left:,} steps that are left, without evaluations."
                _say(f"A step takes {_rounded(seconds)} s: {time_left}{memory}")


def _cost_of_view(model: Any, size: tuple[int, ...], images: int = 8) -> tuple[float, float]:
    """Seconds of forward and backward pass, and bytes of activations, of one view on a CPU."""
    held: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    modes = {module: module.training for module in model.modules()}
    try:
        with torch.random.fork_rng(devices=[]):
            model.eval()  # keeps the statistics of BatchNorm
            pixels = torch.linspace(-1, 1, images * math.prod(size)).view(images, *size)
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                kept = model(pixel_values=pixels[:2].clone(), return_embeddings=True)
            del kept
            started = time.perf_counter()
            with torch.no_grad():
                model(pixel_values=pixels, return_embeddings=True)
            seconds = time.perf_counter() - started
    finally:
        for module, training in modes.items():
            module.training = training
    return 3 * seconds / images, sum(held.values()) / 2  # a backward pass takes twice as long as a forward pass


def _memory_of_machine() -> float:
    """Bytes of memory of this machine; infinite where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return math.inf


def _peak_memory(device: torch.device) -> int | None:
    """Most bytes that the accelerator has held, or this process on a CPU; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _rounded(seconds: float) -> str:
    return f"{seconds:.2g}" if seconds < 10 else f"{seconds:,.0f}"


def _say(text: str) -> None:
    """Log for the user, also where no logging is set up, without breaking a progress bar."""
    with logging_redirect_tqdm():
        logger.warning(text)
