"""The averaged copy of the weights, which is what gets evaluated and published."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .distributed import average_batchnorm_buffers


class WeightAverage:
    """Exponential moving average of a model's parameters; BatchNorm buffers are the model's own, as in FixMatch.

    timm's `ModelEmaV3` gives the same bits, but walks through all modules of both models in every step, which takes
    longer than the arithmetic: here that is done once, and buffers are copied when the average is read.

    Args:
        model: What is averaged, on the device where it is trained.
        decay: Share of the average that stays in each step, in [0, 1).

    Raises:
        ValueError: Weights are in half precision, in which the average would stand still.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if any(weight.is_floating_point() and weight.itemsize < 4 for weight in model.parameters()):
            raise ValueError(
                "The weights are in half precision, which is too coarse for their average: keep them in float32, and "
                "set bf16=True to compute in half precision."
            )
        self.decay = decay
        self._model, self._average = model, copy.deepcopy(model).eval().requires_grad_(False)
        self._averages: list[Tensor] = list(self._average.parameters())
        self._weights: list[Tensor] = list(model.parameters())

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the model's present weights."""
        torch._foreach_lerp_(self._averages, self._weights, 1 - self.decay)

    @property
    def module(self) -> nn.Module:
        """The average, with the model's present buffers: a copy of the model in eval mode, without gradients."""
        for average, own in zip(self._average.buffers(), self._model.buffers(), strict=True):
            average.copy_(own)
        return self._average


@contextlib.contextmanager
def published_weights(model: PreTrainedModel, average: WeightAverage | None) -> Iterator[None]:
    """What is evaluated and saved: `model` holds it inside the block, and its own weights, bit for bit, after it.

    That is the averaged weights, where there are any, with BatchNorm statistics of all processes together. Every
    process enters the block. Training goes on as if nothing had happened, however often a run is evaluated.
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
