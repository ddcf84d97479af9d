"""The interface of all algorithms, and the contrastive loss that can be added to each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..losses import class_aware_contrastive_loss, upcast
from ..transforms import View
from .hyperparameters import Hyperparameters
from .state import DistributionAlignment


class Paper(NamedTuple):
    """A citation: `name` of the method, `authors` as in BibTeX, `arxiv` number such as "2001.07685"."""

    name: str
    authors: str
    title: str
    venue: str
    year: int
    arxiv: str

    @property
    def key(self) -> str:
        """The BibTeX key, such as sohn2020fixmatch."""
        return f"{self.authors.partition(',')[0]}{self.year}{self.name}".lower()


CCSSL_PAPER = Paper(
    name="CCSSL",
    authors="Yang, Fan and Wu, Kai and Zhang, Shuyi and Jiang, Guannan and Liu, Yong and Zheng, Feng and "
    "Zhang, Wei and Wang, Chengjie and Zeng, Long",
    title="Class-Aware Contrastive Semi-Supervised Learning",
    venue="Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition",
    year=2022,
    arxiv="2203.02261",
)


@dataclass
class SSLBatch:
    """The network's outputs for one batch.

    `B` labeled images, `U` = mu * B unlabeled images, `C` classes, `D` projection size: logits `[B, C]` and `[U, C]`,
    `labels` `[B]`, embeddings `[B, D]` and `[U, D]` of unit norm, `index` `[U]` (rows of the unlabeled split), `heads`
    by name (outputs for the labeled, weak and strong view). A part that the algorithm does not read may be None.
    """

    logits_labeled: Tensor
    labels: Tensor
    logits_weak: Tensor | None = None
    logits_strong: Tensor | None = None
    embeddings_labeled: Tensor | None = None
    embeddings_weak: Tensor | None = None
    embeddings_strong: Tensor | None = None
    embeddings_contrast: Tensor | None = None
    index: Tensor | None = None
    heads: dict[str, tuple[Tensor, Tensor, Tensor]] | None = None

    def read(self, *names: str) -> tuple[Tensor, ...]:
        """Returns the named fields. Raises a `ValueError` if one is None."""
        missing = [name for name in names if getattr(self, name) is None]
        if missing:
            raise ValueError(f"The algorithm reads {', '.join(missing)} of the SSLBatch, which must not be None.")
        return tuple(getattr(self, name) for name in names)

    def upcast(self) -> SSLBatch:
        """Returns the same batch with half precision converted to float32."""
        return SSLBatch(**tree_map_only(Tensor, upcast, vars(self)))


class PseudoLabels(NamedTuple):
    """Pseudo labels, confidences and mask of the unlabeled images, `[U]` each.

    The mask is 0/1 (for SoftMatch a weight in [0, 1]), and None if pseudo labels are not used as targets.
    """

    labels: Tensor
    confidences: Tensor
    mask: Tensor = None  # type: ignore[assignment]  # None for the baseline only


@dataclass
class SSLLoss:
    """The loss of one batch; its terms by name, detached and without weights; and what `PseudoLabels` holds."""

    loss: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    pseudo_labels: Tensor | None = None
    confidences: Tensor | None = None
    mask: Tensor | None = None


class Algorithm(nn.Module):
    """A semi-supervised algorithm: an `SSLBatch` in, an `SSLLoss` out. All of its state is buffers.

    A subclass declares the class attributes below and implements `compute`. If it needs `num_unlabeled`,
    `embedding_dim`, `batch_size` or `mu`, its constructor takes them by name.

    Attributes:
        paper: The paper that introduces the algorithm; None for the baseline.
        hyperparameters_class: The type of `settings`.
        terms: Names of the loss terms, including `loss_x`.
        views: The views of an unlabeled image that the algorithm reads; () if it reads no unlabeled images. An instance
            with `lambda_contrast` above 0 reads all three.
        needs_embeddings: Whether it reads embeddings.
        needs_index: Whether it reads `SSLBatch.index`.
        heads: Further heads that the model trains: name → function from the number of features to a module.
        settings: The hyperparameters.
        alignment: Distribution alignment if `settings` has a `distribution_alignment_window`; otherwise the identity.
    """

    paper: ClassVar[Paper | None] = None
    hyperparameters_class: ClassVar[type[Hyperparameters]] = Hyperparameters
    terms: ClassVar[tuple[str, ...]] = ()
    views: tuple[View, ...] = (View.WEAK, View.STRONG)
    needs_embeddings: bool = False
    needs_index: bool = False
    settings: Hyperparameters

    def __init__(self, settings: Hyperparameters, *, num_classes: int) -> None:
        super().__init__()
        self.settings = settings
        self.num_classes = num_classes
        self.heads: dict[str, Callable[[int], nn.Module]] = {}
        window = getattr(settings, "distribution_alignment_window", None)
        self.alignment = DistributionAlignment(num_classes, window) if window else nn.Identity()
        if settings.lambda_contrast > 0:
            self.views, self.needs_embeddings = tuple(View), True

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The hyperparameters by name, including defaults."""
        return asdict(self.settings)

    def compute(self, batch: SSLBatch) -> tuple[PseudoLabels | None, dict[str, Tensor]]:
        """Returns the pseudo labels, None without unlabeled images, and the loss terms besides `loss_x`.

        The loss is cross-entropy on the labeled images (`loss_x`) plus each `loss_NAME` times the hyperparameter
        `lambda_NAME`. Floating-point tensors of `batch` are float32 or float64. Running statistics are updated here.
        """
        raise NotImplementedError

    def open_set_score(self, logits: Tensor, heads: Mapping[str, Tensor] | None = None) -> Tensor:
        """Scores how likely each image is in-distribution, `[N]`, in [0, 1]: by default the confidence."""
        return predict(logits).amax(1)

    def forward(self, batch: SSLBatch) -> SSLLoss:
        """Returns the loss of a batch. It updates running statistics: call it once for each training batch.

        Raises a `ValueError` if the batch lacks a part that the algorithm reads, or has another number of classes.
        """
        if batch.logits_labeled.shape[1:] != (self.num_classes,):
            shape = f"[B, num_classes] = [B, {self.num_classes}]"
            raise ValueError(f"logits_labeled must be {shape}; got {list(batch.logits_labeled.shape)}.")
        missing = ", ".join(sorted(self.heads.keys() - (batch.heads or {}).keys()))
        if missing:
            raise ValueError(f"SSLBatch.heads lacks {missing}: add algorithm.heads to the model, pass the outputs.")
        views = batch.read("embeddings_strong", "embeddings_contrast") if self.settings.lambda_contrast > 0 else ()
        with torch.autocast(batch.logits_labeled.device.type, enabled=False):
            batch = batch.upcast()
            loss = F.cross_entropy(batch.logits_labeled, batch.labels)
            pseudo, others = self.compute(batch)
            if views:
                assert pseudo is not None, "compute must return pseudo labels"
                others["loss_contrast"] = class_aware_contrastive_loss(
                    embeddings=torch.stack(views, dim=1),
                    pseudo_labels=pseudo.labels,
                    confidences=pseudo.confidences,
                    temperature=self.settings.contrast_temperature,
                    push_threshold=self.settings.push_threshold,
                    own_pair_weight=self.settings.own_pair_weight,
                    gather=True,
                )
            terms = {name: term.detach() for name, term in {"loss_x": loss, **others}.items()}
            for name, term in others.items():
                loss = loss + getattr(self.settings, f"lambda_{name.removeprefix('loss_')}") * term
        return SSLLoss(loss, terms, *(pseudo or ()))


def predict(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Returns class probabilities `[N, C]` without gradient; a temperature below 1 sharpens them."""
    return (logits.detach() / temperature).softmax(dim=1)


def pseudo_label(probabilities: Tensor, threshold: float | Tensor) -> PseudoLabels:
    """Takes the most probable class of each row of `[N, C]`; the mask is 1 if its probability reaches the threshold.

    The threshold is the same for all classes, or one for each class, `[C]`.
    """
    confidences, labels = probabilities.max(1)
    threshold = threshold[labels] if isinstance(threshold, Tensor) else threshold
    return PseudoLabels(labels, confidences, (confidences >= threshold).to(confidences.dtype))
