"""State that several algorithms keep: distribution alignment and a memory bank of embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..distributed import all_gather, all_reduce_mean


class DistributionAlignment(nn.Module):
    """Divides class probabilities by their mean over the last `window` batches, including the current one.

    This keeps the predicted classes balanced (ReMixMatch, https://arxiv.org/abs/1911.09785, section 3.1, with a uniform
    marginal). The mean covers the batches of all processes.
    """

    def __init__(self, num_classes: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.queue = nn.Buffer(torch.zeros(window, num_classes))
        self.count = nn.Buffer(torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def forward(self, probabilities: Tensor) -> Tensor:
        """Adds `[U, C]` to the mean and returns it aligned. Its rows sum to 1 and have no gradient."""
        batch_mean = all_reduce_mean(probabilities.mean(0)).to(self.queue.dtype)
        # index_copy_ takes the position from the device; plain indexing would wait for it.
        self.queue.index_copy_(0, (self.count % self.window)[None], batch_mean[None])
        self.count.add_(1)
        mean = self.queue.sum(0) / self.count.clamp(max=self.window)  # rows not yet written are zero
        aligned = probabilities / mean.clamp(min=torch.finfo(mean.dtype).tiny)
        return aligned / aligned.sum(1, keepdim=True)


class MemoryBank(nn.Module):
    """A ring buffer of the last `size` (`K`) embeddings of all processes, with their class probabilities."""

    def __init__(self, size: int, embedding_dim: int, num_classes: int) -> None:
        super().__init__()
        self.size = size
        self.embeddings = nn.Buffer(torch.zeros(size, embedding_dim))
        self.probabilities = nn.Buffer(torch.zeros(size, num_classes))
        self.written = nn.Buffer(torch.zeros((), dtype=torch.int64))  # rows written so far

    def write(self, embeddings: Tensor, probabilities: Tensor) -> None:
        """Writes `[N, D]` and `[N, C]` of every process over the oldest rows, in the order of ranks."""
        embeddings, probabilities = all_gather(embeddings), all_gather(probabilities)
        if len(embeddings) > self.size:
            raise ValueError(
                f"{len(embeddings)} embeddings do not fit into a memory bank of {self.size}: build the algorithm with "
                "the batch_size (over all processes) and mu of the training run."
            )
        rows = (self.written + torch.arange(len(embeddings), device=embeddings.device)) % self.size
        self.embeddings.index_copy_(0, rows, embeddings.to(self.embeddings.dtype))
        self.probabilities.index_copy_(0, rows, probabilities.to(self.probabilities.dtype))
        self.written.add_(len(embeddings))

    def similarities(self, embeddings: Tensor, temperature: float) -> Tensor:
        """Returns inner products with all rows over `temperature`, `[N, K]`; for empty rows, the lowest number."""
        # Clone: the next write must not change tensors that the backward pass still needs.
        similarities = embeddings @ self.embeddings.clone().to(embeddings.dtype).T / temperature
        empty = torch.arange(self.size, device=embeddings.device) >= self.written
        return similarities.masked_fill(empty, torch.finfo(similarities.dtype).min)
