from __future__ import annotations

import torch
from torch import Tensor, nn

from ..distributed import all_gather, all_reduce_mean
from ..losses import masked_cross_entropy
from . import hyperparameters as hp
from .base import Algorithm, Paper, PseudoLabels, SSLBatch, predict


class SoftMatchHyperparameters(hp.Hyperparameters):
    lambda_u: hp.LambdaU = 1.0
    momentum: hp.Momentum = 0.999
    n_sigma: hp.NSigma = 2.0


class SoftMatch(Algorithm):
    """SoftMatch (arXiv 2301.10921): every pseudo label is a target, weighted by its confidence.

    With the confidence c of the aligned probabilities, its running mean μ and its running variance σ²:

        weight = exp(−min(c − μ, 0)² · n_sigma² / (2 σ²))

    Uniform alignment divides the probabilities by their running mean `[C]`, which starts with the mean of the first
    batch; μ starts at 1/C and σ² at 1. All three cover the images of all processes and are updated before they are
    used. Pseudo labels, and the confidences that the contrastive loss reads, are those before alignment.
    """

    paper = Paper(
        name="SoftMatch",
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

    def __init__(self, settings: SoftMatchHyperparameters, *, num_classes: int) -> None:
        super().__init__(settings, num_classes=num_classes)
        self.class_probs = nn.Buffer(torch.zeros(num_classes))  # zeros: no batch yet
        self.mean_confidence = nn.Buffer(torch.tensor(1 / num_classes))
        self.variance_confidence = nn.Buffer(torch.tensor(1.0))

    def compute(self, batch: SSLBatch) -> tuple[PseudoLabels, dict[str, Tensor]]:
        logits_weak, logits_strong = batch.read("logits_weak", "logits_strong")
        probabilities = predict(logits_weak)
        confidences, labels = probabilities.max(1)
        pseudo = PseudoLabels(labels, confidences, self._weight(self._aligned(probabilities).amax(1)))
        return pseudo, {"loss_u": masked_cross_entropy(logits=logits_strong, targets=pseudo.labels, mask=pseudo.mask)}

    def _aligned(self, probabilities: Tensor) -> Tensor:
        mean = all_reduce_mean(probabilities.mean(0)).to(self.class_probs.dtype)
        started = self.class_probs.sum() > 0
        self.class_probs.copy_(torch.where(started, self.class_probs.lerp(mean, 1 - self.settings.momentum), mean))
        aligned = probabilities / (self.class_probs + 1e-6)  # as in the authors' code; avoids a division by zero
        return aligned / aligned.sum(1, keepdim=True)

    def _weight(self, confidences: Tensor) -> Tensor:
        everyone = all_gather(confidences)
        variance, mean = torch.var_mean(everyone, correction=min(1, len(everyone) - 1))
        for statistic, value in ((self.mean_confidence, mean), (self.variance_confidence, variance)):
            statistic.lerp_(value.to(statistic.dtype), 1 - self.settings.momentum)
        sigma = self.variance_confidence.sqrt() / self.settings.n_sigma
        below = (confidences - self.mean_confidence).clamp(max=0)
        return (-(below / sigma.clamp(min=torch.finfo(sigma.dtype).tiny)).square() / 2).exp()
