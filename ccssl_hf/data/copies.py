"""Finds images with the same content in several splits, and reads as little as it can."""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from typing import Any

import datasets
import numpy as np
import PIL
import pyarrow.compute as pc
from PIL import Image

from .images import content_hashes, encoded_images

Place = tuple[str, int]
"""Split and row of an image."""

_SAMPLE = 1 << 14  # bytes in the middle of a file that are compared before whole files


def in_threads(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """`function` of all items: files may lie on a disk that answers slowly."""
    with ThreadPoolExecutor(min(16, 4 * (os.cpu_count() or 1))) as pool:
        return list(pool.map(function, items))


class EncodedImages:
    """The encoded images of a split, in the file of the dataset or in files of their own. It copies none of them."""

    def __init__(self, dataset: datasets.Dataset, column: str) -> None:
        images = encoded_images(dataset, column)
        storage = images.data.column(column)
        self._bytes, self._paths = (pc.struct_field(storage, name) for name in ("bytes", "path"))
        self._rows = np.arange(len(images)) if images._indices is None else images._indices.column(0).to_numpy()
        self.lengths = pc.binary_length(self._bytes).cast("int64").fill_null(-1).to_numpy()[self._rows]  # in bytes
        self.changed = np.zeros_like(self.lengths)  # time of the last change of a file
        files = np.flatnonzero(self.lengths < 0)
        if len(files):
            self.lengths[files], self.changed[files] = np.array(in_threads(self._stat, files.tolist())).T

    def _stat(self, row: int) -> tuple[int, int]:
        with suppress(OSError, ValueError):
            found = os.stat(self._path(row))
            if stat.S_ISREG(found.st_mode):  # reading a pipe would wait
                return found.st_size, found.st_mtime_ns
        return -1, 0

    def _path(self, row: int) -> str:
        return self._paths[int(self._rows[row])].as_py() or ""

    def _open(self, row: int) -> Any:
        content = self._bytes[int(self._rows[row])]
        # Not pyarrow's own reader: it lacks methods that Pillow's plugins call.
        return io.BytesIO(content.as_buffer()) if content.is_valid else open(self._path(row), "rb")

    def name(self, row: int) -> str:
        path = self._path(row) or f"row {row}"
        return path if path.isprintable() else ascii(path)

    def sample(self, row: int) -> bytes:
        """A hash of some bytes in the middle: of files of one length, nearly all differ there."""
        with suppress(OSError), self._open(row) as file:
            file.seek(max(0, (int(self.lengths[row]) - _SAMPLE) // 2))
            return hashlib.blake2b(file.read(_SAMPLE), digest_size=16).digest()
        return b""

    def size(self, row: int) -> tuple[int, int] | str:
        """Width and height from the header, or why it cannot be read."""
        if self.lengths[row] < 0:
            return "no such file" if self._path(row) else "the row holds no image"
        try:
            with self._open(row) as file, Image.open(file) as image:
                return image.size
        except PIL.UnidentifiedImageError:
            return "unknown format"
        except Exception as error:  # Pillow raises nearly any type of error for a broken file
            return f"{type(error).__name__}: {error}"


def find_copies(
    files: Mapping[str, EncodedImages],
    splits: Mapping[str, datasets.Dataset],
    labels: Mapping[str, np.ndarray],
    column: str,
) -> list[list[Place]]:
    """Groups of images with the same encoded content, in several splits or in one split with labels.

    Only images are read that have the length of another one, and they are read whole only if a sample is the same, too.
    """
    rows: dict[str, list[int]] = {}
    for name, own in files.items():
        lengths, number, counts = np.unique(own.lengths, return_inverse=True, return_counts=True)
        others = [each.lengths for other, each in files.items() if other != name]
        repeats = np.isin(lengths, np.concatenate(others)) if others else np.zeros(len(lengths), bool)
        repeats |= (counts > 1) & (name in labels)
        rows[name] = np.flatnonzero(repeats[number] & (own.lengths > 0)).tolist()

    def repeated(keys: Mapping[str, Sequence[bytes]]) -> list[list[Place]]:
        groups: dict[bytes, list[Place]] = {}
        for name, of_rows in keys.items():
            for row, key in zip(rows[name], of_rows, strict=True):
                if any(key):  # zeros: it cannot be read
                    groups.setdefault(key, []).append((name, row))
        return [group for group in groups.values() if len(group) > 1]

    alike = repeated({name: in_threads(own.sample, rows[name]) for name, own in files.items()})
    rows = {name: [row for each, row in chain.from_iterable(alike) if each == name] for name in files}
    return repeated({name: content_hashes(splits[name].select(some), column) for name, some in rows.items() if some})
