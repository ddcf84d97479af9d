"""Metrics of a published model on labeled images."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import numpy as np

from ..data import check_images, load_split, read_labels
from ..metrics import classification_metrics
from ..record import Provenance, Result, SplitPredictions
from .predict import Classifier, predict_all


def load_labeled(source: str, split: str) -> datasets.Dataset:
    """A labeled split from an image folder (`<class>/<image>`), parquet files or the Hub.

    Args:
        source: What `data.load_split` takes.
        split: Its name; of a Hub data set, the split that is taken where `source` names none.

    Raises:
        ValueError: It can't be read.
    """
    role = "test" if split in ("labeled", "unlabeled") else split  # as these, other rules would hold
    try:
        return load_split(source, role=role)
    except ValueError as error:
        raise ValueError(str(error).removeprefix(f"--{role} ")) from error


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
    """What `CCSSLTrainer.evaluate` would measure of a published model, but for what takes heads of training.

    Args:
        classifier: The model, not folded where every digit counts.
        dataset: Labeled images. Labels are aligned by name; those that are no class of the model, and -1, are images of
            no known class.
        split: What the results call it.
        provenance: Which weights these are.
        image_column, label_column: Of `dataset`.
        batch_size, num_workers: As of `inference.predict_to_parquet`.

    Raises:
        ValueError: The data can't be measured on; the sentence names the fix.
    """
    check_images(dataset, role=split, image_column=image_column)
    labels = read_labels(dataset, label_column, classifier.labels, role=split, allow_ood=True)
    said = predict_all(classifier, dataset, image_column=image_column, batch_size=batch_size, num_workers=num_workers)
    logits = said.logits.numpy()
    results = [Result(name, value, split, provenance) for name, value in classification_metrics(logits, labels).items()]
    return results, SplitPredictions(split, provenance, logits, labels, said.embeddings.numpy())


def unknown_names(dataset: datasets.Dataset, label_column: str, classes: Sequence[str]) -> list[str]:
    """The names among the labels of a split that are no class of the model."""
    feature = dataset.features[label_column]
    if isinstance(feature, datasets.ClassLabel):
        names = [feature.names[number] for number in np.unique(dataset[label_column][:]) if number >= 0]
    elif str(feature.dtype).endswith("string"):
        names = [name for name in dataset.unique(label_column) if name is not None]
    else:
        names = []
    return sorted(set(names) - set(classes))
