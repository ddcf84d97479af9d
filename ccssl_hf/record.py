"""Numbers that say what they are: the metric, the split, and which weights of which run they were measured with.

A card keeps them in its metadata, as the Hub's model index; they are read back from there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from huggingface_hub import EvalResult

Section = Literal["known classes", "pseudo labels", "open set"]


class Metric(NamedTuple):
    """A metric as the Hub's metadata and as people call it, and the part of a card that it belongs to."""

    hub_name: str
    words: str
    section: Section = "known classes"


METRICS = {
    "top1": Metric("accuracy", "Top-1 accuracy"),
    "top5": Metric("top_5_accuracy", "Top-5 accuracy"),
    "macro_f1": Metric("f1", "Macro F1"),
    "ece": Metric("expected_calibration_error", "Expected calibration error (lower is better)"),
    "precision": Metric("pseudo_label_precision", "Precision of the pseudo labels that passed", "pseudo labels"),
    "coverage": Metric("pseudo_label_coverage", "Share of the unlabeled images that passed", "pseudo labels"),
    "ood_share_passed": Metric(
        "pseudo_label_ood_share_passed", "Share of the images of no known class that passed", "pseudo labels"
    ),
    "mask_rate": Metric("mask_rate", "Mask rate while training", "pseudo labels"),
    "training_precision": Metric(
        "pseudo_label_training_precision", "Precision of the pseudo labels trained on", "pseudo labels"
    ),
    "auroc": Metric("roc_auc", "AUROC, known classes against no known class", "open set"),
    "auroc_open_set": Metric("roc_auc_open_set", "AUROC of the same by the algorithm's open-set score", "open set"),
}
"""By the names of `ccssl_hf.metrics`. A name may carry the confidence that counts as passed, as in `precision@0.95`."""

_BY_HUB_NAME = {metric.hub_name: name for name, metric in METRICS.items()}


@dataclass(frozen=True)
class Provenance:
    """Which weights of which run a number or a picture belongs to.

    Args:
        weights: `EMA` or `raw` (in any case).
        step: Optimizer steps that these weights were trained for.
        which: `last` or `best`: how that step was chosen.
        seed: The run's seed.

    Raises:
        ValueError: If `weights` or `which` is something else.
    """

    weights: str
    step: int
    which: str
    seed: int

    def __post_init__(self) -> None:
        if self.weights.lower() not in ("ema", "raw"):
            raise ValueError(f"Provenance.weights is {self.weights!r}: say 'EMA' or 'raw'.")
        if self.which not in ("last", "best"):
            raise ValueError(f"Provenance.which is {self.which!r}: say 'last' or 'best'.")
        object.__setattr__(self, "weights", {"ema": "EMA", "raw": "raw"}[self.weights.lower()])

    def __str__(self) -> str:
        return f"{self.weights} weights, {self.which} step {self.step}, seed {self.seed}"

    @classmethod
    def parse(cls, text: str) -> Provenance | None:
        """The provenance that `text` names in the words of `str(provenance)`; None where it names none."""
        found = re.search(r"(EMA|raw) weights, (last|best) step (\d+), seed (\d+)", text)
        return cls(found[1], int(found[3]), found[2], int(found[4])) if found else None


PUBLISHED = "published weights"
"""What is said in place of an provenance where nothing is known of the run."""


@dataclass(frozen=True)
class Result:
    """One number, and all that it takes to know what it is.

    Args:
        metric: A name of `METRICS`, or any other.
        value: As a fraction in [0, 1].
        split: The split's name, such as `test`.
        provenance: The weights; None where the run is not known, as of weights that were downloaded.
    """

    metric: str
    value: float
    split: str
    provenance: Provenance | None = None

    @property
    def name(self) -> str:
        """The metric in words."""
        name, _, confidence = self.metric.partition("@")
        words = METRICS[name].words if name in METRICS else name
        return f"{words} (confidence {confidence} or more)" if confidence else words

    @property
    def section(self) -> Section:
        """The part of a card that it belongs to."""
        name = self.metric.partition("@")[0]
        return METRICS[name].section if name in METRICS else "known classes"

    def to_hub(self, dataset: str) -> EvalResult:
        """As the Hub's metadata has it, measured on `dataset`."""
        name, at, confidence = self.metric.partition("@")
        return EvalResult(
            task_type="image-classification",
            task_name="Image Classification",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=self.split,
            metric_type=(METRICS[name].hub_name if name in METRICS else name) + at + confidence,
            metric_name=f"{self.name} ({self.provenance or PUBLISHED})",
            metric_value=round(float(self.value), 6),
        )

    @classmethod
    def from_hub(cls, found: EvalResult) -> Result | None:
        """The inverse of `to_hub`; None of a result that was not written by it."""
        how = found.metric_name or ""
        provenance = Provenance.parse(how)
        if provenance is None and not how.endswith(f"({PUBLISHED})"):
            return None
        hub_name, at, confidence = found.metric_type.partition("@")
        metric = _BY_HUB_NAME.get(hub_name, hub_name) + at + confidence
        return cls(metric, found.metric_value, found.dataset_split or "", provenance)


def hub_results(results: Iterable[Result], dataset_of_split: dict[str, str]) -> list[EvalResult]:
    """All results as the Hub's metadata has them; NaN and infinity, which it refuses, are left out."""
    finite = (result for result in results if math.isfinite(result.value))
    return [result.to_hub(dataset_of_split.get(result.split, "unknown")) for result in finite]


@dataclass(frozen=True)
class SplitPredictions:
    """What a model said of a labeled split of `N` images.

    Args:
        split: The split's name.
        provenance: The weights; None where the run is not known.
        logits: float32 `[N, C]`.
        labels: `[N]`, -1 for an image of no known class.
        embeddings: `[N, D]`, where they are to be drawn.
    """

    split: str
    provenance: Provenance | None
    logits: np.ndarray
    labels: np.ndarray
    embeddings: np.ndarray | None = None

    @property
    def known(self) -> np.ndarray:
        """Which images are of a known class, bool `[N]`."""
        return self.labels >= 0

    def __str__(self) -> str:
        return f"{self.split} split, {self.provenance or PUBLISHED}"
