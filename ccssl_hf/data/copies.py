"""Finds images with the same content in several splits, and reads as little as it can."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from .images import MISSING, EncodedImages, in_threads

Place = tuple[str, int]
"""Split and row of an image."""


def find_copies(splits: Mapping[str, EncodedImages], labeled: Collection[str]) -> list[list[Place]]:
    """Groups of images with the same encoded content, in several splits or in one of the splits `labeled`.

    Only images are read that have the size of another one, and they are read whole only if a sample is the same, too.
    """
    rows: dict[str, list[int]] = {}
    for name, own in splits.items():
        sizes, number, counts = np.unique(own.sizes, return_inverse=True, return_counts=True)
        repeats = (counts > 1) & (name in labeled)
        for other, images in splits.items():
            repeats |= np.isin(sizes, images.sizes) & (other != name)
        rows[name] = np.flatnonzero(repeats[number] & (own.sizes > 0)).tolist()

    def repeated(keys_of: Callable[[EncodedImages, Sequence[int]], Sequence[bytes]]) -> list[list[Place]]:
        groups: dict[bytes, list[Place]] = {}
        for name, some in rows.items():
            for row, key in zip(some, keys_of(splits[name], some), strict=True):
                if key != MISSING:
                    groups.setdefault(key, []).append((name, row))
        return [group for group in groups.values() if len(group) > 1]

    alike = repeated(lambda images, some: in_threads(images.sample, some, "Comparing images"))
    rows = {name: [row for group in alike for each, row in group if each == name] for name in splits}
    return repeated(lambda images, some: [each.tobytes() for each in images.hashes(some)])
