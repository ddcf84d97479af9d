"""Reads the images of a split as uint8 pixels: small ones from memory, larger ones from files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar

import datasets
import numpy as np
import PIL
import pyarrow as pa
import torch
import torch.nn.functional as F
import xxhash
from PIL import Image, ImageOps
from torch import Tensor

from ..sampling import UNLABELED, replacements
from ..transforms import View, ViewSettings, crop_boxes
from .images import (
    MAX_PIXELS,
    REPAIR,
    EncodedImages,
    UnreadableImageError,
    decode_image,
    encoded_images,
    image_lines,
    open_encoded,
)

CHUNK_BYTES = 1 << 24  # decoded pixels that are written at a time: far below the 2 GiB limit of an Arrow column
DECODED_AT_ONCE = 8  # images that a worker holds at once; their crop boxes are drawn together

Found = list[tuple[int, str]]
"""Images that could not be read: row and reason."""

_T = TypeVar("_T")


def _pixels(batch: list[Any], *, size: int, max_pixels: int) -> dict[str, list[Any]]:
    """Resize the shorter side to `size` and crop the central square; the reason for an image that can't be read."""
    pixels: list[bytes | None] = []
    errors: list[str | None] = []
    for encoded in batch:
        try:
            image = open_encoded(encoded, max_pixels=max_pixels)
            square = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
            pixels.append(np.asarray(square).transpose(2, 0, 1).tobytes())
            errors.append(None)
        except ValueError as error:
            pixels.append(None)
            errors.append(str(error))
    return {"pixels": pixels, "error": errors}


_DECODER = 3
"""Increase it when the pixels from `open_image` or `_pixels` change, so that cached tables are decoded again."""


class PixelTable:
    """All images of a split as uint8 `[3, size, size]`, decoded once to an Arrow file in the cache of `datasets`.

    All processes and workers map this file into memory, and the next run with images of the same content finds it
    there. With `on_bad_image="stop"`, images that cannot be read raise a ValueError that names them; otherwise they are
    in `errors`, reasons by row, and `read` replaces them.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        *,
        image_column: str,
        size: int,
        role: str,
        seed: int = 0,
        max_pixels: int = MAX_PIXELS,
        on_bad_image: Literal["skip", "stop"] = "stop",
    ) -> None:
        self.size, self._seed = size, seed
        encoded, images = encoded_images(dataset, image_column), EncodedImages(dataset, image_column)
        Image.init()  # another release or plugin of Pillow may read more formats
        decoder = repr((size, max_pixels, PIL.__version__, sorted(Image.ID), _DECODER)).encode()
        key = xxhash.xxh3_128_hexdigest(images.hashes().tobytes() + decoder)
        # Without a file name, `datasets` would keep the pixels of an in-memory dataset in memory.
        cache = Path(datasets.config.HF_DATASETS_CACHE) / "ccssl_hf" / f"{key}.arrow"
        cache.parent.mkdir(parents=True, exist_ok=True)
        rows = max(1, CHUNK_BYTES // (3 * size * size))
        self._dataset = encoded.map(
            _pixels,
            input_columns=[image_column],
            batched=True,
            batch_size=rows,
            writer_batch_size=rows,
            fn_kwargs={"size": size, "max_pixels": max_pixels},
            remove_columns=[image_column],
            features=datasets.Features({"pixels": datasets.Value("binary"), "error": datasets.Value("string")}),
            cache_file_name=str(cache),
            desc=f"Decoding {role} images to {size} px",
        )
        errors = self._dataset.data.column("error")
        bad = np.flatnonzero(errors.is_valid().to_numpy()).tolist()
        self.errors: dict[int, str] = {row: errors[row].as_py() for row in bad}
        if bad and on_bad_image == "stop":
            found = image_lines((row, images.name(row), self.errors[row]) for row in bad)
            raise ValueError(
                f"{len(bad):,} of {len(encoded):,} images of the {role} split can't be decoded: {REPAIR}{found}"
            )

    def __len__(self) -> int:
        return len(self._dataset)

    def _check(self, row: int) -> None:
        if row in self.errors:
            raise ValueError(self.errors[row])

    def read(
        self, index: np.ndarray, draw: np.ndarray | None = None, views: Sequence[View] = (), found: Found | None = None
    ) -> Tensor:
        """Rows `index`, uint8 `[n, 3, size, size]`. Unreadable ones are replaced in `index`, too: see `ImageFiles`."""
        if draw is not None and self.errors:
            for place in np.flatnonzero(np.isin(index, list(self.errors))):
                row, at = int(index[place]), int(draw[place])
                index[place], _ = first_readable(row, at, seed=self._seed, rows=len(self), read=self._check)
        column = self._dataset.data.column("pixels")
        pixels = bytearray().join(column[row].as_buffer() for row in index.tolist())
        return torch.frombuffer(pixels, dtype=torch.uint8).view(-1, 3, self.size, self.size)


def first_readable(
    row: int, draw: int, *, seed: int, rows: int, read: Callable[[int], _T], found: Found | None = None
) -> tuple[int, _T]:
    """Read the unlabeled image of a draw, or in place of an unreadable one the first readable of its `replacements`.

    Returns its row and what `read` returned. `read` raises a ValueError for an unreadable image, which is added to
    `found`.
    """
    found = [] if found is None else found
    for candidate in chain((row,), replacements(seed, UNLABELED, draw, rows)):
        try:
            return candidate, read(candidate)
        except ValueError as error:
            found.append((candidate, str(error)))
    raise UnreadableImageError(
        f"{len(found)} unlabeled images in a row can't be decoded, the last one because: {found[-1][1]}. Is their "
        "folder still there?"
    )


def _rows_of(image: Image.Image) -> np.ndarray:
    """An RGB image as uint8 `[H, W, 4]`, sharing Pillow's memory; as a copy `[H, W, 3]` where that is impossible."""
    try:
        values = pa.array(image).values.buffers()[1]
    except (TypeError, ValueError):  # Pillow < 11.3, or an image in more than one memory block
        return np.asarray(image)
    return np.frombuffer(values, np.uint8).reshape(image.height, image.width, 4)


