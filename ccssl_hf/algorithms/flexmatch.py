"""FlexMatch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributed import all_gather
from ..losses import masked_cross_entropy
from .base import Algorithm, Paper, SSLBatch, SSLLoss, predict, pseudo_label
from .hyperparameters import ConfidenceThreshold, Hyperparameters, LambdaU, ThresholdWarmup


@dataclass(frozen=True, kw_only=True)
class FlexMatchHyperparameters(Hyperparameters):
    confidence_threshold: ConfidenceThreshold = 0.95
    lambda_u: LambdaU = 1.0
    threshold_warmup: ThresholdWarmup = True


class FlexMatch(Algorithm):
    """FlexMatch: Boosting Semi-Supervised Learning with Curriculum Pseudo Labeling (arXiv 2110.08263).

    Every unlabeled image has a status: the class that it was last taken for with confidence τ, if ever. With σ_c images
    of status c out of N, the threshold of class c is

        T_c = τ · M(β_c),   β_c = σ_c / max(max_c σ_c, N − Σ_c σ_c),   M(x) = x / (2 − x)

    without N − Σ σ where `threshold_warmup` is off. A step uses the statuses of before it.

    Here statuses are kept for all processes' images, and σ is counted along rather than anew, so that a step costs the
    same for any N. Of an image that occurs several times in a batch, the last confident occurrence in the order of the
    ranks counts. Should one class take all N images, β follows; the authors' code then stands still.
    """

    paper = Paper(
        name="FlexMatch",
        key="zhang2021flexmatch",
        authors="Zhang, Bowen and Wang, Yidong and Hou, Wenxin and Wu, Hao and Wang, Jindong and Okumura, Manabu and "
        "Shinozaki, Takahiro",
        title="FlexMatch: Boosting Semi-Supervised Learning with Curriculum Pseudo Labeling",
        venue="Advances in Neural Information Processing Systems",
        year=2021,
        arxiv="2110.08263",
    )
    hyperparameters_class = FlexMatchHyperparameters
    settings: FlexMatchHyperparameters
    terms = ("loss_x", "loss_u")
    needs_index = True
    status: Tensor
    counts: Tensor

    def __init__(self, settings: FlexMatchHyperparameters, *, num_classes: int, num_unlabeled: int) -> None:
        super().__init__(settings, num_classes=num_classes)
        self.unused = num_classes  # the status of an image that was never confident
        dtype = torch.int16 if self.unused <= torch.iinfo(torch.int16).max else torch.int32
        self.register_buffer("status", torch.full((num_unlabeled,), self.unused, dtype=dtype))
        self.register_buffer("counts", torch.tensor([0] * num_classes + [num_unlabeled]))  # of each status

    @property
    def class_status(self) -> Tensor:
        """β `[C]`: how far each class has been learned, in [0, 1]."""
        counts = self.counts if self.settings.threshold_warmup else self.counts[: self.unused]
        return self.counts[: self.unused] / counts.max().clamp(min=1)

    def compute(self, batch: SSLBatch) -> SSLLoss:
        settings = self.settings
        logits_weak, logits_strong, index = batch.read("logits_weak", "logits_strong", "index")
        status = self.class_status
        thresholds = settings.confidence_threshold * status / (2 - status)
        confidences, pseudo_labels, mask = pseudo_label(predict(logits_weak), thresholds)
        self._update(index, pseudo_labels, confidences >= settings.confidence_threshold)

        loss_x = F.cross_entropy(batch.logits_labeled, batch.labels)
        loss_u = masked_cross_entropy(logits=logits_strong, targets=pseudo_labels, mask=mask)
        return SSLLoss(
            loss=loss_x + settings.lambda_u * loss_u,
            terms={"loss_x": loss_x, "loss_u": loss_u},
            pseudo_labels=pseudo_labels,
            confidences=confidences,
            mask=mask,
        )

    @torch.no_grad()
    def _update(self, index: Tensor, pseudo_labels: Tensor, confident: Tensor) -> None:
        """Gives the confident images `[U]` of all processes their new status."""
        index, pseudo_labels, confident = all_gather(torch.stack([index, pseudo_labels, confident.long()], 1)).unbind(1)
        # Sorted by image, then confident ones last, then by position: the last of an image's rows decides.
        position = torch.arange(len(index), device=index.device)
        order = ((index * 2 + confident) * len(index) + position).argsort()
        index, pseudo_labels, confident = index[order], pseudo_labels[order], confident[order]
        decides = confident.bool()
        decides[:-1] &= index[1:] != index[:-1]

        before = self.status[index].long()
        after = torch.where(decides, pseudo_labels, before)
        # Differences are added, since rows that do not decide may name the same image: they add zero.
        self.status.index_add_(0, index, (after - before).to(self.status.dtype))
        self.counts.index_add_(0, before, -torch.ones_like(before)).index_add_(0, after, torch.ones_like(after))
