"""The log of a step: loss terms and pseudo labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..algorithms import SSLLoss
from ..distributed import all_reduce_mean

MOST_CLASSES = 50
"""Up to so many classes have a share of their own in the log, which a checkpoint holds as a whole."""


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
            if len(shares) <= MOST_CLASSES:
                logs |= {f"pseudo_labels/{name}": share for name, share in zip(self.class_names, shares, strict=True)}
            else:
                logs["pseudo_labels_classes"] = sum(count > 0 for count in by_class)
                logs["pseudo_labels_largest_share"] = max(shares)
        self._logged_steps, self._logged_loss = self._logged_steps + round(steps), self._logged_loss + sums["loss"][0]
        self._steps, self._sums = 0, {}
        return logs

    def mean_loss(self) -> float:
        """The mean loss of all steps since the run began, over all processes. Every process must call it."""
        self.drain()
        return self._logged_loss / max(1, self._logged_steps)
