"""What a run knows of itself: settings, splits, results with provenance, predictions. The card is made from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from operator import index
from typing import Any, Literal, NamedTuple

import numpy as np

Section = Literal["classes", "pseudo labels", "ood"]
_PSEUDO: Section = "pseudo labels"


class Metric(NamedTuple):
    """A metric's name in the Hub's metadata, its name for readers, the section of the card, and its direction."""

    hub_name: str
    words: str
    section: Section = "classes"
    greater_is_better: bool = True


# By the names of `ccssl_hf.metrics`. A name may carry the confidence threshold, as in `precision@0.95`.
METRICS = {
    "top1": Metric("accuracy", "Top-1 accuracy"),
    "top5": Metric("top_5_accuracy", "Top-5 accuracy"),
    "macro_f1": Metric("f1", "Macro F1"),
    "ece": Metric(
        "expected_calibration_error", "Expected calibration error (lower is better)", greater_is_better=False
    ),
    "precision": Metric("pseudo_label_precision", "Pseudo-label precision", _PSEUDO),
    "coverage": Metric("pseudo_label_coverage", "Pseudo-label coverage", _PSEUDO),
    "ood_share_passed": Metric(
        "pseudo_label_ood_share_passed", "Share of OOD images above the threshold", _PSEUDO, False
    ),
    "mask_rate": Metric("mask_rate", "Mask rate (training)", _PSEUDO),
    "training_precision": Metric("pseudo_label_training_precision", "Pseudo-label precision (training)", _PSEUDO),
    "auroc": Metric("roc_auc", "OOD AUROC (confidence)", "ood"),
    "auroc_open_set": Metric("roc_auc_open_set", "OOD AUROC (open-set score)", "ood"),
}
DIRECTIONS = {"loss": False, **{name: metric.greater_is_better for name, metric in METRICS.items()}}
"""Whether a higher value of a metric is better."""


def greater_is_better(name: str) -> bool | None:
    """Whether higher values of a metric are better; None if it is not in `DIRECTIONS`.

    The name may start with `eval_` and the name of a split, and end with a threshold: `eval_near_precision@0.95`.
    """
    plain = name.partition("@")[0]
    found = [known for known in DIRECTIONS if plain == known or plain.endswith(f"_{known}")]
    return DIRECTIONS[max(found, key=len)] if found else None


IMAGES = "images"
"""Folder of a card's pictures, beside the card."""

PICTURES = CURVES, CONFUSION_MATRIX, RELIABILITY, CONFIDENCE, EMBEDDINGS = tuple(
    f"{IMAGES}/{name}.png" for name in ("curves", "confusion_matrix", "reliability", "confidence", "embeddings")
)
PUBLISHED = "published weights"  # the provenance of weights whose run is unknown


@dataclass(frozen=True)
class Provenance:
    """The weights that a number or a picture belongs to. Raises a ValueError if a word is none of these."""

    weights: str  # "EMA" or "raw", in any case
    step: int  # optimizer steps that these weights were trained for
    which: str  # "last" or "best": how the step was chosen
    seed: int

    def __post_init__(self) -> None:
        weights = {"ema": "EMA", "raw": "raw"}.get(self.weights.lower())
        if weights is None or self.which not in ("last", "best"):
            raise ValueError(f"Provenance {self.weights!r}, {self.which!r}: use 'EMA' or 'raw', and 'last' or 'best'.")
        object.__setattr__(self, "weights", weights)
        for name in ("step", "seed"):  # raises TypeError: cards that were read can hold anything
            object.__setattr__(self, name, index(getattr(self, name)))

    def __str__(self) -> str:
        return f"{self.weights} weights, {self.which} step {self.step}, seed {self.seed}"


@dataclass(frozen=True)
class Result:
    """A measured number with its metric, split and provenance."""

    metric: str  # a name of METRICS, or any other
    value: float  # in [0, 1]
    split: str
    provenance: Provenance | None = None  # None: the run is unknown

    def _described(self) -> tuple[Metric, str]:
        name, _, threshold = self.metric.partition("@")
        return METRICS.get(name, Metric(name, name)), threshold

    @property
    def name(self) -> str:
        """The metric's name for readers, with its threshold."""
        metric, threshold = self._described()
        return f"{metric.words} (threshold {threshold})" if threshold else metric.words

    @property
    def hub_name(self) -> str:
        """The metric's name in the Hub's metadata, with its threshold."""
        metric, threshold = self._described()
        return f"{metric.hub_name}@{threshold}" if threshold else metric.hub_name

    @property
    def section(self) -> Section:
        """The section of the card that shows it."""
        return self._described()[0].section


@dataclass(frozen=True)
class SplitPredictions:
    """A model's outputs on a labeled split: logits float32 `[N, C]`, labels `[N]` (-1: OOD), embeddings `[N, D]`."""

    split: str
    provenance: Provenance | None
    logits: np.ndarray
    labels: np.ndarray
    embeddings: np.ndarray | None = None

    @property
    def in_distribution(self) -> np.ndarray:
        """Whether each image is in-distribution, bool `[N]`."""
        return self.labels >= 0

    def __str__(self) -> str:
        return f"{self.split} split, {self.provenance or PUBLISHED}"


@dataclass(frozen=True)
class Split:
    """The data of a split: a Hub id or path, the number of images, a fingerprint (`data.fingerprint`), and what
    `survey.survey` found in it.
    """

    data: str
    images: int | None = None
    fingerprint: str | None = None
    classes: int | None = None  # of the model, that have images
    fewest: int | None = None  # images of one class
    fewest_class: str | None = None
    most: int | None = None
    most_class: str | None = None
    ood_images: int | None = None  # with a label that is no class, or without one
    in_training: int | None = None  # that a training split has, too
    small: int | None = None  # with a side below half of the training size
    unreadable: int | None = None
    skipped: int | None = None  # files that are no images


@dataclass
class RunRecord:
    """What a run knows of itself. The card leaves out what is empty or None."""

    backbone: str  # timm name
    class_names: Sequence[str]
    algorithm: str | None = None  # None: nothing is known about the training
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)  # lambda_contrast above 0 means CCSSL
    optimization: Mapping[str, Any] = field(default_factory=dict)  # all other settings that affect the weights
    views: Mapping[str, Any] = field(default_factory=dict)
    splits: Mapping[str, Split] = field(default_factory=dict)  # by name: labeled, unlabeled, validation, test
    labeled_per_class: Mapping[str, int] = field(default_factory=dict)
    unreadable: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # by split: reasons by image, replaced
    base_model: str | None = None  # Hub id or timm name of the initial weights; None: random weights
    steps: int | None = None
    batch_size: int | None = None  # labeled images in each step, over all processes
    mu: int | None = None  # None: the algorithm uses no unlabeled images
    seed: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    device: str | None = None
    num_processes: int = 1
    run_time: float | None = None  # seconds
    history: Sequence[Mapping[str, Any]] = ()  # `trainer.state.log_history`
    provenance: Provenance | None = None  # of the published weights; None: the run is unknown
    results: Sequence[Result] = ()
    predictions: Sequence[SplitPredictions] = ()


def library_versions() -> dict[str, str]:
    """Versions of the libraries that a run depends on."""
    versions = {}
    for name in (
        "ccssl_hf",
        "torch",
        "torchvision",
        "timm",
        "transformers",
        "datasets",
        "accelerate",
        "huggingface_hub",
    ):
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def duration(seconds: float) -> str:
    """Seconds as text, such as `1 h 6 min`; days alone from two days on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours / 24:,.0f} days"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
