"""SoftMatch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributed import all_gather, all_reduce_mean
from ..losses import masked_cross_entropy
from .base import Algorithm, Paper, SSLBatch, SSLLoss, predict
from .hyperparameters import Hyperparameters, LambdaU, Momentum, NSigma


@dataclass(frozen=True, kw_only=True)
class SoftMatchHyperparameters(Hyperparameters):
    lambda_u: LambdaU = 1.0
    momentum: Momentum = 0.999
    n_sigma: NSigma = 2.0


class SoftMatch(Algorithm):
    """SoftMatch: Addressing the Quantity-Quality Trade-off in Semi-supervised Learning (arXiv 2301.10921).

    Every pseudo label is trained on, with a weight from the confidence c of the aligned probabilities: a Gaussian below
    the running mean μ, with the running variance σ² over n_sigma², and 1 above it:

        weight = exp(−min(c − μ, 0)² · n_sigma² / (2 σ²))

    Uniform alignment divides probabilities by their running mean `[C]`, which starts as the first batch's; μ starts at
    1/C and σ² at 1. All three are over all processes' images, and updated before they are used. Pseudo labels, and the
    confidences that CCSSL reads, are those before alignment.
    """

    paper = Paper(
        name="SoftMatch",
        key="chen2023softmatch",
        authors="Chen, Hao and Tao, Ran and Fan, Yue and Wang, Yidong and Wang, Jindong and Schiele, Bernt and "
        "Xie, Xing and Raj, Bhiksha and Savvides, Marios",
        title="SoftMatch: Addressing the Quantity-Quality Trade-off in Semi-supervised Learning",
        venue="International Conference on Learning Representations",
        year=2023,
        arxiv="2301.10921",
    )
    hyperparameters_class = SoftMatchHyperparameters
    settings: SoftMatchHyperparameters
    terms = ("loss_x", "loss_u")
    class_probs: Tensor
    mean_confidence: Tensor
    variance_confidence: Tensor

    def __init__(self, settings: SoftMatchHyperparameters, *, num_classes: int) -> None:
        super().__init__(settings, num_classes=num_classes)
        self.register_buffer("class_probs", torch.zeros(num_classes))  # zeros: no batch yet
        self.register_buffer("mean_confidence", torch.tensor(1 / num_classes))
        self.register_buffer("variance_confidence", torch.tensor(1.0))

    def compute(self, batch: SSLBatch) -> SSLLoss:
        logits_weak, logits_strong = batch.read("logits_weak", "logits_strong")
        probabilities = predict(logits_weak)
        confidences, pseudo_labels = probabilities.max(1)
        weight = self._weight(self._aligned(probabilities).amax(1))

        loss_x = F.cross_entropy(batch.logits_labeled, batch.labels)
        loss_u = masked_cross_entropy(logits=logits_strong, targets=pseudo_labels, mask=weight)
        return SSLLoss(
            loss=loss_x + self.settings.lambda_u * loss_u,
            terms={"loss_x": loss_x, "loss_u": loss_u},
            pseudo_labels=pseudo_labels,
            confidences=confidences,
            mask=weight,
        )

    @torch.no_grad()
    def _aligned(self, probabilities: Tensor) -> Tensor:
        mean = all_reduce_mean(probabilities.mean(0)).to(self.class_probs.dtype)
        started = self.class_probs.sum() > 0
        self.class_probs.copy_(torch.where(started, self.class_probs.lerp(mean, 1 - self.settings.momentum), mean))
        aligned = probabilities / (self.class_probs + 1e-6)  # as the authors: a class never predicted is no infinity
        return aligned / aligned.sum(1, keepdim=True)

    @torch.no_grad()
    def _weight(self, confidences: Tensor) -> Tensor:
        everyone = all_gather(confidences)
        variance, mean = torch.var_mean(everyone, correction=min(1, len(everyone) - 1))
        for statistic, value in ((self.mean_confidence, mean), (self.variance_confidence, variance)):
            statistic.lerp_(value.to(statistic.dtype), 1 - self.settings.momentum)
        sigma = self.variance_confidence.sqrt() / self.settings.n_sigma
        below = (confidences - self.mean_confidence).clamp(max=0)
        return (-(below / sigma.clamp(min=torch.finfo(sigma.dtype).tiny)).square() / 2).exp()
