"""What every algorithm takes and returns, and the contrastive loss that is composed on any of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..losses import class_aware_contrastive_loss, upcast
from ..transforms import View
from .hyperparameters import Hyperparameters


class Paper(NamedTuple):
    """What a citation needs. `name` is the method's, `key` BibTeX's, `arxiv` the number, such as "2001.07685"."""

    name: str
    key: str
    authors: str
    title: str
    venue: str
    year: int
    arxiv: str


CCSSL_PAPER = Paper(
    name="CCSSL",
    key="yang2022ccssl",
    authors="Yang, Fan and Wu, Kai and Zhang, Shuyi and Jiang, Guannan and Liu, Yong and Zheng, Feng and "
    "Zhang, Wei and Wang, Chengjie and Zeng, Long",
    title="Class-Aware Contrastive Semi-Supervised Learning",
    venue="Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition",
    year=2022,
    arxiv="2203.02261",
)


@dataclass
class SSLBatch:
    """What the network said about one batch.

    `B` labeled images, `U` = mu * B unlabeled, `C` classes, `D` projection size: logits `[B, C]` and `[U, C]`, `labels`
    `[B]`, embeddings `[B, D]` and `[U, D]`, `index` `[U]` (row numbers), `heads` by name (labeled, weak, strong view).
    Embeddings have unit norm; they are None where no projection head is asked for.
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
        """The named fields, none of them None.

        Raises:
            ValueError: One of them is None.
        """
        missing = [name for name in names if getattr(self, name) is None]
        if missing:
            raise ValueError(
                f"The algorithm reads {', '.join(missing)} of the SSLBatch: pass a tensor instead of None."
            )
        return tuple(getattr(self, name) for name in names)

    def upcast(self) -> SSLBatch:
        """The same batch with half precision brought to float32."""

        def up(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: tuple(map(up, parts)) for name, parts in value.items()}
            return upcast(value) if isinstance(value, Tensor) and value.is_floating_point() else value

        return replace(self, **{item.name: up(getattr(self, item.name)) for item in fields(self)})


@dataclass
class SSLLoss:
    """The loss, and what the algorithm thought of the unlabeled images.

    `terms` are scalars by name, before their weights and detached. `pseudo_labels`, `confidences` and `mask` are `[U]`;
    `mask` is 0/1, or a weight in [0, 1] for SoftMatch, and None where pseudo labels are no targets.
    """

    loss: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    pseudo_labels: Tensor | None = None
    confidences: Tensor | None = None
    mask: Tensor | None = None


class Algorithm(nn.Module):
    """A semi-supervised algorithm: batch in, loss out. Its state is buffers alone, so that a `state_dict` resumes it.

    A subclass declares its `paper`, its `hyperparameters_class`, its `terms`, what it reads of a batch, and `compute`.
    Facts of the run that it needs besides `num_classes`, of those in `algorithms.SIZES`, are arguments of its
    constructor.

    Attributes:
        paper: The paper that introduces it; None for the baseline.
        hyperparameters_class: The type of `settings`.
        terms: Names of the loss terms that `compute` returns.
        views: The views of an unlabeled image that it reads; () if it reads no unlabeled images. An instance with
            `lambda_contrast` above 0 reads all three.
        needs_embeddings: Whether it reads embeddings at all.
        needs_index: Whether it reads the row numbers of the unlabeled images.
        heads: Further heads for the model to carry and train: name → function from the number of features to a module.
        settings: Its hyperparameters, typed.
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
        if settings.lambda_contrast > 0:
            self.views, self.needs_embeddings = tuple(View), True

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The hyperparameters by name, defaults filled in."""
        return self.settings.as_dict()

    def compute(self, batch: SSLBatch) -> SSLLoss:
        """The algorithm's own loss, without the contrastive one. Floating point arrives as float32 or float64."""
        raise NotImplementedError

    def open_set_score(self, logits: Tensor, heads: Mapping[str, Tensor] | None = None) -> Tensor:
        """How much each image looks like one of the known classes, `[N]`, in [0, 1]: here, its confidence.

        Args:
            logits: `[N, C]`.
            heads: What the further heads say of the same images, by name, where the algorithm has any.
        """
        return predict(logits).amax(1)

    def forward(self, batch: SSLBatch) -> SSLLoss:
        """The loss of a batch. Running statistics are updated: call it once for each batch that is trained on.

        Raises:
            ValueError: The batch lacks something that the algorithm reads, or has another number of classes.
        """
        if batch.logits_labeled.shape[1:] != (self.num_classes,):
            got = list(batch.logits_labeled.shape)
            raise ValueError(f"logits_labeled must be [B, {self.num_classes}], as num_classes says; got {got}.")
        missing = self.heads.keys() - (batch.heads or {}).keys()
        if missing:
            raise ValueError(
                f"SSLBatch.heads lacks {', '.join(sorted(missing))}: give the model algorithm.heads, and pass "
                "what they say of each view."
            )
        views = batch.read("embeddings_strong", "embeddings_contrast") if self.settings.lambda_contrast > 0 else ()
        with torch.autocast(batch.logits_labeled.device.type, enabled=False):
            result = self.compute(batch.upcast())
            if views:
                loss_contrast = self._contrast(torch.stack(views, dim=1), result)
                result.loss = result.loss + self.settings.lambda_contrast * loss_contrast
                result.terms["loss_contrast"] = loss_contrast
        result.terms = {name: term.detach() for name, term in result.terms.items()}
        return result

    def _contrast(self, embeddings: Tensor, result: SSLLoss) -> Tensor:
        assert result.pseudo_labels is not None and result.confidences is not None, "compute must return pseudo labels"
        return class_aware_contrastive_loss(
            embeddings=embeddings,
            pseudo_labels=result.pseudo_labels,
            confidences=result.confidences,
            temperature=self.settings.contrast_temperature,
            push_threshold=self.settings.push_threshold,
            own_pair_weight=self.settings.own_pair_weight,
            gather=True,
        )


def predict(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Class probabilities `[N, C]`, sharpened by a temperature below 1, without gradient."""
    return (logits.detach() / temperature).softmax(dim=1)


def pseudo_label(probabilities: Tensor, threshold: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `probabilities` `[N, C]` say: confidences, pseudo labels, and a mask of 1 where the threshold is reached.

    Args:
        probabilities: `[N, C]`.
        threshold: One for all classes, or one for each, `[C]`.

    Returns:
        `[N]` each.
    """
    confidences, pseudo_labels = probabilities.max(1)
    if isinstance(threshold, Tensor):
        threshold = threshold[pseudo_labels]
    return confidences, pseudo_labels, (confidences >= threshold).to(confidences.dtype)
