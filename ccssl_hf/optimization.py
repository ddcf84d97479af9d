"""Parameters with weight decay, and FixMatch's cosine schedule."""

from __future__ import annotations

import functools
import math

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_TIMM_NORMS = {f"timm.layers.{file}" for file in ("norm", "norm_act", "evo_norm", "filter_response_norm", "grn")}
"""timm defines its norms in these modules; few of them derive from torch's classes."""


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, _NORMS) or any(cls.__module__ in _TIMM_NORMS for cls in type(module).__mro__)


def decayed_parameter_names(model: nn.Module) -> list[str]:
    """Returns the names of parameters with weight decay: all except norms (by module type) and biases."""
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if not _is_norm(module)
        for name, _ in module.named_parameters(recurse=False)
        if not name.endswith("bias")  # attention has in_proj_bias, q_bias
    ]


def _cosine_7_16(step: int, *, warmup_steps: int, total_steps: int) -> float:
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return max(0.0, math.cos(math.pi * 7 / 16 * progress))


def cosine_7_16_schedule(optimizer: Optimizer, *, warmup_steps: int, total_steps: int) -> LambdaLR:
    """Linear warm-up, then cos(7π k / 16K) times the peak learning rate: FixMatch (arXiv 2001.07685), section 2.4.

    Args:
        optimizer: Its learning rate is the peak.
        warmup_steps, total_steps: In optimizer steps; `K` is their difference.
    """
    return LambdaLR(optimizer, functools.partial(_cosine_7_16, warmup_steps=warmup_steps, total_steps=total_steps))
