"""Ends of a run before its last step, with a checkpoint: time limit, Ctrl-C and SIGTERM."""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback

from ..distributed import all_reduce_mean, launcher, rank, world_size

logger = logging.getLogger(__name__)


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


@atexit.register
def _end_workers() -> None:
    """Python waits for worker processes at its exit, for ever if an error keeps a DataLoader: they ignore SIGTERM."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
