from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses import masked_cross_entropy
from . import hyperparameters as hp
from .base import Algorithm, Paper, PseudoLabels, SSLBatch, predict, pseudo_label
from .state import MemoryBank


class SimMatchHyperparameters(hp.Hyperparameters):
    confidence_threshold: hp.ConfidenceThreshold = 0.95
    lambda_u: hp.LambdaU = 1.0
    lambda_graph: hp.LambdaGraph = 1.0
    graph_temperature: hp.GraphTemperature = 0.1
    memory_batches: hp.MemoryBatches = 64
    smoothing_alpha: hp.SmoothingAlpha = 0.9
    distribution_alignment_window: hp.AlignmentWindow = 256


class SimMatch(Algorithm):
    """SimMatch (arXiv 2203.06915).

    The memory bank holds K embeddings z_k of labeled images with their labels y_k. With aligned probabilities p
    `[U, C]` of the weak view, unit embeddings z, temperature t, and s_k = softmax_k(z·z_k / t) for the weak view, s'
    for the strong view:

        unfolding:    ŝ_k ∝ s_k · p[y_k]                           instance targets
        aggregation:  p̂_c = α p_c + (1 − α) Σ_k 1[y_k = c] s_k     semantic targets
        loss_u = mean 1[max p̂ ≥ τ] · H(p̂, prediction for the strong view)
        loss_graph = mean H(ŝ, s')

    `loss_graph` is the paper's L_in and `lambda_graph` its λ_in. The confidences are those of p̂.

    The paper's bank keeps a running mean of the embeddings of each labeled image. This bank keeps the last
    `memory_batches` batches of labeled images, including the current one, so it needs no row numbers.
    """

    paper = Paper(
        name="SimMatch",
        authors="Zheng, Mingkai and You, Shan and Huang, Lang and Wang, Fei and Qian, Chen and Xu, Chang",
        title="SimMatch: Semi-supervised Learning with Similarity Matching",
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
        self.memory = MemoryBank(settings.memory_batches * batch_size, embedding_dim, num_classes)

    def compute(self, batch: SSLBatch) -> tuple[PseudoLabels, dict[str, Tensor]]:
        memory, temperature = self.memory, self.settings.graph_temperature
        logits_weak, logits_strong = batch.read("logits_weak", "logits_strong")
        labeled, weak, strong = batch.read("embeddings_labeled", "embeddings_weak", "embeddings_strong")
        memory.write(labeled, F.one_hot(batch.labels, self.num_classes))
        probabilities = self.alignment(predict(logits_weak))
        similarities = memory.similarities(weak.detach(), temperature)
        classes, alpha = memory.probabilities.to(probabilities.dtype), self.settings.smoothing_alpha
        unfolded = (probabilities @ classes.T).clamp(min=torch.finfo(probabilities.dtype).tiny)
        # Computed in logarithms: the product could underflow to zero for all k.
        instance_targets = (similarities + unfolded.log()).softmax(1)
        targets = alpha * probabilities + (1 - alpha) * (similarities.softmax(1) @ classes)
        pseudo = pseudo_label(targets, self.settings.confidence_threshold)
        return pseudo, {
            "loss_u": masked_cross_entropy(logits=logits_strong, targets=targets, mask=pseudo.mask),
            "loss_graph": F.cross_entropy(memory.similarities(strong, temperature), instance_targets),
        }
