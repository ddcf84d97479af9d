"""Metrics of a published model on labeled images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from ..data import check_images, read_labels
from ..data.images import MAX_PIXELS
from ..data.sources import load_split, skipped
from ..data.survey import SplitSurvey, count_labels
from ..metrics import classification_metrics
from ..record import Provenance, Result, SplitPredictions
from .predict import Classifier, predict_all


def split_name(source: str) -> str:
    """The name of a split from its source: the folder, the file without its number or pattern, or the Hub's split."""
    path = Path(source).expanduser()
    if path.suffix == "" and not path.is_dir():
        return source.partition(":")[2] or "test"
    name = path.resolve().name if path.is_dir() else path.stem
    return re.sub(r"(-\d+-of-\d+|[-_.]*[*?\[].*)$", "", name) or path.parent.name or "test"


def load_labeled(source: str, split: str, image_root: str | None = None) -> datasets.Dataset:
    """`load_split` of any split with its labels. An unlabeled split would lose them."""
    return load_split(source, role="test" if split in ("labeled", "unlabeled") else split, image_root=image_root)


def evaluate(
    classifier: Classifier,
    dataset: datasets.Dataset,
    split: str,
    *,
    provenance: Provenance | None = None,
    image_column: str = "image",
    label_column: str = "label",
    batch_size: int | None = None,
    num_workers: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> tuple[list[Result], SplitPredictions]:
    """Measure what `CCSSLTrainer.evaluate` measures, except for metrics that need training-only heads.

    Labels are aligned by name. A label that is not a class of the model, and -1, marks an out-of-distribution (OOD)
    image. Load the classifier with `fold=False` if every digit counts. For `batch_size`, `num_workers` and `max_pixels`
    see `predict.predict_to_file`.

    Raises:
        ValueError: Images cannot be read, which it names all, or the columns or labels do not fit.
    """
    check_images(dataset, role=split, image_column=image_column)
    labels = read_labels(dataset, label_column, classifier.labels, role=split, allow_ood=True)
    options: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers, "max_pixels": max_pixels}
    found = predict_all(classifier, dataset, image_column=image_column, role=split, **options)
    logits = found.logits.numpy()
    results = [Result(name, value, split, provenance) for name, value in classification_metrics(logits, labels).items()]
    return results, SplitPredictions(split, provenance, logits, labels, found.embeddings.numpy())


def look_at(
    dataset: datasets.Dataset, split: str, classes: Sequence[str], *, image_column: str, label_column: str
) -> SplitSurvey:
    """What a split holds of a model's classes. Opens no image. Raises ValueError if columns or labels do not fit."""
    check_images(dataset, role=split, image_column=image_column)
    labels = read_labels(dataset, label_column, classes, role=split, allow_ood=True)
    return SplitSurvey(len(dataset), *count_labels(dataset, label_column, labels, classes), skipped=skipped(dataset))
