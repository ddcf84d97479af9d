"""Distribution alignment, used by several algorithms."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..distributed import all_reduce_mean


def distribution_alignment(num_classes: int, window: int | None) -> nn.Module:
    """Returns `DistributionAlignment` over `window` batches, or the identity for 0 or None."""
    return DistributionAlignment(num_classes, window) if window else nn.Identity()


class DistributionAlignment(nn.Module):
    """Divides class probabilities by their mean over the last `window` batches, including the current one.

    This keeps the predicted classes balanced (ReMixMatch, https://arxiv.org/abs/1911.09785, section 3.1, with a uniform
    marginal). The mean covers the batches of all processes.

    Args:
        num_classes: `C`.
        window: Number of batches in the mean.
    """

    queue: Tensor
    count: Tensor

    def __init__(self, num_classes: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.register_buffer("queue", torch.zeros(window, num_classes))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def forward(self, probabilities: Tensor) -> Tensor:
        """Adds `[U, C]` to the mean and returns it aligned. Its rows sum to 1 and have no gradient."""
        batch_mean = all_reduce_mean(probabilities.mean(0)).to(self.queue.dtype)
        # index_copy_ takes the position from the device; plain indexing would wait for it.
        self.queue.index_copy_(0, (self.count % self.window)[None], batch_mean[None])
        self.count += 1
        mean = self.queue.sum(0) / self.count.clamp(max=self.window)  # rows not yet written are zero
        aligned = probabilities / mean.clamp(min=torch.finfo(mean.dtype).tiny)
        return aligned / aligned.sum(1, keepdim=True)
