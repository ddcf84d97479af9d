"""The averaged copy of the weights, which is what gets evaluated and published."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from timm.utils import ModelEmaV3
from torch import nn


def make_ema(model: nn.Module, decay: float) -> ModelEmaV3:
    """timm's exponential moving average of parameters; BatchNorm buffers are copied, not averaged, as in FixMatch."""
    ema = ModelEmaV3(model, decay=decay, exclude_buffers=True)
    return ema.requires_grad_(False)


@contextlib.contextmanager
def swapped_weights(model: nn.Module, ema: ModelEmaV3 | None) -> Iterator[None]:
    """`model` holds the averaged weights inside the block, and its own, bit for bit, after it."""
    if ema is None:
        yield
        return
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model.load_state_dict(ema.module.state_dict())
    try:
        yield
    finally:
        with torch.no_grad():
            model.load_state_dict(own)
