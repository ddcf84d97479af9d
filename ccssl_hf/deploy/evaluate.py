"""Metrics of a published model on labeled images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import datasets

from ..data import check_images, read_labels
from ..metrics import classification_metrics
from ..record import Provenance, Result, SplitPredictions
from ..sources import load_split
from .predict import Classifier, predict_all


def split_name(source: str) -> str:
    """The name of a split from its source: the folder, the file without its number or pattern, or the Hub's split."""
    path = Path(source).expanduser()
    if path.suffix == "" and not path.is_dir():
        return source.partition(":")[2] or "test"
    name = path.resolve().name if path.is_dir() else path.stem
    return re.sub(r"(-\d+-of-\d+|[-_.]*[*?\[].*)$", "", name) or path.parent.name or "test"


def load_labeled(source: str, split: str) -> datasets.Dataset:
    """`load_split` of any split with its labels. An unlabeled split would lose them."""
    return load_split(source, role="test" if split in ("labeled", "unlabeled") else split)


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
) -> tuple[list[Result], SplitPredictions]:
    """Measure what `CCSSLTrainer.evaluate` measures, except for metrics that need training-only heads.

    Labels are aligned by name. A label that is not a class of the model, and -1, marks an out-of-distribution (OOD)
    image. Load the classifier with `fold=False` if every digit counts. For `batch_size` and `num_workers` see
    `predict.predict_to_file`.

    Raises:
        ValueError: An image cannot be read, or the columns or labels do not fit.
    """
    check_images(dataset, role=split, image_column=image_column)
    labels = read_labels(dataset, label_column, classifier.labels, role=split, allow_ood=True)
    found = predict_all(classifier, dataset, image_column=image_column, batch_size=batch_size, num_workers=num_workers)
    logits = found.logits.numpy()
    results = [Result(name, value, split, provenance) for name, value in classification_metrics(logits, labels).items()]
    return results, SplitPredictions(split, provenance, logits, labels, found.embeddings.numpy())


def ood_names(dataset: datasets.Dataset, label_column: str, classes: Sequence[str]) -> list[str]:
    """The label names of a split that are not classes of the model, sorted."""
    feature, found = dataset.features[label_column], dataset.unique(label_column)
    if isinstance(feature, datasets.ClassLabel):
        found = [feature.names[number] for number in found if number is not None and number >= 0]
    return sorted(name for name in set(found) - set(classes) if isinstance(name, str))
