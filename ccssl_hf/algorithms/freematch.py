from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed import all_gather, all_gather_with_gradient, all_reduce_mean
from ..losses import masked_cross_entropy
from . import hyperparameters as hp
from .base import Algorithm, Paper, PseudoLabels, SSLBatch, predict, pseudo_label


class FreeMatchHyperparameters(hp.Hyperparameters):
    lambda_u: hp.LambdaU = 1.0
    lambda_fairness: hp.LambdaFairness = 0.01
    momentum: hp.Momentum = 0.999
    use_quantile: hp.UseQuantile = False
    clip_threshold: hp.ClipThreshold = False


class FreeMatch(Algorithm):
    """FreeMatch (arXiv 2205.07246).

    Running means over the weak views track the confidence (τ), the class probabilities (p̃ `[C]`) and the distribution
    of pseudo labels (h̃ `[C]`). Each starts at 1/C and is updated before it is used. The threshold of class c is
    τ · p̃_c / max p̃. p̄ and h̄ are the mean prediction and the distribution of predicted classes of the strong views
    whose images pass the threshold. With ratios normalised to sum to 1:

        loss_fairness = −H(p̃ / h̃, p̄ / h̄) = Σ_c (p̃ / h̃)_c · log (p̄ / h̄)_c

    All statistics cover the images of all processes. As in the authors' code, but not in the paper: a ratio with
    denominator 0 is 0, the logarithm adds 1e-12 to its argument, and the term is 0 if no image passes.
    """

    paper = Paper(
        name="FreeMatch",
        authors="Wang, Yidong and Chen, Hao and Heng, Qiang and Hou, Wenxin and Fan, Yue and Wu, Zhen and "
        "Wang, Jindong and Savvides, Marios and Shinozaki, Takahiro and Raj, Bhiksha and Schiele, Bernt and Xie, Xing",
        title="FreeMatch: Self-adaptive Thresholding for Semi-supervised Learning",
        venue="International Conference on Learning Representations",
        year=2023,
        arxiv="2205.07246",
    )
    hyperparameters_class = FreeMatchHyperparameters
    settings: FreeMatchHyperparameters
    terms = ("loss_x", "loss_u", "loss_fairness")

    def __init__(self, settings: FreeMatchHyperparameters, *, num_classes: int) -> None:
        super().__init__(settings, num_classes=num_classes)
        self.global_threshold = nn.Buffer(torch.tensor(1 / num_classes))
        self.class_probs = nn.Buffer(torch.full((num_classes,), 1 / num_classes))
        self.label_histogram = nn.Buffer(torch.full((num_classes,), 1 / num_classes))

    def compute(self, batch: SSLBatch) -> tuple[PseudoLabels, dict[str, Tensor]]:
        logits_weak, logits_strong = batch.read("logits_weak", "logits_strong")
        probabilities = predict(logits_weak)
        self._update(probabilities)
        pseudo = pseudo_label(probabilities, self.global_threshold * self.class_probs / self.class_probs.max())
        return pseudo, {
            "loss_u": masked_cross_entropy(logits=logits_strong, targets=pseudo.labels, mask=pseudo.mask),
            "loss_fairness": self._fairness_loss(logits_strong, pseudo.mask),
        }

    def _update(self, probabilities: Tensor) -> None:
        confidences, pseudo_labels = probabilities.max(1)
        histogram = F.one_hot(pseudo_labels, self.num_classes).to(probabilities.dtype)
        means = all_reduce_mean(torch.cat([probabilities, histogram, confidences[:, None]], dim=1).mean(0))
        mean, frequency, confidence = means.split([self.num_classes, self.num_classes, 1])
        if self.settings.use_quantile:
            confidence = all_gather(confidences).quantile(0.8)
        statistics = (self.class_probs, self.label_histogram, self.global_threshold)
        for statistic, value in zip(statistics, (mean, frequency, confidence.squeeze()), strict=True):
            statistic.lerp_(value.to(statistic.dtype), 1 - self.settings.momentum)
        if self.settings.clip_threshold:
            self.global_threshold.clamp_(max=0.95)

    def _fairness_loss(self, logits: Tensor, mask: Tensor) -> Tensor:
        probabilities = logits.softmax(1)
        predicted = F.one_hot(probabilities.argmax(1), self.num_classes)
        sums = torch.stack([mask @ probabilities, mask @ predicted.to(mask.dtype)])
        total, counts = all_gather_with_gradient(sums[None]).sum(0)
        running = _ratio(self.class_probs, self.label_histogram).to(total.dtype)
        return (running * (_ratio(total, counts) + 1e-12).log()).sum() * (counts.sum() > 0)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """`above / below`, 0 if `below` is 0, normalised to sum to 1."""
    ratio = torch.where(below > 0, above / below.where(below > 0, 1), 0)
    return ratio / ratio.sum().clamp(min=torch.finfo(ratio.dtype).tiny)