class ImageFiles:
    """Encoded images of any size. The crops of all views of a sample are cut from one decoded image."""

    def __init__(
        self,
        dataset: datasets.Dataset,
        *,
        image_column: str,
        role: str,
        settings: ViewSettings,
        seed: int,
        stream: int,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self._dataset, self._column, self._role = encoded_images(dataset, image_column), image_column, role
        self._settings, self._seed, self._stream, self._max_pixels = settings, seed, stream, max_pixels

    def __len__(self) -> int:
        return len(self._dataset)

    def _decode(self, row: int) -> Image.Image:
        return open_encoded(self._dataset[row][self._column], max_pixels=self._max_pixels)

    def read(self, index: np.ndarray, draw: np.ndarray, views: Sequence[View], found: Found | None = None) -> Tensor:
        """One crop for each of `views` of rows `index`, uint8 `[n, len(views), 3, size, size]`.

        With `found`, an unreadable image is added to it and replaced (see `first_readable`), in `index` too. Without,
        it raises an UnreadableImageError.

        Crops are resized by torch, which takes a third of Pillow's time. Its antialiased bilinear filter differs from
        Pillow's by at most two grey levels (on photographs, 0.1% of the values differ by one).
        """
        size = (self._settings.image_size,) * 2
        out = torch.empty((len(index), len(views), 3, *size), dtype=torch.uint8)
        for part in (slice(i, i + DECODED_AT_ONCE) for i in range(0, len(index), DECODED_AT_ONCE)):
            rows, draws = index[part].tolist(), torch.from_numpy(draw[part])
            encoded = self._dataset[rows][self._column]
            images = []
            for place, (item, row) in enumerate(zip(encoded, rows, strict=True)):
                try:
                    images.append(decode_image(item, row, self._role, max_pixels=self._max_pixels))
                except UnreadableImageError:
                    if found is None:
                        raise
                    known: dict[str, Any] = {"seed": self._seed, "rows": len(self), "found": found}
                    rows[place], image = first_readable(row, int(draws[place]), read=self._decode, **known)
                    images.append(image)
            index[part] = rows
            heights, widths = torch.tensor([[image.height, image.width] for image in images]).unbind(1)
            shapes: dict[str, Any] = {"draws": draws, "heights": heights, "widths": widths}
            pixels = [_rows_of(image) for image in images]
            for v, view in enumerate(views):
                boxes = crop_boxes(view, self._settings, seed=self._seed, stream=self._stream, **shapes).tolist()
                for crop, values, (top, left, height, width) in zip(out[part, v], pixels, boxes, strict=True):
                    box = values[None, top : top + height, left : left + width].copy()
                    cut = torch.from_numpy(box).permute(0, 3, 1, 2)  # channels_last, so torch makes no copy
                    resized = F.interpolate(cut, size, mode="bilinear", antialias=True)[0, :3]
                    crop.numpy()[:] = resized.numpy()  # numpy copies to planes in half the time of torch
        return out
