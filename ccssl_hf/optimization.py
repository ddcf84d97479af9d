"""Parameters with weight decay, and FixMatch's cosine schedule."""

from __future__ import annotations

import math

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
# timm defines its norms in these modules; few of them derive from torch's classes.
_TIMM_NORMS = {f"timm.layers.{file}" for file in ("norm", "norm_act", "evo_norm", "filter_response_norm", "grn")}


def decayed_parameter_names(model: nn.Module) -> list[str]:
    """Returns the names of parameters with weight decay: all except norms (by module type) and biases."""
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if not isinstance(module, _NORMS) and _TIMM_NORMS.isdisjoint(cls.__module__ for cls in type(module).__mro__)
        for name, _ in module.named_parameters(recurse=False)
        if not name.endswith("bias")  # attention has in_proj_bias, q_bias
    ]


def cosine_7_16_schedule(optimizer: Optimizer, *, warmup_steps: int, total_steps: int) -> LambdaLR:
    """FixMatch's schedule (arXiv 2001.07685, section 2.4): linear warm-up, then peak · cos(7π k / 16K) for K steps."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return max(0.0, math.cos(math.pi * 7 / 16 * progress))

    return LambdaLR(optimizer, factor)
