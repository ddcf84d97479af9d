"""Images of a split as uint8 pixels, each decoded once.

Small images (`decode="memory"`) become one table of uint8 pixels of the training size, kept in Arrow: `datasets` caches
it on disk, memory-mapped, and all processes and workers share it. Larger ones (`decode="stream"`) are decoded once per
sample, and the crop of each view is cut from that one image by the worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL
import pyarrow as pa
import torch
import torch.nn.functional as F
from datasets.fingerprint import Hasher
from PIL import Image, ImageOps
from torch import Tensor

from .transforms import View, ViewSettings, crop_boxes

CHUNK_BYTES = 1 << 24
"""Decoded pixels that are held and written at a time: far below the 2 GiB that an Arrow column of bytes can address."""

DECODED_AT_ONCE = 8
"""Whole images that a worker holds: enough to share the cost of drawing their boxes."""


def encoded_images(dataset: datasets.Dataset, column: str) -> datasets.Dataset:
    """The images alone and undecoded, whatever format the user has set."""
    return dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False)).with_format(None)


_AS_IMAGE = datasets.Image()


def decode_image(encoded: dict[str, Any], row: int, role: str) -> Image.Image:
    """An upright RGB image from what `datasets.Image(decode=False)` gives."""
    try:
        image = _AS_IMAGE.decode_example(encoded)
        if image.mode.startswith("I;16"):  # PIL would clip the 16 bits, and leave a white image
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return image if image.mode == "RGB" else image.convert("RGB")  # which copies
    except Exception as error:  # PIL raises nearly anything for a broken file
        raise ValueError(
            f"Image {row} of the {role} split can't be decoded ({type(error).__name__}: {error}): drop such rows first "
            "with ccssl_hf.data.drop_unreadable(dataset)."
        ) from error


def _pixels(batch: dict[str, list[Any]], rows: list[int], *, column: str, size: int, role: str) -> dict[str, Any]:
    """Shorter side to `size`, then the middle square; the image itself where it already has that size."""
    images = (decode_image(encoded, row, role) for row, encoded in zip(rows, batch[column], strict=True))
    squares = (ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC) for image in images)
    return {"pixels": [np.asarray(square).transpose(2, 0, 1).tobytes() for square in squares]}


_DECODER = 1
"""Raise it when `decode_image` or `_pixels` changes: tables decoded before then no longer count."""


class PixelTable:
    """All images of a split as uint8 `[3, size, size]`: one memory-mapped file, which all processes and workers share.

    The file lies in the cache of `datasets`, in a folder `ccssl_hf`, for the next run to find.
    """

    def __init__(self, dataset: datasets.Dataset, *, image_column: str, size: int, role: str) -> None:
        self.size = size
        encoded = encoded_images(dataset, image_column)
        cache = Path(datasets.config.HF_DATASETS_CACHE) / "ccssl_hf"
        cache.mkdir(parents=True, exist_ok=True)
        rows = max(1, CHUNK_BYTES // (3 * size * size))
        self._dataset = encoded.map(
            _pixels,
            batched=True,
            batch_size=rows,
            writer_batch_size=rows,
            with_indices=True,
            fn_kwargs={"column": image_column, "size": size, "role": role},
            remove_columns=[image_column],
            features=datasets.Features({"pixels": datasets.Value("binary")}),
            # Named here because a data set that lives in memory would have its pixels kept there, too.
            cache_file_name=str(
                cache / f"{Hasher.hash([encoded._fingerprint, size, PIL.__version__, _DECODER])}.arrow"
            ),
            desc=f"Decoding {role} images to {size} px",
        )
        self._open()

    def _open(self) -> None:
        """Numpy views of the Arrow buffers: every row has the same number of bytes, so a chunk is one array."""
        shape = (-1, 3, self.size, self.size)
        self._chunks = []
        for chunk in self._dataset.data.column("pixels").chunks:
            offsets = np.frombuffer(chunk.buffers()[1], np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
            data = np.frombuffer(chunk.buffers()[2], np.uint8)[offsets[0] : offsets[-1]]
            self._chunks.append(data.reshape(shape))
        self._starts = np.cumsum([0] + [len(c) for c in self._chunks])

    def __getstate__(self) -> dict[str, Any]:  # a spawned worker maps the file again instead of copying the pixels
        return {"size": self.size, "_dataset": self._dataset}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, index: np.ndarray) -> Tensor:
        """Rows `index`, uint8 `[n, 3, size, size]`."""
        out = np.empty((len(index), 3, self.size, self.size), np.uint8)
        chunk = np.searchsorted(self._starts, index, side="right") - 1
        for i, (c, row) in enumerate(zip(chunk, index - self._starts[chunk], strict=True)):
            out[i] = self._chunks[c][row]
        return torch.from_numpy(out)


def _rows_of(image: Image.Image) -> np.ndarray:
    """An RGB image as uint8 `[H, W, 4]` without a copy, as Pillow keeps it; `[H, W, 3]` where it can't be shared."""
    try:
        values = pa.array(image).values.buffers()[1]
    except (TypeError, ValueError):  # a Pillow before 11.3, or more pixels than it keeps in one block
        return np.asarray(image)
    return np.frombuffer(values, np.uint8).reshape(image.height, image.width, 4)


class ImageFiles:
    """Encoded images of any size; the crops of all views of a sample are cut from one decoded image."""

    def __init__(
        self, dataset: datasets.Dataset, *, image_column: str, role: str, settings: ViewSettings, seed: int, stream: int
    ) -> None:
        self._dataset, self._column, self._role = encoded_images(dataset, image_column), image_column, role
        self._settings, self._seed, self._stream = settings, seed, stream

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, index: np.ndarray, draw: np.ndarray, views: Sequence[View]) -> Tensor:
        """One crop for each of `views` of rows `index`, uint8 `[n, len(views), 3, size, size]`.

        Resized by torch, in a third of Pillow's time: its antialiased bilinear to within two grey levels, one for each
        of its passes (on photographs 0.1 % of the values differ at all, by one).
        """
        size = self._settings.image_size
        out = torch.empty((len(index), len(views), 3, size, size), dtype=torch.uint8)
        for part in (slice(i, i + DECODED_AT_ONCE) for i in range(0, len(index), DECODED_AT_ONCE)):
            self._read_at_once(index[part].tolist(), torch.from_numpy(draw[part]), views, out[part])
        return out

    def _read_at_once(self, rows: list[int], draws: Tensor, views: Sequence[View], out: Tensor) -> None:
        encoded = self._dataset[rows][self._column]
        images = [decode_image(item, row, self._role) for item, row in zip(encoded, rows, strict=True)]
        heights, widths = torch.tensor([[image.height, image.width] for image in images]).unbind(1)
        known: dict[str, Any] = {"draws": draws, "heights": heights, "widths": widths}
        pixels, size = [_rows_of(image) for image in images], out.shape[-2:]
        for v, view in enumerate(views):
            boxes = crop_boxes(view, self._settings, seed=self._seed, stream=self._stream, **known).tolist()
            for crop, image, (top, left, height, width) in zip(out[:, v], pixels, boxes, strict=True):
                box = image[None, top : top + height, left : left + width].copy()
                cut = torch.from_numpy(box).permute(0, 3, 1, 2)  # seen as channels_last, so not brought into planes
                resized = F.interpolate(cut, size, mode="bilinear", antialias=True)[0, :3]
                crop.numpy()[:] = resized.numpy()  # from pixels to planes, in half the time of torch's copy
