"""Datasets: check splits, read labels and class names, and read batches of labeled and unlabeled images."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import re
import tempfile
import unicodedata
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image
from torch import Tensor

from .errors import listed, near_misses, warn
from .images import MAX_PIXELS, check_local, decode_image, encoded_images, unreadable
from .pixels import Found, ImageFiles, PixelTable
from .sampling import LABELED, UNLABELED, PairedIndices
from .transforms import View, ViewSettings

logger = logging.getLogger(__name__)

OUT_OF_DISTRIBUTION = -1
"""The label of an out-of-distribution (OOD) image, which shows none of the classes of the model."""

_TEXT = ("string", "large_string")
_NULL = np.iinfo(np.int64).min  # the number of a row without a label

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


def _label_column(dataset: datasets.Dataset, column: str, role: str) -> tuple[list[str] | None, np.ndarray]:
    """The names of a label column, None for plain numbers, and the number of each row, int64 `[N]`.

    Null and blank names are `_NULL`. Floating-point numbers must be whole, as pandas writes integers beside nulls.
    """
    argument = "hidden_label_column" if role == "unlabeled" else "label_column"
    feature = _feature(dataset, column, role=role, argument=argument)
    names: list[str] | None = None
    kind, values = str(getattr(feature, "dtype", "")), dataset.data.column(column)
    if isinstance(feature, datasets.ClassLabel):
        names = feature.names
    elif kind in _TEXT:
        encoded = values.combine_chunks().dictionary_encode()
        names, values = encoded.dictionary.to_pylist(), encoded.indices
    elif not kind.startswith(("int", "uint", "bool", "null")) and not _are_whole(values):
        several = " to a column with one label per image" if "List" in str(feature) else ""
        raise ValueError(f"Column {column!r} of the {role} split holds {feature}, not labels: set {argument}{several}.")
    if kind.startswith("float"):
        values = pc.if_else(pc.is_nan(values), None, values)
    numbers = values.cast("int64").fill_null(_NULL).to_numpy(zero_copy_only=False)
    if dataset._indices is not None:  # shuffled or selected; `datasets` would read the rows one by one
        numbers = numbers[dataset._indices.column(0).to_numpy()]
    if names is not None and (blank := [number for number, name in enumerate(names) if not name.strip()]):
        numbers = np.where(np.isin(numbers, blank), _NULL, numbers)
    return names, numbers


def _are_whole(values: pa.ChunkedArray) -> bool:
    """Whether all values are whole numbers of a floating-point type, NaN and null apart."""
    if not pa.types.is_floating(values.type):
        return False
    numbers = values.cast("float64").to_numpy()
    return bool(np.all((numbers == np.round(numbers)) & np.isfinite(numbers) | np.isnan(numbers)))


def _aligned_numbers(numbers: np.ndarray, class_names: Sequence[str], where: str) -> tuple[list[str], np.ndarray]:
    """Names and numbers of plain whole numbers: numbers are names where all classes are numbers, else positions."""
    values = np.unique(numbers[numbers >= 0])
    if all(re.fullmatch(r"\d+", name) for name in class_names):
        shifted = [[int(name) + step for name in class_names] for step in (-1, 1)]
        if len(class_names) > 1 and sorted(values) in map(sorted, shifted):
            first = min(map(int, class_names))
            problem = f"holds {values[0]} to {values[-1]}, and the classes are numbered from {first}"
            raise ValueError(f"{where} {problem}: number the labels of all splits alike.")
        return [str(value) for value in values], np.where(numbers >= 0, np.searchsorted(values, numbers), numbers)
    if len(values) and values[0] == 1 and values[-1] == len(class_names):
        fix = "subtract 1, or replace them by class names"
        problem = f"holds 1 to {len(class_names)}, so its labels seem to start at 1 and not at 0"
        raise ValueError(f"{where} {problem}: {fix}.")
    return list(class_names), numbers


def _key(name: str) -> str:
    """Equal for names that people take for one: by Unicode form, case, spaces, hyphens, underscores, leading zeros."""
    name = unicodedata.normalize("NFC", name)
    if len(name) == 1:  # letters and signs are classes of their own: `a` and `A`, `-` and `_`
        return name
    if number := re.fullmatch(r"\s*(\d+)(\.0+)?\s*", name):
        return str(int(number[1]))
    words = re.sub(r"^[\s_]+|[\s_]+$", "", name)
    return unicodedata.normalize("NFC", re.sub(r"[\s_-]+", " ", words).casefold())


def _alike(names: Iterable[str], class_names: Iterable[str]) -> dict[str, str]:
    """Those of `names` that equal another name of `class_names` but for how they are written, and that name."""
    known = {_key(name): name for name in reversed(list(class_names))}
    return {name: known[_key(name)] for name in names if known.get(_key(name), name) != name}


def read_labels(
    dataset: datasets.Dataset, column: str, class_names: Sequence[str], *, role: str, allow_ood: bool
) -> np.ndarray:
    """Labels as indices into `class_names`, int64 `[N]`.

    Labels with names (a ClassLabel or text) are aligned by name, so splits may lack classes or have another order of
    classes. Whole numbers are positions in `class_names`; if all class names are numbers, they are aligned by name,
    too. With `allow_ood`, -1, null, blank names and names that are not in `class_names` become `OUT_OF_DISTRIBUTION`.

    Raises:
        ValueError: The column is missing or has no labels, or there are labels outside the classes. With `allow_ood`,
            also if a name and a class differ only by case, Unicode form, spaces, hyphens or underscores, or if no label
            is a class and some are names: these are probably misspelt.
    """
    names, numbers = _label_column(dataset, column, role)
    if names is None:
        names, numbers = _aligned_numbers(numbers, class_names, f"Column {column!r} of the {role} split")
    position = {name: index for index, name in enumerate(class_names)}
    meaning = np.array([*(position.get(name, OUT_OF_DISTRIBUTION) for name in names), OUT_OF_DISTRIBUTION], np.int64)
    labels = meaning.take(numbers, mode="clip")  # numbers beyond the names take the last one
    labels[numbers < 0] = OUT_OF_DISTRIBUTION
    outside = (numbers != _NULL) & (numbers < OUT_OF_DISTRIBUTION) | (numbers >= len(names))
    wrong = outside if allow_ood else labels == OUT_OF_DISTRIBUTION
    if (labels == OUT_OF_DISTRIBUTION).all():  # misspelt names, or another dataset
        wrong = wrong | (numbers >= 0)
    used = {int(n): names[n] for n in np.unique(numbers[labels == OUT_OF_DISTRIBUTION]) if 0 <= n < len(names)}
    alike = _alike(used.values(), class_names)
    wrong = wrong | np.isin(numbers, [n for n, name in used.items() if name in alike])
    if wrong.any():
        stray = ["null" if n == _NULL else used.get(int(n), str(n)) for n in np.unique(numbers[wrong])]
        rows = listed(np.flatnonzero(wrong))
        fix = f"drop those rows, or build the model with their classes in labels=[...] (rows {rows})."
        if alike:
            same = listed(f"{name!r} as {other!r}" for name, other in alike.items())
            fix = f"write {same}. Case, Unicode form, spaces, hyphens and underscores do not distinguish classes."
        raise ValueError(
            f"{int(wrong.sum())} labels of the {role} split are not among the {len(class_names)} classes "
            f"({listed(stray)}): {fix}{near_misses(stray[0], class_names)}"
        )
    return labels


def read_class_names(dataset: datasets.Dataset, column: str) -> list[str]:
    """The classes of the labeled split: the names of a ClassLabel, or the sorted distinct texts or whole numbers.

    Raises:
        ValueError: The column is missing or has no labels, names fewer than two classes, a class without a name, or
            classes whose names differ only by case, Unicode form, spaces, hyphens or underscores.
    """
    names, numbers = _label_column(dataset, column, "labeled")
    if names is None:
        names = [str(number) for number in np.unique(numbers[numbers >= 0])]
    elif isinstance(dataset.features[column], datasets.ClassLabel):
        names = list(names)
    else:
        names = sorted(names[number] for number in np.unique(numbers[numbers >= 0]))
    if blank := [number for number, name in enumerate(names) if not name.strip()]:
        raise ValueError(f"Classes of the labeled split have no name (numbers {listed(blank)}): name them.")
    if alike := _alike(names, names):
        same = listed(f"{name!r} and {other!r}" for name, other in alike.items())
        fix = "give them one name, or names that differ by more than case, Unicode form, spaces, hyphens or underscores"
        raise ValueError(f"The labeled split has class names that look like one ({same}): {fix}.")
    if len(names) < 2:
        fix = "label images of two or more"
        if (numbers == OUT_OF_DISTRIBUTION).any():
            fix += ", and not with -1, which means no class"
        raise ValueError(f"The labeled split has one class only ({', '.join(names) or 'none'}): {fix}.")
    return names


def split_validation(
    dataset: datasets.Dataset, fraction: float, *, label_column: str = "label", seed: int = 0
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Split labeled images into a labeled and a validation split, stratified by class, and log the counts.

    Args:
        fraction: Share of the images that go to the validation split, in (0, 1).
        seed: The same seed gives the same split.

    Raises:
        ValueError: A class would keep no labeled image, or the validation split has fewer images than classes.
    """
    from sklearn.model_selection import train_test_split  # takes half a second, and few runs need it

    if not 0 < fraction < 1:
        raise ValueError(f"The fraction of validation images is {fraction}: choose a value between 0 and 1.")
    names = read_class_names(dataset, label_column)
    labels = read_labels(dataset, label_column, names, role="labeled", allow_ood=False)
    counts = np.bincount(labels, minlength=len(names))
    kept, taken, used = np.arange(len(labels)), np.arange(0), np.count_nonzero(counts)
    poor = counts == 1  # scikit-learn refuses a class of one image
    if not poor.any() and used <= math.ceil(fraction * len(labels)) <= len(labels) - used:
        kept, taken = train_test_split(kept, test_size=fraction, random_state=seed, stratify=labels)
        poor = (counts > 0) & (np.bincount(labels[kept], minlength=len(names)) == 0)
    if poor.any():
        problem = f"{poor.sum()} classes would keep no labeled image ({listed(np.array(names)[poor])})"
        raise ValueError(f"{problem}: label more images of them, or give a validation split.")
    if not len(taken):
        problem = f"A fraction of {fraction:g} of {len(labels)} labeled images does not suit {used} classes"
        raise ValueError(f"{problem}, which need an image in both splits: change it, or give a validation split.")
    found = np.bincount(labels[taken], minlength=len(names))
    by_class = listed((f"{name} {found[i]} of {counts[i]}" for i, name in enumerate(names)), limit=50)
    told = "The validation split is %d of the %d labeled images, drawn by class with seed %d: %s."
    warn(logger, told, len(taken), len(labels), seed, by_class)
    return dataset.select(np.sort(kept)), dataset.select(np.sort(taken))


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
