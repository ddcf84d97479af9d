"""Datasets: check splits, read labels and class names, and read batches of labeled and unlabeled images."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .errors import near_misses
from .images import ImageFiles, PixelTable, decode_image, encoded_images
from .sampling import LABELED, UNLABELED, PairedIndices
from .transforms import View, ViewSettings

OUT_OF_DISTRIBUTION = -1
"""The label of an out-of-distribution (OOD) image, which shows none of the classes of the model."""

_TEXT = ("string", "large_string")


FINGERPRINTED_IMAGES = 1024
"""Number of images that a fingerprint reads: all of a small split, and about a second of reading of a large one."""


def fingerprint(dataset: datasets.Dataset, image_column: str, labels: Sequence[str] = ()) -> str:
    """A hash of the content of a split, 16 hexadecimal digits, independent of machine and file format.

    It is the start of a SHA-256 over the number of rows, `labels` (the class name of each row, if any), and up to
    `FINGERPRINTED_IMAGES` encoded images, evenly spread over the rows. For a PNG it hashes the pixels, because releases
    of Pillow encode an image differently. `dataset` must pass `check_images`.
    """
    digest = hashlib.sha256(json.dumps([len(dataset), list(labels)]).encode())
    images = encoded_images(dataset, image_column)
    for row in np.unique(np.linspace(0, len(dataset) - 1, FINGERPRINTED_IMAGES).round().astype(int)).tolist():
        encoded = images[row][image_column]
        content = encoded["bytes"] if encoded["bytes"] is not None else Path(encoded["path"]).read_bytes()
        if content.startswith(b"\x89PNG"):
            image = Image.open(io.BytesIO(content))
            content = repr((image.mode, image.size, image.getpalette())).encode() + image.tobytes()
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()[:16]


def name_of(dataset: datasets.Dataset) -> str:
    """The name of a dataset on a card if only the object is known. It is a phrase, not a Hub id."""
    return f"{dataset.info.dataset_name or dataset.info.builder_name or 'in-memory'} dataset"


def check_images(dataset: Any, *, role: str, image_column: str) -> None:
    """Raise a ValueError unless `dataset` is a non-empty map-style dataset with an image column."""
    if isinstance(dataset, (datasets.IterableDataset, datasets.IterableDatasetDict)):
        raise ValueError(f"The {role} split is streamed and cannot resume exactly: load it with streaming=False.")
    if isinstance(dataset, dict):
        raise ValueError(f"The {role} split is a dictionary of splits ({', '.join(dataset)}): pass one of them.")
    if not isinstance(dataset, datasets.Dataset):
        raise ValueError(f"The {role} split is a {type(dataset).__name__}: pass a datasets.Dataset.")
    if len(dataset) == 0:
        raise ValueError(f"The {role} split is empty: pass a split that holds at least one image.")
    feature = _feature(dataset, image_column, role=role, argument="image_column")
    if not isinstance(feature, datasets.Image):
        problem = f"Column {image_column!r} of the {role} split holds {feature}, not images"
        cast = f"cast_column({image_column!r}, datasets.Image())"
        raise ValueError(f"{problem}: choose another image_column, or cast it with {cast}.")


def _feature(dataset: datasets.Dataset, column: str, *, role: str, argument: str) -> Any:
    names = dataset.column_names
    if column not in names:
        fix = f"set {argument}.{near_misses(column, names)}"
        raise ValueError(f"The {role} split has no column {column!r} (it has {', '.join(names)}): {fix}")
    return dataset.features[column]


def read_labels(
    dataset: datasets.Dataset, column: str, class_names: Sequence[str], *, role: str, allow_ood: bool
) -> np.ndarray:
    """Labels as indices into `class_names`, int64 `[N]`.

    Named labels (a ClassLabel or strings) are aligned by name, so splits may lack classes or have another order of
    classes. With `allow_ood`, -1 and names that are not in `class_names` become `OUT_OF_DISTRIBUTION`.

    Raises:
        ValueError: The column is missing or has no labels, or there are labels outside the classes. With `allow_ood`,
            also if no label is a class and some are names: these are probably misspelt.
    """
    argument = "hidden_label_column" if role == "unlabeled" else "label_column"
    feature = _feature(dataset, column, role=role, argument=argument)
    kind, values = str(getattr(feature, "dtype", "")), dataset.data.column(column)
    if isinstance(feature, datasets.ClassLabel):
        names, numbers = feature.names, values
    elif kind in _TEXT:
        encoded = values.combine_chunks().dictionary_encode()
        names, numbers = encoded.dictionary.to_pylist(), encoded.indices
    elif kind.startswith(("int", "uint")):
        names, numbers = class_names, values
    else:
        raise ValueError(f"Column {column!r} of the {role} split holds {feature}, not labels: set {argument}.")

    numbers = numbers.cast("int64").fill_null(OUT_OF_DISTRIBUTION).to_numpy(zero_copy_only=False)
    if dataset._indices is not None:  # shuffled or selected; `datasets` would read the rows one by one
        numbers = numbers[dataset._indices.column(0).to_numpy()]
    position = {name: index for index, name in enumerate(class_names)}
    meaning = np.array([*(position.get(name, OUT_OF_DISTRIBUTION) for name in names), OUT_OF_DISTRIBUTION], np.int64)
    labels = meaning.take(numbers, mode="clip")  # numbers beyond the names take the last one
    labels[numbers < 0] = OUT_OF_DISTRIBUTION
    wrong = (numbers < OUT_OF_DISTRIBUTION) | (numbers >= len(names)) if allow_ood else labels == OUT_OF_DISTRIBUTION
    if (labels == OUT_OF_DISTRIBUTION).all():  # misspelt names, or another dataset
        wrong = wrong | (numbers != OUT_OF_DISTRIBUTION)
    if wrong.any():
        stray = [names[n] if 0 <= n < len(names) else str(n) for n in np.unique(numbers[wrong])]
        raise ValueError(
            f"{int(wrong.sum())} labels of the {role} split are not among the {len(class_names)} classes "
            f"({', '.join(stray[:5])}{', ...' if len(stray) > 5 else ''}): drop those rows, or build the model with "
            f"their classes in labels=[...].{near_misses(stray[0], class_names)}"
        )
    return labels


def read_class_names(dataset: datasets.Dataset, column: str) -> list[str]:
    """The classes of the labeled split: the names of a ClassLabel, or the sorted distinct strings of a text column.

    Raises:
        ValueError: The column is missing, has numbers without names, or names fewer than two classes.
    """
    feature = _feature(dataset, column, role="labeled", argument="label_column")
    if isinstance(feature, datasets.ClassLabel):
        names = list(feature.names)
    elif getattr(feature, "dtype", "") in _TEXT:
        names = sorted(name for name in dataset.unique(column) if name is not None)
    else:
        raise ValueError(
            f"Column {column!r} of the labeled split holds {feature} without class names: cast it with "
            f"cast_column({column!r}, datasets.ClassLabel(names=[...]))."
        )
    if len(names) < 2:
        raise ValueError(f"The labeled split has one class only ({', '.join(names)}): label images of two or more.")
    return names


def drop_unreadable(dataset: datasets.Dataset, image_column: str = "image") -> datasets.Dataset:
    """The rows of `dataset` whose images can be decoded. Reads every image once, with a progress bar."""
    images, kept = encoded_images(dataset, image_column), []
    for row in datasets.utils.tqdm(range(len(images)), desc="Checking images"):
        with suppress(ValueError):
            decode_image(images[row][image_column], row, "")
            kept.append(row)
    return dataset.select(kept)


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Raise a ValueError unless files can be written to `folder`. Creates it if it does not exist."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        problem = f"The folder {folder} cannot be written to ({error.strerror})"
        raise ValueError(f"{problem}: choose another folder.") from error


def default_workers(device: torch.device) -> int:
    """Number of processes that decode images for a model on `device`: 0 on a CPU, which the model itself needs."""
    if device.type == "cpu":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


class PairedDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Batches of labeled and unlabeled images, indexed by a `PairedIndices`.

    A batch has `labeled_images`, `labels [B]` and `labeled_draws [B]`. With unlabeled data it also has
    `unlabeled_images`, `unlabeled_draws [U]`, `unlabeled_index [U]` and, if they are known, `hidden_labels [U]`. Images
    are uint8 `[n, 3, S, S]`, or `[n, views, 3, S, S]` if each view has its own crop.

    `views` are those of an unlabeled image; a labeled one has the weak view. `decode` is `memory` or `stream`. The
    datasets must pass `check_images`, and labels come from `read_labels`. Hidden labels only measure pseudo labels.
    """

    def __init__(
        self,
        labeled: datasets.Dataset,
        labels: np.ndarray,
        unlabeled: datasets.Dataset | None,
        *,
        hidden_labels: np.ndarray | None,
        image_column: str,
        views: Sequence[View],
        settings: ViewSettings,
        seed: int,
        decode: str,
    ) -> None:
        self.labels, self.hidden_labels, self.views = torch.from_numpy(labels), hidden_labels, tuple(views)

        def reader(dataset: datasets.Dataset, role: str, stream: int) -> PixelTable | ImageFiles:
            where: dict[str, Any] = {"image_column": image_column, "role": role}
            if decode == "memory":
                return PixelTable(dataset, size=settings.image_size, **where)
            return ImageFiles(dataset, settings=settings, seed=seed, stream=stream, **where)

        self.labeled = reader(labeled, "labeled", LABELED)
        self.unlabeled = None if unlabeled is None else reader(unlabeled, "unlabeled", UNLABELED)

    def __len__(self) -> int:
        return len(self.labeled) + (0 if self.unlabeled is None else len(self.unlabeled))

    def _read(self, images: PixelTable | ImageFiles, index: np.ndarray, draw: np.ndarray, *views: View) -> Tensor:
        return images.read(index) if isinstance(images, PixelTable) else images.read(index, draw, views)

    def __getitems__(self, batch: PairedIndices) -> dict[str, Any]:
        """One batch. The DataLoader calls this method instead of `__getitem__`, once per batch."""
        out: dict[str, Any] = {
            "labeled_images": self._read(self.labeled, batch.labeled_index, batch.labeled_draw, View.WEAK),
            "labels": self.labels[batch.labeled_index],
            # Draws stay numpy arrays on the CPU, where random numbers are made. An accelerator does not wait for them.
            "labeled_draws": batch.labeled_draw,
        }
        if self.unlabeled is not None:
            index, draw = batch.unlabeled_index, batch.unlabeled_draw
            out["unlabeled_images"] = self._read(self.unlabeled, index, draw, *self.views)
            out["unlabeled_draws"], out["unlabeled_index"] = draw, torch.from_numpy(index)
            if self.hidden_labels is not None:
                out["hidden_labels"] = torch.from_numpy(self.hidden_labels[index])
        return out


class EvaluationDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows of an evaluation split, with the transform of the published model's image processor."""

    def __init__(
        self, dataset: datasets.Dataset, labels: np.ndarray | None, *, image_column: str, transform: Any, role: str
    ) -> None:
        self._dataset = encoded_images(dataset, image_column)
        self._column, self._labels, self._transform, self._role = image_column, labels, transform, role

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, row: int) -> dict[str, Any]:
        item = {"pixel_values": self._transform(decode_image(self._dataset[row][self._column], row, self._role))}
        return item if self._labels is None else {**item, "labels": int(self._labels[row])}
