"""Opens images, and reads the images of a split as uint8 pixels: small ones from memory, larger ones from files."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL
import pyarrow as pa
import torch
import torch.nn.functional as F
from datasets.fingerprint import Hasher
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .transforms import View, ViewSettings, crop_boxes

CHUNK_BYTES = 1 << 24  # decoded pixels that are written at a time: far below the 2 GiB limit of an Arrow column
DECODED_AT_ONCE = 8  # images that a worker holds at once; their crop boxes are drawn together


class TooLargeError(ValueError):
    """The image has more pixels than allowed."""


def upright_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB, rotated by its EXIF orientation. 16-bit modes keep their upper 8 bits."""
    image.load()  # some formats store EXIF data behind the pixels
    if image.getexif().get(0x0112) is not None:  # the orientation; exif_transpose copies images that have none
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # convert() would clip all values above 255 to white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def open_image(
    source: bytes | str | Path, *, max_pixels: int | None = None, formats: tuple[str, ...] | None = None
) -> Image.Image:
    """Open an encoded image (the bytes or the path of a local file) as upright RGB.

    `formats` are Pillow's names of the accepted formats; None accepts all.

    Raises:
        TooLargeError: The image has more than `max_pixels` pixels, or Pillow takes it for a decompression bomb.
        ValueError: The image cannot be read.
    """
    try:
        # Not by its path: Pillow would map some TIFF files into memory, and read rotated ones wrongly.
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
        with Image.open(io.BytesIO(content), formats=formats) as image:
            if max_pixels is None or image.width * image.height <= max_pixels:
                return upright_rgb(image)
            problem = f"{image.width} x {image.height} pixels, at most {max_pixels:,} are allowed"
    except Image.DecompressionBombError as error:
        problem = str(error)
    except Exception as error:  # Pillow raises nearly any type of error for a broken file
        unknown = isinstance(error, UnidentifiedImageError)  # its message names a path or an object in memory
        reason = "unknown format" if unknown else f"{type(error).__name__}: {error}"
        raise ValueError(f"not a readable image ({reason})") from error
    raise TooLargeError(f"too large ({problem})")


def open_encoded(encoded: Mapping[str, Any] | None) -> Image.Image:
    """Open an image of a dataset: its `bytes`, or the local file at `path` where they are None. Raises ValueError."""
    source = None if encoded is None else encoded["path"] if encoded["bytes"] is None else encoded["bytes"]
    if source is None:
        raise ValueError("the row holds no image")
    if isinstance(source, str) and re.match(r"\w[\w+.-]*://", source):
        raise ValueError(f"{source} is a URL and only local files are opened; download the file first")
    return open_image(source)


def decode_image(encoded: Mapping[str, Any] | None, row: int, role: str) -> Image.Image:
    """`open_encoded` for row `row` of the `role` split, with an error that names both."""
    try:
        return open_encoded(encoded)
    except ValueError as error:
        raise ValueError(
            f"Image {row} of the {role} split can't be decoded ({error}): drop such rows first with "
            "ccssl_hf.data.drop_unreadable(dataset)."
        ) from error


def encoded_images(dataset: datasets.Dataset, column: str) -> datasets.Dataset:
    """The image column alone, not decoded, without the format that the user has set."""
    return dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False)).with_format(None)


# -------------------------------------------------------- stand-ins until the pixels' own branch is merged: take those

MAX_PIXELS = 89_478_485
"""Default budget of an image in pixels: Pillow's own, above which it warns of a decompression bomb."""


def unreadable(dataset: datasets.Dataset, column: str, *, max_pixels: int = MAX_PIXELS) -> list[tuple[int, str, str]]:
    """The images that cannot be decoded, as row, path (or row number) and reason. Decodes every image, in threads."""
    images = encoded_images(dataset, column)

    def problem(row: int) -> tuple[int, str, str] | None:
        encoded = images[row][column]
        try:
            open_encoded(encoded)
        except ValueError as error:
            return row, (encoded or {}).get("path") or f"row {row}", str(error)
        return None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = datasets.utils.tqdm(pool.map(problem, range(len(images))), total=len(images), desc="Checking images")
        return [each for each in found if each is not None]


