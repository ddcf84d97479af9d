"""Distribution alignment, which several algorithms share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..distributed import all_reduce_mean


def distribution_alignment(num_classes: int, window: int | None) -> nn.Module:
    """`DistributionAlignment` over `window` batches; for 0 or None, what changes nothing."""
    return DistributionAlignment(num_classes, window) if window else nn.Identity()


class DistributionAlignment(nn.Module):
    """Divides class probabilities by their mean over the last `window` batches, the present one included.

    So no class is predicted much more often than the others (ReMixMatch, https://arxiv.org/abs/1911.09785, section 3.1,
    with a uniform marginal). A batch is the global one: the mean is taken over all processes.

    Args:
        num_classes: `C`.
        window: How many batches the mean runs over.
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
        """Takes the batch `[U, C]` into the mean, and returns it aligned: rows that sum to 1, without gradient."""
        batch_mean = all_reduce_mean(probabilities.mean(0)).to(self.queue.dtype)
        # Written in place at a position that stays on the device: plain indexing would wait for it.
        self.queue.index_copy_(0, (self.count % self.window)[None], batch_mean[None])
        self.count += 1
        mean = self.queue.sum(0) / self.count.clamp(max=self.window)  # rows not yet written are zero
        aligned = probabilities / mean.clamp(min=torch.finfo(mean.dtype).tiny)
        return aligned / aligned.sum(1, keepdim=True)
