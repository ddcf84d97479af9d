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
from typing import Any, Literal

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .errors import near_misses
from .images import (
    MAX_PIXELS,
    check_local,
    decode_image,
    encoded_images,
    unreadable,
)
from .pixels import Found, ImageFiles, PixelTable
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
    of Pillow encode an image differently. A file that cannot be read counts as empty. `dataset` must pass
    `check_images`.
    """
    digest = hashlib.sha256(json.dumps([len(dataset), list(labels)]).encode())
    images = encoded_images(dataset, image_column)
    for row in np.unique(np.linspace(0, len(dataset) - 1, FINGERPRINTED_IMAGES).round().astype(int)).tolist():
        content = _content(images[row][image_column])
        if content.startswith(b"\x89PNG"):
            with suppress(Exception):  # a damaged PNG is hashed as it is; Pillow raises nearly any type of error
                image = Image.open(io.BytesIO(content))
                if image.width * image.height <= MAX_PIXELS:
                    content = repr((image.mode, image.size, image.getpalette())).encode() + image.tobytes()
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()[:16]


def _content(encoded: dict[str, Any] | None) -> bytes:
    content, path = (encoded or {}).get("bytes"), (encoded or {}).get("path")
    if content is None and path is not None:
        with suppress(OSError, ValueError):
            check_local(path)
            content = Path(path).read_bytes()
    return content or b""


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


def drop_unreadable(
    dataset: datasets.Dataset, image_column: str = "image", *, max_pixels: int = MAX_PIXELS
) -> datasets.Dataset:
    """The rows of `dataset` whose images can be decoded. Reads every image once, with a progress bar."""
    bad = [row for row, _, _ in unreadable(dataset, image_column, max_pixels=max_pixels)]
    return dataset.select(np.setdiff1d(np.arange(len(dataset)), bad))


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Raise a ValueError unless files can be written to `folder`. Creates it if it does not exist."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        problem = f"output_dir {folder} cannot be written to ({error.strerror})"
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

    An image that cannot be read raises a ValueError that names it. With `on_bad_image="skip"`, an unlabeled one is
    replaced by another, a function of the seed and the draw (`pixels.first_readable`), with its index and hidden label.
    What was not readable is in `unreadable` if the images are in memory, otherwise in the batch under this name.
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
        max_pixels: int = MAX_PIXELS,
        on_bad_image: Literal["skip", "stop"] = "stop",
    ) -> None:
        self.labels, self.hidden_labels, self.views = torch.from_numpy(labels), hidden_labels, tuple(views)
        self._seed, self._skip = seed, on_bad_image == "skip"

        def reader(dataset: datasets.Dataset, role: str, stream: int) -> PixelTable | ImageFiles:
            where: dict[str, Any] = {"image_column": image_column, "role": role, "max_pixels": max_pixels}
            if decode == "memory":
                on_bad = "stop" if stream == LABELED else on_bad_image
                return PixelTable(dataset, size=settings.image_size, on_bad_image=on_bad, **where)
            return ImageFiles(dataset, settings=settings, seed=seed, stream=stream, **where)

        self.labeled = reader(labeled, "labeled", LABELED)
        self.unlabeled = None if unlabeled is None else reader(unlabeled, "unlabeled", UNLABELED)
        self.unreadable: Found = list(getattr(self.unlabeled, "errors", {}).items())

    def __len__(self) -> int:
        return len(self.labeled) + (0 if self.unlabeled is None else len(self.unlabeled))

    def _read(
        self, images: PixelTable | ImageFiles, index: np.ndarray, draw: np.ndarray, views: Sequence[View], found: Any
    ) -> Tensor:
        if isinstance(images, ImageFiles):
            return images.read(index, draw, views, found)
        if found is not None:
            images.replace(index, draw, seed=self._seed, stream=UNLABELED)
        return images.read(index)

    def __getitems__(self, batch: PairedIndices) -> dict[str, Any]:
        """One batch. The DataLoader calls this method instead of `__getitem__`, once per batch."""
        index, draw = batch.labeled_index, batch.labeled_draw
        out: dict[str, Any] = {
            "labeled_images": self._read(self.labeled, index, draw, (View.WEAK,), None),
            "labels": self.labels[index],
            # Draws stay numpy arrays on the CPU, where random numbers are made. An accelerator does not wait for them.
            "labeled_draws": draw,
        }
        if self.unlabeled is not None:
            index, draw = batch.unlabeled_index.copy(), batch.unlabeled_draw
            found: Found | None = [] if self._skip else None
            out["unlabeled_images"] = self._read(self.unlabeled, index, draw, self.views, found)
            if found:
                out["unreadable"] = found
            out["unlabeled_draws"], out["unlabeled_index"] = draw, torch.from_numpy(index)
            if self.hidden_labels is not None:
                out["hidden_labels"] = torch.from_numpy(self.hidden_labels[index])
        return out


class EvaluationDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows of an evaluation split, with the transform of the published model's image processor."""

    def __init__(
        self,
        dataset: datasets.Dataset,
        labels: np.ndarray | None,
        *,
        image_column: str,
        transform: Any,
        role: str,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self._dataset, self._max_pixels = encoded_images(dataset, image_column), max_pixels
        self._column, self._labels, self._transform, self._role = image_column, labels, transform, role

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, row: int) -> dict[str, Any]:
        encoded = self._dataset[row][self._column]
        image = decode_image(encoded, row, self._role, max_pixels=self._max_pixels)
        item = {"pixel_values": self._transform(image)}
        return item if self._labels is None else {**item, "labels": int(self._labels[row])}
