"""The memory bank of embeddings, used by several algorithms."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..distributed import all_gather


class MemoryBank(nn.Module):
    """A ring buffer of the last `size` embeddings of all processes, with their class probabilities.

    Args:
        size: Number of rows, `K`.
        embedding_dim: `D`.
        num_classes: `C`.
    """

    embeddings: Tensor
    probabilities: Tensor
    written: Tensor

    def __init__(self, size: int, embedding_dim: int, num_classes: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("embeddings", torch.zeros(size, embedding_dim))
        self.register_buffer("probabilities", torch.zeros(size, num_classes))
        self.register_buffer("written", torch.zeros((), dtype=torch.int64))  # rows written so far

    @torch.no_grad()
    def write(self, embeddings: Tensor, probabilities: Tensor) -> None:
        """Writes `[N, D]` and `[N, C]` of every process over the oldest rows, in the order of ranks.

        Raises:
            ValueError: The bank has fewer rows than are written.
        """
        embeddings, probabilities = all_gather(embeddings), all_gather(probabilities)
        if len(embeddings) > self.size:
            raise ValueError(
                f"{len(embeddings)} embeddings do not fit into a memory bank of {self.size}: build the algorithm with "
                "the batch_size (over all processes) and mu of the training run."
            )
        rows = (self.written + torch.arange(len(embeddings), device=embeddings.device)) % self.size
        self.embeddings.index_copy_(0, rows, embeddings.to(self.embeddings.dtype))
        self.probabilities.index_copy_(0, rows, probabilities.to(self.probabilities.dtype))
        self.written += len(embeddings)

    def similarities(self, embeddings: Tensor, temperature: float) -> Tensor:
        """Returns the logits `[N, K]`: inner products of `[N, D]` with all rows, divided by `temperature`.

        Rows that are not yet written get the lowest finite value.
        """
        # Clone: the next write must not change tensors that the backward pass still needs.
        similarities = embeddings @ self.embeddings.clone().to(embeddings.dtype).T / temperature
        empty = torch.arange(self.size, device=embeddings.device) >= self.written
        return similarities.masked_fill(empty, torch.finfo(similarities.dtype).min)
