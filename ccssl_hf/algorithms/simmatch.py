"""SimMatch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses import masked_cross_entropy
from .alignment import distribution_alignment
from .base import Algorithm, Paper, SSLBatch, SSLLoss, predict, pseudo_label
from .hyperparameters import (
    AlignmentWindow,
    ConfidenceThreshold,
    GraphTemperature,
    Hyperparameters,
    LambdaGraph,
    LambdaU,
    MemoryBatches,
    SmoothingAlpha,
)
from .memory import MemoryBank


@dataclass(frozen=True, kw_only=True)
class SimMatchHyperparameters(Hyperparameters):
    confidence_threshold: ConfidenceThreshold = 0.95
    lambda_u: LambdaU = 1.0
    lambda_graph: LambdaGraph = 1.0
    graph_temperature: GraphTemperature = 0.1
    memory_batches: MemoryBatches = 64
    smoothing_alpha: SmoothingAlpha = 0.9
    distribution_alignment_window: AlignmentWindow = 256


class SimMatch(Algorithm):
    """SimMatch: Semi-supervised Learning with Similarity Matching (arXiv 2203.06915).

    The bank holds K embeddings z_k of labeled images with their labels y_k. With aligned probabilities p `[U, C]` of
    the weak view, unit embeddings z, temperature t, and s_k = softmax_k(z·z_k / t) of the weak view, s' of the strong:

        unfolding:    ŝ_k ∝ s_k · p[y_k]                           instance targets
        aggregation:  p̂_c = α p_c + (1 − α) Σ_k 1[y_k = c] s_k     semantic targets
        loss_u = mean 1[max p̂ ≥ τ] · H(p̂, strong view's prediction)
        loss_graph = mean H(ŝ, s')

    `loss_graph` is the paper's L_in, `lambda_graph` its λ_in; the confidences are those of p̂.

    The paper's bank has one slot for each labeled image, as a running mean of its embeddings. This one is a ring of the
    last `memory_batches` batches of labeled images, the present one included: it needs no row numbers of labeled
    images, and is read from the first step on.
    """

    paper = Paper(
        name="SimMatch",
        key="zheng2022simmatch",
        authors="Zheng, Mingkai and You, Shan and Huang, Lang and Wang, Fei and Qian, Chen and Xu, Chang",
        title="SimMatch: Semi-Supervised Learning with Similarity Matching",
        venue="Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition",
        year=2022,
        arxiv="2203.06915",
    )
    hyperparameters_class = SimMatchHyperparameters
    settings: SimMatchHyperparameters
    terms = ("loss_x", "loss_u", "loss_graph")
    needs_embeddings = True

    def __init__(
        self, settings: SimMatchHyperparameters, *, num_classes: int, embedding_dim: int, batch_size: int
    ) -> None:
        super().__init__(settings, num_classes=num_classes)
        self.alignment = distribution_alignment(num_classes, settings.distribution_alignment_window)
        self.memory = MemoryBank(settings.memory_batches * batch_size, embedding_dim, num_classes)

    def compute(self, batch: SSLBatch) -> SSLLoss:
        settings, memory = self.settings, self.memory
        logits_weak, logits_strong = batch.read("logits_weak", "logits_strong")
        labeled, weak, strong = batch.read("embeddings_labeled", "embeddings_weak", "embeddings_strong")
        memory.write(labeled, F.one_hot(batch.labels, self.num_classes))
        probabilities = self.alignment(predict(logits_weak))
        similarities = memory.similarities(weak.detach(), settings.graph_temperature)
        instance_targets, targets = self._targets(probabilities, similarities)
        confidences, pseudo_labels, mask = pseudo_label(targets, settings.confidence_threshold)

        loss_x = F.cross_entropy(batch.logits_labeled, batch.labels)
        loss_u = masked_cross_entropy(logits=logits_strong, targets=targets, mask=mask)
        loss_graph = F.cross_entropy(memory.similarities(strong, settings.graph_temperature), instance_targets)
        return SSLLoss(
            loss=loss_x + settings.lambda_u * loss_u + settings.lambda_graph * loss_graph,
            terms={"loss_x": loss_x, "loss_u": loss_u, "loss_graph": loss_graph},
            pseudo_labels=pseudo_labels,
            confidences=confidences,
            mask=mask,
        )

    @torch.no_grad()
    def _targets(self, probabilities: Tensor, similarities: Tensor) -> tuple[Tensor, Tensor]:
        """Instance targets `[U, K]` and semantic targets `[U, C]` of weak views."""
        labels, alpha = self.memory.probabilities.to(probabilities.dtype), self.settings.smoothing_alpha
        unfolded = (probabilities @ labels.T).clamp(min=torch.finfo(probabilities.dtype).tiny)
        aggregated = similarities.softmax(1) @ labels
        # In logarithms, the product cannot vanish for all rows at once.
        return (similarities + unfolded.log()).softmax(1), alpha * probabilities + (1 - alpha) * aggregated
