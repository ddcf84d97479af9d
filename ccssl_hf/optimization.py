"""SGD as the paper sets it: no decay on norms and biases, and FixMatch's cosine."""

from __future__ import annotations

import functools
import math

import timm.layers
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    timm.layers.GroupNorm1,
    timm.layers.RmsNorm,
    timm.layers.SimpleNorm,
)


def decayed_parameter_names(model: nn.Module) -> list[str]:
    """Names of the parameters that weight decay applies to: all but norms, found by module type, and biases."""
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if not isinstance(module, _NORMS)
        for name, _ in module.named_parameters(recurse=False)
        if name != "bias"
    ]


def _cosine_7_16(step: int, *, warmup_steps: int, total_steps: int) -> float:
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return max(0.0, math.cos(math.pi * 7 / 16 * progress))


def cosine_7_16_schedule(optimizer: Optimizer, *, warmup_steps: int, total_steps: int) -> LambdaLR:
    """Linear warm-up, then cos(7/16 pi k/K) of the peak rate: FixMatch (arXiv 2001.07685), section 2.4.

    Args:
        optimizer: Its rate is the peak rate.
        warmup_steps, total_steps: Optimizer steps; `K` is their difference.
    """
    return LambdaLR(optimizer, functools.partial(_cosine_7_16, warmup_steps=warmup_steps, total_steps=total_steps))
