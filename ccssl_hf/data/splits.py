"""Checks of a split as a dataset with an image column, its name and its fingerprint."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import datasets
import numpy as np
import xxhash
from PIL import Image

from ..errors import near_misses
from .images import MAX_PIXELS, EncodedImages, unreadable

FINGERPRINTED_IMAGES = 1024
"""Number of images that a fingerprint reads: all of a small split, and about a second of reading of a large one."""
KEYED_BYTES = 1 << 28
"""Size of the splits that `content_key` reads whole, 256 MiB: less than a second."""


def fingerprint(dataset: datasets.Dataset, image_column: str, labels: Sequence[str] = ()) -> str:
    """A hash of the content of a split, 16 hexadecimal digits, independent of machine and file format.

    It is the start of a SHA-256 over the number of rows, `labels` (the class name of each row, if any), and up to
    `FINGERPRINTED_IMAGES` encoded images, evenly spread over the rows. For a PNG it hashes the pixels, because releases
    of Pillow encode an image differently. A file that cannot be read counts as empty. `dataset` must pass
    `check_images`.
    """
    digest = hashlib.sha256(json.dumps([len(dataset), list(labels)]).encode())
    images = EncodedImages(dataset, image_column)
    for row in np.unique(np.linspace(0, len(dataset) - 1, FINGERPRINTED_IMAGES).round().astype(int)).tolist():
        content = images.content(row)
        if content.startswith(b"\x89PNG"):
            with suppress(Exception):  # a damaged PNG is hashed as it is; Pillow raises nearly any type of error
                image = Image.open(io.BytesIO(content))
                if image.width * image.height <= MAX_PIXELS:
                    content = repr((image.mode, image.size, image.getpalette())).encode() + image.tobytes()
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()[:16]


def content_key(dataset: datasets.Dataset, image_column: str, labels: Sequence[str] = ()) -> str:
    """A key of all images of a split and their `labels`, which a resumed run must share with its checkpoint.

    It is the `fingerprint`, and a hash of all encoded images up to `KEYED_BYTES`; of larger splits, of all their sizes.
    """
    images = EncodedImages(dataset, image_column)
    small = images.sizes.clip(0).sum() <= KEYED_BYTES
    content = xxhash.xxh3_64_hexdigest((images.hashes() if small else images.sizes).tobytes())
    return f"{fingerprint(dataset, image_column, labels)}-{content}"


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
    feature = feature_of(dataset, image_column, role=role, argument="image_column")
    if not isinstance(feature, datasets.Image):
        problem = f"Column {image_column!r} of the {role} split holds {feature}, not images"
        cast = f"cast_column({image_column!r}, datasets.Image())"
        raise ValueError(f"{problem}: choose another image_column, or cast it with {cast}.")


def feature_of(dataset: datasets.Dataset, column: str, *, role: str, argument: str) -> Any:
    names = dataset.column_names
    if column not in names:
        fix = f"set {argument}.{near_misses(column, names)}"
        raise ValueError(f"The {role} split has no column {column!r} (it has {', '.join(names)}): {fix}")
    return dataset.features[column]


def drop_unreadable(
    dataset: datasets.Dataset, image_column: str = "image", *, max_pixels: int = MAX_PIXELS
) -> datasets.Dataset:
    """The rows of `dataset` whose images can be decoded. Reads every image once, with a progress bar."""
    bad = [row for row, _, _ in unreadable(dataset, image_column, max_pixels=max_pixels)]
    return dataset.select(np.setdiff1d(np.arange(len(dataset)), bad))
