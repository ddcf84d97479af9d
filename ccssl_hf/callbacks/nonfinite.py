"""The first loss or gradient that is NaN or infinite stops a run, or the update of its step is left out."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import TrainerCallback

from ..algorithms import SSLBatch, SSLLoss
from ..checkpoint import check_finite
from ..distributed import all_gather_json, all_reduce_mean, world_size
from ..errors import UserError, listed
from ..resume import last_checkpoint
from ..sampling import PairedBatchSampler

logger = logging.getLogger(__name__)

READ_AFTER = 2  # optimizer steps: processes must read a flag at the same step, so they do not ask whether it is there
MOST_IN_A_ROW = 20  # skipped steps, after which a run stops nevertheless


class NonFiniteError(UserError):
    """A loss or gradient is NaN or infinite."""


@dataclass
class _Batch:
    """What is kept of a forward pass until its step is known to be finite. All tensors are detached."""

    names: list[str]  # of the values
    values: Tensor  # loss, terms and pseudo labels' confidences, on the device
    draws: np.ndarray  # of the labeled images
    unlabeled: Any  # their rows
    labeled_outputs: list[Tensor]  # [B, ...]
    unlabeled_outputs: list[Tensor]  # [U, ...]


@dataclass
class _Step:
    number: int
    batches: list[_Batch]
    parameters: list[str]
    norms: Tensor  # of the gradient of each parameter
    flag: Tensor  # whether a number of the step is not finite, in memory that is read without waiting for the device
    event: Any = None  # set when the flag is there


class FiniteGuard(TrainerCallback):
    """Checks each step of a `CCSSLTrainer`, without waiting for the accelerator.

    A term that is not finite makes all gradients NaN, on all processes, which therefore agree. The flag of a step is
    read at once on a CPU, on an accelerator when the device has got there, and always before an evaluation, a save and
    the end. With `on_nonfinite="skip"`, an accelerator's fused optimizers leave out the update by themselves; for
    others, and in half precision with a gradient scaler, each step waits for the device.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer, self._skips = trainer, trainer.args.on_nonfinite == "skip"
        self._batches: list[_Batch] = []
        self._pending: deque[_Step] = deque()
        self._in_a_row = 0  # steps

    # ------------------------------------------------------------------------------------------------ during a step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._batches, self._in_a_row = [], 0
        self._pending.clear()
        model, algorithm = self._trainer.model, self._trainer.algorithm
        self._parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._buffers = [*model.buffers(), *algorithm.buffers()] if self._skips else []
        self._kept = [buffer.clone() for buffer in self._buffers]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for kept, buffer in zip(self._kept, self._buffers, strict=True):  # BatchNorm and the algorithm's statistics
            kept.copy_(buffer)

    def add(self, result: SSLLoss, batch: SSLBatch, inputs: Mapping[str, Any]) -> Tensor:
        """Keeps what an error needs to name, and returns the loss to differentiate: the same value and gradient."""
        values = {"loss": result.loss, **result.terms}
        if result.confidences is not None:  # those of weak views may be NaN where the loss is finite
            values["confidences of pseudo labels"] = result.confidences.sum()
        stacked = torch.stack([value.detach().float() for value in values.values()])
        outputs = (batch.logits_weak, batch.logits_strong, batch.embeddings_strong, batch.embeddings_contrast)
        labeled = F.cross_entropy(batch.logits_labeled.detach().float(), batch.labels, reduction="none")
        rows = inputs["labeled_draws"], inputs.get("unlabeled_index")
        kept = [batch.logits_labeled.detach(), labeled], [each.detach() for each in outputs if each is not None]
        self._batches.append(_Batch(list(values), stacked, *rows, *kept))
        return result.loss * (1 + 0 * stacked.sum())  # 1, or NaN, which reaches all processes with the gradient

    def after_backward(self, loss: Tensor) -> Tensor:
        """Starts to check a step, after its last backward pass. Returns the loss to log."""
        trainer = self._trainer
        if trainer.accelerator.sync_gradients:
            present = [(name, p.grad) for name, p in self._parameters if p.grad is not None]
            norms = torch.stack([norm.float() for norm in torch._foreach_norm([gradient for _, gradient in present])])
            number, self._batches, batches = trainer.state.global_step + 1, [], self._batches
            step = _Step(number, batches, [name for name, _ in present], norms, self._is_bad(norms, batches))
            if self._skips:
                self._leave_out(step)
            self._read_later(step)
        return torch.where(loss.isfinite(), loss, 0.0) if self._skips else loss

    def _is_bad(self, norms: Tensor, batches: list[_Batch]) -> Tensor:
        scaler = trainer_scaler(self._trainer)
        if scaler is None:
            return ~norms.isfinite().all()
        # Infinite gradients are normal with a scaler, which leaves out the update and halves the scale, down to 1 here.
        values = torch.cat([batch.values for batch in batches])
        bad = all_reduce_mean((~values.isfinite().all()).float()) > 0
        return bad | (scaler._scale < 1).squeeze() if scaler._scale is not None else bad

    def _leave_out(self, step: _Step) -> None:
        """Restores the buffers of a bad step and leaves out its update, on the device where the optimizer can."""
        optimizer = getattr(self._trainer.optimizer, "optimizer", self._trainer.optimizer)
        if self._leaves_out_itself(optimizer, step.flag):
            optimizer.found_inf = step.flag.float()
            for kept, buffer in zip(self._kept, self._buffers, strict=True):
                buffer.copy_(torch.where(step.flag, kept, buffer))
        elif bool(step.flag):
            for kept, buffer in zip(self._kept, self._buffers, strict=True):
                buffer.copy_(kept)
            if trainer_scaler(self._trainer) is None:  # a scaler leaves out the update, and needs the gradients
                self._trainer.model.zero_grad(set_to_none=True)

    def _leaves_out_itself(self, optimizer: Any, flag: Tensor) -> bool:
        fused = flag.is_cuda and optimizer.defaults.get("fused") and trainer_scaler(self._trainer) is None
        return bool(fused and optimizer.state)  # fused SGD creates its momentum in the first update, even in a bad one

    # -------------------------------------------------------------------------------------------- reading the flags

    def _read_later(self, step: _Step) -> None:
        if step.flag.is_cuda:
            on_device, step.flag = step.flag, torch.empty((), dtype=torch.bool, pin_memory=True)
            step.flag.copy_(on_device, non_blocking=True)
            step.event = torch.cuda.Event()
            step.event.record()
        self._pending.append(step)
        while self._pending and self._is_there(self._pending[0], step.number):
            self._read(self._pending.popleft())

    def _is_there(self, step: _Step, now: int) -> bool:
        if step.event is None and step.flag.device.type == "cpu":
            return True
        if step.event is not None and world_size() == 1:
            return bool(step.event.query())
        return now - step.number >= READ_AFTER

    def settle(self) -> None:
        """Reads the flags of all steps so far. Raises NonFiniteError if one of them stops the run."""
        while self._pending:
            self._read(self._pending.popleft())

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.settle()  # a run is one epoch

    def _read(self, step: _Step) -> None:
        if step.event is not None:
            step.event.synchronize()
        if not bool(step.flag):
            self._in_a_row = 0
            return
        self._in_a_row += 1
        what, rows = self._describe(step)
        found = f"Step {step.number}: {what} NaN or infinite ({rows})"
        if self._skips and self._in_a_row <= MOST_IN_A_ROW:
            self._trainer.state.log_history.append({"step": step.number, "skipped": what.rpartition(" ")[0]})
            logger.warning("%s. Its update is left out.", found)
            return
        self._pending.clear()
        folder = str(self._trainer.args.output_dir)
        last = last_checkpoint(folder) if Path(folder).is_dir() else None
        kept = f"the last checkpoint is {last}" if last else "there is no checkpoint yet"
        fix = f"lower learning_rate ({self._trainer.args.learning_rate:g}) or set max_grad_norm"
        fix += "" if self._skips else ", or on_nonfinite='skip' to leave out such steps"
        after = f", the {self._in_a_row}th step in a row" if self._skips else ""
        raise NonFiniteError(f"{found}{after}. The run stopped; {kept}: {fix}.")

    # ------------------------------------------------------------------------------------------------- what is wrong

    def _describe(self, step: _Step) -> tuple[str, str]:
        """What is not finite, and in which rows. Every process must call it."""
        own = [(self._terms(batch), *self._rows(batch)) for batch in step.batches]
        batches = list(chain.from_iterable(all_gather_json(own, self._trainer.args.device)))
        terms = list(dict.fromkeys(name for names, *_ in batches for name in names))
        bad = [batch for batch in batches if batch[0]] or batches
        what = f"{', '.join(terms)} {'is' if len(terms) == 1 else 'are'}"
        if not terms:
            broken = (~step.norms.isfinite()).tolist()
            names = [name for name, wrong in zip(step.parameters, broken, strict=True) if wrong]
            what = f"the gradient of {listed(names)} is" if names else "the scale of fp16 fell below 1; gradients are"
        rows = [f"labeled rows {listed(sorted({row for _, labeled, _ in bad for row in labeled}))}"]
        if unlabeled := sorted({row for _, _, rows in bad for row in rows}):
            rows.append(f"unlabeled rows {listed(unlabeled)}")
        return what, "; ".join(rows)

    def _terms(self, batch: _Batch) -> list[str]:
        wrong = (~batch.values.isfinite()).tolist()
        names = [name for name, bad in zip(batch.names, wrong, strict=True) if bad]
        return [name for name in names if name != "loss"] or names

    def _rows(self, batch: _Batch) -> tuple[list[int], list[int]]:
        """Rows of the labeled and unlabeled split: those with outputs that are not finite, or else all of the batch."""
        trainer, args = self._trainer, self._trainer.args
        number = len(trainer.train_dataset)
        sizes = {"num_labeled": number, "num_unlabeled": 0, "batch_size": 1, "mu": 1, "num_batches": 1}
        stream = PairedBatchSampler(**sizes, seed=args.seed).labeled
        labeled = stream.take(int(batch.draws[0]), len(batch.draws))[0].tolist()
        unlabeled = [] if batch.unlabeled is None else torch.as_tensor(batch.unlabeled).tolist()
        try:
            bad_labeled = _not_finite(labeled, batch.labeled_outputs)
            bad_unlabeled = _not_finite(unlabeled, batch.unlabeled_outputs)
        except RuntimeError:  # the outputs of a CUDA graph are gone
            return labeled, unlabeled
        return (bad_labeled, bad_unlabeled) if bad_labeled or bad_unlabeled else (labeled, unlabeled)

    # ------------------------------------------------------------------------------------------ saving and the end

    def check_state(self) -> None:
        """Raises NonFiniteError if anything that a checkpoint holds is not finite. Every process must call it."""
        self.settle()
        trainer = self._trainer
        state = {f"{k}.{n}": t for k, m in trainer._modules_with_state().items() for n, t in m.state_dict().items()}
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        for number, values in enumerate(optimizer.state.values() if optimizer is not None else ()):
            state |= {f"optimizer.{number}.{k}": v for k, v in values.items() if isinstance(v, Tensor)}
        problem = None
        try:
            check_finite(state, f"Step {trainer.state.global_step}: the training state")
        except ValueError as error:
            problem = str(error)
        for found in filter(None, all_gather_json(problem, trainer.args.device)):
            raise NonFiniteError(f"{found} Nothing was saved.")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if skipped := self._skipped():
            steps = [f"{entry['step']} ({entry['skipped']})" for entry in state.log_history if "skipped" in entry]
            logger.warning("%d of %d steps were skipped: %s.", skipped, state.global_step, listed(steps))
        if args.load_best_model_at_end and state.best_model_checkpoint is None:
            message = "No evaluation gave a finite %r: the weights are those of the last step."
            logger.warning(message, args.metric_for_best_model)

    def note_skipped(self, logs: dict[str, float]) -> None:
        """Adds the number of skipped steps, also of those before a resume."""
        if skipped := self._skipped():
            logs["skipped_steps"] = skipped

    def _skipped(self) -> int:
        return sum("skipped" in entry for entry in self._trainer.state.log_history)


def trainer_scaler(trainer: Any) -> Any:
    """The gradient scaler of fp16; None in other precisions."""
    return getattr(trainer.accelerator, "scaler", None)


def _not_finite(rows: list[int], outputs: list[Tensor]) -> list[int]:
    """Those of `rows` for which one of the tensors `[N, ...]` has a number that is not finite."""
    bad = [(~output.isfinite()).reshape(len(rows), -1).any(1) for output in outputs]
    return [row for row, wrong in zip(rows, torch.stack(bad).any(0).tolist(), strict=True) if wrong] if bad else []