def content_hashes(dataset: datasets.Dataset, column: str) -> list[bytes]:
    """A hash of each encoded image, 16 bytes. Images that cannot be read have the hash of no bytes."""
    images = encoded_images(dataset, column)

    def digest(row: int) -> bytes:
        encoded = images[row][column] or {"bytes": b"", "path": None}
        try:
            content = encoded["bytes"] if encoded["bytes"] is not None else Path(encoded["path"] or "").read_bytes()
        except OSError:
            content = b""
        return hashlib.sha256(content).digest()[:16]

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(digest, range(len(images))))


def _pixels(batch: list[Any], rows: list[int], *, size: int, role: str) -> dict[str, list[bytes]]:
    """Resize the shorter side to `size` and crop the central square."""
    images = (decode_image(encoded, row, role) for encoded, row in zip(batch, rows, strict=True))
    squares = (ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC) for image in images)
    return {"pixels": [np.asarray(square).transpose(2, 0, 1).tobytes() for square in squares]}


_DECODER = 2
"""Increase it when the pixels from `open_image` or `_pixels` change, so that cached tables are decoded again."""


class PixelTable:
    """All images of a split as uint8 `[3, size, size]`, decoded once to an Arrow file in the cache of `datasets`.

    All processes and workers map this file into memory, and the next run finds it there.
    """

    def __init__(self, dataset: datasets.Dataset, *, image_column: str, size: int, role: str) -> None:
        self.size = size
        encoded = encoded_images(dataset, image_column)
        key = Hasher.hash([encoded._fingerprint, size, PIL.__version__, _DECODER])
        # Without a file name, `datasets` would keep the pixels of an in-memory dataset in memory.
        cache = Path(datasets.config.HF_DATASETS_CACHE) / "ccssl_hf" / f"{key}.arrow"
        cache.parent.mkdir(parents=True, exist_ok=True)
        rows = max(1, CHUNK_BYTES // (3 * size * size))
        self._dataset = encoded.map(
            _pixels,
            input_columns=[image_column],
            with_indices=True,
            batched=True,
            batch_size=rows,
            writer_batch_size=rows,
            fn_kwargs={"size": size, "role": role},
            remove_columns=[image_column],
            features=datasets.Features({"pixels": datasets.Value("binary")}),
            cache_file_name=str(cache),
            desc=f"Decoding {role} images to {size} px",
        )

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, index: np.ndarray) -> Tensor:
        """Rows `index`, uint8 `[n, 3, size, size]`."""
        column = self._dataset.data.column("pixels")
        pixels = bytearray().join(column[row].as_buffer() for row in index.tolist())
        return torch.frombuffer(pixels, dtype=torch.uint8).view(-1, 3, self.size, self.size)


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
        self, dataset: datasets.Dataset, *, image_column: str, role: str, settings: ViewSettings, seed: int, stream: int
    ) -> None:
        self._dataset, self._column, self._role = encoded_images(dataset, image_column), image_column, role
        self._settings, self._seed, self._stream = settings, seed, stream

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, index: np.ndarray, draw: np.ndarray, views: Sequence[View]) -> Tensor:
        """One crop for each of `views` of rows `index`, uint8 `[n, len(views), 3, size, size]`.

        Crops are resized by torch, which takes a third of Pillow's time. Its antialiased bilinear filter differs from
        Pillow's by at most two grey levels (on photographs, 0.1% of the values differ by one).
        """
        size = (self._settings.image_size,) * 2
        out = torch.empty((len(index), len(views), 3, *size), dtype=torch.uint8)
        for part in (slice(i, i + DECODED_AT_ONCE) for i in range(0, len(index), DECODED_AT_ONCE)):
            rows, draws = index[part].tolist(), torch.from_numpy(draw[part])
            encoded = self._dataset[rows][self._column]
            images = [decode_image(item, row, self._role) for item, row in zip(encoded, rows, strict=True)]
            heights, widths = torch.tensor([[image.height, image.width] for image in images]).unbind(1)
            known: dict[str, Any] = {"draws": draws, "heights": heights, "widths": widths}
            pixels = [_rows_of(image) for image in images]
            for v, view in enumerate(views):
                boxes = crop_boxes(view, self._settings, seed=self._seed, stream=self._stream, **known).tolist()
                for crop, image, (top, left, height, width) in zip(out[part, v], pixels, boxes, strict=True):
                    box = image[None, top : top + height, left : left + width].copy()
                    cut = torch.from_numpy(box).permute(0, 3, 1, 2)  # channels_last, so torch makes no copy
                    resized = F.interpolate(cut, size, mode="bilinear", antialias=True)[0, :3]
                    crop.numpy()[:] = resized.numpy()  # numpy copies to planes in half the time of torch
        return out
