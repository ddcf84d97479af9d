"""CoMatch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributed import all_gather, all_gather_with_gradient, rank
from ..losses import masked_cross_entropy
from ..transforms import View
from .alignment import distribution_alignment
from .base import Algorithm, Paper, SSLBatch, SSLLoss, predict, pseudo_label
from .hyperparameters import (
    AlignmentWindow,
    ConfidenceThreshold,
    GraphTemperature,
    GraphThreshold,
    Hyperparameters,
    LambdaGraph,
    LambdaU,
    MemoryBatches,
    SmoothingAlpha,
)
from .memory import MemoryBank


@dataclass(frozen=True, kw_only=True)
class CoMatchHyperparameters(Hyperparameters):
    confidence_threshold: ConfidenceThreshold = 0.95
    lambda_u: LambdaU = 1.0
    lambda_graph: LambdaGraph = 1.0
    graph_temperature: GraphTemperature = 0.2
    graph_threshold: GraphThreshold = 0.8
    memory_batches: MemoryBatches = 5
    smoothing_alpha: SmoothingAlpha = 0.9
    distribution_alignment_window: AlignmentWindow = 32


class CoMatch(Algorithm):
    """CoMatch: Semi-supervised Learning with Contrastive Graph Regularization (arXiv 2011.11183).

    With aligned probabilities p `[U, C]` of the weak view, unit embeddings z, temperature t:

        q_b = α p_b + (1 − α) Σ_k a_bk p_k,   a_b = softmax_k(z_b·z_k / t) over the memory bank
        loss_u = mean_b 1[max q_b ≥ τ] · H(q_b, strong view's prediction)
        W_bj = 1 where b = j;  q_b·q_j where that reaches T;  else 0
        loss_graph = mean_b H(W_b / Σ_j W_bj, softmax_j(z_b·z'_j / t))

    z is the strong view's and z' the contrastive view's embedding. The bank holds the weak view's p and z and the
    labeled images' one-hot labels and z, of the last `memory_batches` batches.

    As the authors' code, and not told in the paper: q = p until the bank has been full for one step; the bank keeps p
    rather than q; 1e-7 inside the graph loss's logarithm. Unlike theirs, the graph spans all processes' images.
    """

    paper = Paper(
        name="CoMatch",
        key="li2021comatch",
        authors="Li, Junnan and Xiong, Caiming and Hoi, Steven C. H.",
        title="CoMatch: Semi-supervised Learning with Contrastive Graph Regularization",
        venue="Proceedings of the IEEE/CVF International Conference on Computer Vision",
        year=2021,
        arxiv="2011.11183",
    )
    hyperparameters_class = CoMatchHyperparameters
    settings: CoMatchHyperparameters
    terms = ("loss_x", "loss_u", "loss_graph")
    views = (View.WEAK, View.STRONG, View.CONTRASTIVE)
    needs_embeddings = True

    def __init__(
        self,
        settings: CoMatchHyperparameters,
        *,
        num_classes: int,
        embedding_dim: int,
        batch_size: int,
        mu: int,
        num_unlabeled: int | None = None,
    ) -> None:
        super().__init__(settings, num_classes=num_classes)
        batches = None if num_unlabeled is None else num_unlabeled // (mu * batch_size)
        if batches is not None and settings.memory_batches > batches:
            raise ValueError(
                f"memory_batches is {settings.memory_batches}, but {num_unlabeled} unlabeled images make only "
                f"{batches} batches of {mu * batch_size}: choose at most {batches}, or lower mu or batch_size."
            )
        self.alignment = distribution_alignment(num_classes, settings.distribution_alignment_window)
        self.memory = MemoryBank(settings.memory_batches * (1 + mu) * batch_size, embedding_dim, num_classes)

    def compute(self, batch: SSLBatch) -> SSLLoss:
        settings = self.settings
        logits_weak, logits_strong = batch.read("logits_weak", "logits_strong")
        labeled, weak, strong, contrast = batch.read(
            "embeddings_labeled", "embeddings_weak", "embeddings_strong", "embeddings_contrast"
        )
        aligned = self.alignment(predict(logits_weak))
        targets = self._smoothed(aligned, weak.detach())
        self.memory.write(weak, aligned)
        self.memory.write(labeled, F.one_hot(batch.labels, self.num_classes))
        confidences, pseudo_labels, mask = pseudo_label(targets, settings.confidence_threshold)

        loss_x = F.cross_entropy(batch.logits_labeled, batch.labels)
        loss_u = masked_cross_entropy(logits=logits_strong, targets=targets, mask=mask)
        loss_graph = self._graph_loss(strong, contrast, targets)
        return SSLLoss(
            loss=loss_x + settings.lambda_u * loss_u + settings.lambda_graph * loss_graph,
            terms={"loss_x": loss_x, "loss_u": loss_u, "loss_graph": loss_graph},
            pseudo_labels=pseudo_labels,
            confidences=confidences,
            mask=mask,
        )

    def _smoothed(self, probabilities: Tensor, embeddings: Tensor) -> Tensor:
        memory, alpha = self.memory, self.settings.smoothing_alpha
        attention = memory.similarities(embeddings, self.settings.graph_temperature).softmax(1)
        smoothed = alpha * probabilities + (1 - alpha) * attention @ memory.probabilities.to(attention.dtype)
        return torch.where(memory.written > memory.size, smoothed, probabilities)

    def _graph_loss(self, strong: Tensor, contrast: Tensor, targets: Tensor) -> Tensor:
        settings = self.settings
        edges = targets @ all_gather(targets).T
        edges.diagonal(rank() * len(targets)).fill_(1)
        edges = edges * (edges >= settings.graph_threshold)
        edges = edges / edges.sum(1, keepdim=True)
        similarities = strong @ all_gather_with_gradient(contrast).T / settings.graph_temperature
        return -(edges * (similarities.softmax(1) + 1e-7).log()).sum(1).mean()
