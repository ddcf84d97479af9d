"""The memory bank of embeddings, which several algorithms share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..distributed import all_gather


class MemoryBank(nn.Module):
    """The last `size` embeddings of all processes, each with its class probabilities: a ring, the same everywhere.

    Args:
        size: Rows, `K`.
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
        self.register_buffer("written", torch.zeros((), dtype=torch.int64))  # rows, since the beginning

    @torch.no_grad()
    def write(self, embeddings: Tensor, probabilities: Tensor) -> None:
        """Takes in `[N, D]` and `[N, C]` of every process, in the order of the ranks; the oldest rows make room.

        Raises:
            ValueError: There are more rows than the bank holds.
        """
        embeddings, probabilities = all_gather(embeddings), all_gather(probabilities)
        if len(embeddings) > self.size:
            raise ValueError(
                f"{len(embeddings)} embeddings do not fit into a memory bank of {self.size}: build the algorithm with "
                "the batch_size (over all processes) and mu that it is trained with."
            )
        rows = (self.written + torch.arange(len(embeddings), device=embeddings.device)) % self.size
        self.embeddings.index_copy_(0, rows, embeddings.to(self.embeddings.dtype))
        self.probabilities.index_copy_(0, rows, probabilities.to(self.probabilities.dtype))
        self.written += len(embeddings)

    def similarities(self, embeddings: Tensor, temperature: float) -> Tensor:
        """Inner products of `[N, D]` with the bank's rows over a temperature, `[N, K]`: logits for a softmax.

        A row that was not yet written has the lowest number there is.
        """
        # A copy: the next write must not reach into a graph that still waits for its backward pass.
        similarities = embeddings @ self.embeddings.clone().to(embeddings.dtype).T / temperature
        empty = torch.arange(self.size, device=embeddings.device) >= self.written
        return similarities.masked_fill(empty, torch.finfo(similarities.dtype).min)
