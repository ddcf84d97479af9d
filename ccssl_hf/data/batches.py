"""Batches of labeled and unlabeled images, and the images of an evaluation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

import datasets
import numpy as np
import torch

from ..sampling import LABELED, UNLABELED, PairedIndices
from ..transforms import View, ViewSettings
from .images import MAX_PIXELS, decode_image, encoded_images
from .pixels import Found, ImageFiles, PixelTable


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
        self._skip = on_bad_image == "skip"

        def reader(dataset: datasets.Dataset, role: str, stream: int) -> PixelTable | ImageFiles:
            where: dict[str, Any] = dict(image_column=image_column, role=role, max_pixels=max_pixels, seed=seed)
            if decode == "memory":
                on_bad = "stop" if stream == LABELED else on_bad_image
                return PixelTable(dataset, size=settings.image_size, on_bad_image=on_bad, **where)
            return ImageFiles(dataset, settings=settings, stream=stream, **where)

        self.labeled = reader(labeled, "labeled", LABELED)
        self.unlabeled = None if unlabeled is None else reader(unlabeled, "unlabeled", UNLABELED)
        self.unreadable: Found = list(getattr(self.unlabeled, "errors", {}).items())

    def __len__(self) -> int:
        return len(self.labeled) + (0 if self.unlabeled is None else len(self.unlabeled))

    def __getitems__(self, batch: PairedIndices) -> dict[str, Any]:
        """One batch. The DataLoader calls this method instead of `__getitem__`, once per batch."""
        index, draw = batch.labeled_index, batch.labeled_draw
        out: dict[str, Any] = {
            "labeled_images": self.labeled.read(index, draw, (View.WEAK,)),
            "labels": self.labels[index],
            # Draws stay numpy arrays on the CPU, where random numbers are made. An accelerator does not wait for them.
            "labeled_draws": draw,
        }
        if self.unlabeled is not None:
            index, draw = batch.unlabeled_index.copy(), batch.unlabeled_draw
            found: Found | None = [] if self._skip else None
            out["unlabeled_images"] = self.unlabeled.read(index, draw, self.views, found)
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
