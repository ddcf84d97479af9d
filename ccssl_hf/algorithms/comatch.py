from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributed import all_gather, all_gather_with_gradient, rank
from ..losses import masked_cross_entropy
from ..transforms import View
from . import hyperparameters as hp
from .base import Algorithm, Paper, PseudoLabels, SSLBatch, predict, pseudo_label
from .state import MemoryBank


class CoMatchHyperparameters(hp.Hyperparameters):
    confidence_threshold: hp.ConfidenceThreshold = 0.95
    lambda_u: hp.LambdaU = 1.0
    lambda_graph: hp.LambdaGraph = 1.0
    graph_temperature: hp.GraphTemperature = 0.2
    graph_threshold: hp.GraphThreshold = 0.8
    memory_batches: hp.MemoryBatches = 5
    smoothing_alpha: hp.SmoothingAlpha = 0.9
    distribution_alignment_window: hp.AlignmentWindow = 32


class CoMatch(Algorithm):
    """CoMatch (arXiv 2011.11183).

    With aligned probabilities p `[U, C]` of the weak view, unit embeddings z, temperature t:

        q_b = α p_b + (1 − α) Σ_k a_bk p_k,   a_b = softmax_k(z_b·z_k / t) over the memory bank
        loss_u = mean_b 1[max q_b ≥ τ] · H(q_b, prediction for the strong view)
        W_bj = 1 if b = j,  q_b·q_j if that is at least T,  else 0
        loss_graph = mean_b H(W_b / Σ_j W_bj, softmax_j(z_b·z'_j / t))

    In loss_graph, z is the embedding of the strong view and z' that of the contrastive view. The bank holds p and z of
    the weak views, and one-hot labels and z of the labeled images, of the last `memory_batches` batches.

    As in the authors' code, but not in the paper: q = p until the bank has been full for one step; the bank stores p,
    not q; the logarithm in loss_graph adds 1e-7 to its argument. Unlike their code, the graph covers the images of all
    processes.
    """

    paper = Paper(
        name="CoMatch",
        authors="Li, Junnan and Xiong, Caiming and Hoi, Steven C. H.",
        title="CoMatch: Semi-supervised Learning with Contrastive Graph Regularization",
        venue="Proceedings of the IEEE/CVF International Conference on Computer Vision",
        year=2021,
        arxiv="2011.11183",
    )
    hyperparameters_class = CoMatchHyperparameters
    settings: CoMatchHyperparameters
    terms = ("loss_x", "loss_u", "loss_graph")
    views = tuple(View)
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
        if num_unlabeled is not None and settings.memory_batches > (batches := num_unlabeled // (mu * batch_size)):
            raise ValueError(
                f"memory_batches is {settings.memory_batches}, but {num_unlabeled} unlabeled images make only "
                f"{batches} batches of {mu * batch_size}: choose at most {batches}, or lower mu or batch_size."
            )
        self.memory = MemoryBank(settings.memory_batches * (1 + mu) * batch_size, embedding_dim, num_classes)

    def compute(self, batch: SSLBatch) -> tuple[PseudoLabels, dict[str, Tensor]]:
        logits_weak, logits_strong = batch.read("logits_weak", "logits_strong")
        labeled, weak, strong, contrast = batch.read(
            "embeddings_labeled", "embeddings_weak", "embeddings_strong", "embeddings_contrast"
        )
        aligned = self.alignment(predict(logits_weak))
        memory, alpha = self.memory, self.settings.smoothing_alpha
        attention = memory.similarities(weak.detach(), self.settings.graph_temperature).softmax(1)
        smoothed = alpha * aligned + (1 - alpha) * attention @ memory.probabilities.to(attention.dtype)
        targets = torch.where(memory.written > memory.size, smoothed, aligned)
        memory.write(weak, aligned)
        memory.write(labeled, F.one_hot(batch.labels, self.num_classes))
        pseudo = pseudo_label(targets, self.settings.confidence_threshold)
        return pseudo, {
            "loss_u": masked_cross_entropy(logits=logits_strong, targets=targets, mask=pseudo.mask),
            "loss_graph": self._graph_loss(strong, contrast, targets),
        }

    def _graph_loss(self, strong: Tensor, contrast: Tensor, targets: Tensor) -> Tensor:
        settings = self.settings
        edges = targets @ all_gather(targets).T
        edges.diagonal(rank() * len(targets)).fill_(1)
        edges = edges * (edges >= settings.graph_threshold)
        edges = edges / edges.sum(1, keepdim=True)
        similarities = strong @ all_gather_with_gradient(contrast).T / settings.graph_temperature
        return -(edges * (similarities.softmax(1) + 1e-7).log()).sum(1).mean()
