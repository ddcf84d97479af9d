"""The averaged copy of the weights, which is what gets evaluated and published."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from timm.utils import ModelEmaV3
from torch import nn
from transformers import PreTrainedModel

from .distributed import average_batchnorm_buffers


def make_ema(model: nn.Module, decay: float) -> ModelEmaV3:
    """timm's exponential moving average of parameters; BatchNorm buffers are copied, not averaged, as in FixMatch."""
    ema = ModelEmaV3(model, decay=decay, exclude_buffers=True)
    return ema.requires_grad_(False)


@contextlib.contextmanager
def published_weights(model: PreTrainedModel, ema: ModelEmaV3 | None) -> Iterator[None]:
    """What is evaluated and saved: `model` holds it inside the block, and its own weights, bit for bit, after it.

    That is the averaged weights, where there are any, with BatchNorm statistics of all processes together. Every
    process enters the block. Training goes on as if nothing had happened, however often a run is evaluated.
    """
    own, dtype = {name: tensor.clone() for name, tensor in model.state_dict().items()}, model.dtype
    try:
        if ema is not None:
            model.load_state_dict(ema.module.state_dict())
        average_batchnorm_buffers(model)
        yield
    finally:
        model.to(dtype)  # fp16_full_eval and bf16_full_eval cast it
        model.load_state_dict(own)
