"""The averaged weights (EMA), which are evaluated and published by default."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from .distributed import average_batchnorm_buffers


class WeightAverage:
    """Exponential moving average of a model's parameters. BatchNorm buffers are copied from the model, as in FixMatch.

    It gives the same bits as timm's `ModelEmaV3`, which iterates over all modules of both models in every step. Here
    the parameters are listed once, and buffers are copied only when the average is read. `decay` in [0, 1) is the share
    of the average that each step keeps. Weights in half precision raise a `ValueError`.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if any(weight.is_floating_point() and weight.itemsize < 4 for weight in model.parameters()):
            raise ValueError(
                "The weights are in half precision, which is too coarse for averaging: keep them in float32, and set "
                "bf16=True to compute in half precision."
            )
        self.decay = decay
        self._model, self._average = model, copy.deepcopy(model).eval().requires_grad_(False)
        self._averages: list[Tensor] = list(self._average.parameters())
        self._weights: list[Tensor] = list(model.parameters())

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the model's current weights."""
        torch._foreach_lerp_(self._averages, self._weights, 1 - self.decay)

    @property
    def module(self) -> nn.Module:
        """A copy of the model with the averaged weights and current buffers, in eval mode, without gradients."""
        for average, own in zip(self._average.buffers(), self._model.buffers(), strict=True):
            average.copy_(own)
        return self._average


class UpdateAverage(TrainerCallback):
    """Updates the averaged weights after each optimizer step. It has no state, which a resumed run would lose."""

    def __init__(self, average: WeightAverage) -> None:
        self.average = average

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.average.update()


@contextlib.contextmanager
def published_weights(model: PreTrainedModel, average: WeightAverage | None) -> Iterator[None]:
    """Context in which `model` holds the weights to evaluate and save: `average` if given, or its own.

    BatchNorm statistics are averaged over processes. Every process must enter the block. Afterwards the model has its
    own weights and statistics, bit for bit.
    """
    own, dtype = {name: tensor.clone() for name, tensor in model.state_dict().items()}, model.dtype
    try:
        if average is not None:
            model.load_state_dict(average.module.state_dict())
        average_batchnorm_buffers(model)
        yield
    finally:
        model.to(dtype)  # fp16_full_eval and bf16_full_eval cast it
        model.load_state_dict(own)
