"""Opens images: one function for training, evaluation and prediction. Reads the encoded images of a split."""

from __future__ import annotations

import io
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
import pyarrow.compute as pc
import xxhash
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import UserError, in_lines

MAX_PIXELS = 89_478_485
"""Pixels that an image may have: the number from which Pillow warns of a decompression bomb, 268 MB decoded."""

MISSING = bytes(16)
"""The content hash of a row without an image, and of a file that cannot be read."""

for _plugin in ("pillow_jxl", "pillow_heif"):  # where they are installed, Pillow opens .jxl and .heic
    with suppress(ImportError):
        getattr(import_module(_plugin), "register_heif_opener", lambda: None)()

REPAIR = "repair or remove such files, or drop such rows with ccssl_hf.data.drop_unreadable(dataset)."

UNREADABLE_LIMIT = 0.05
"""The share of unreadable unlabeled images above which a run stops."""

_THREADS = 8  # that read files and decode images before training
_AT_A_TIME = 64  # images of a thread, whose progress is shown
_SAMPLE = 1 << 14  # bytes in the middle of a file that are compared before whole files

_In = TypeVar("_In")
_Out = TypeVar("_Out")

# `open_image` checks the number of pixels itself, and its error names the image.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class UnreadableImageError(UserError):
    """An image of a split cannot be read."""

    of_one_process = True


class TooLargeError(ValueError):
    """The image has more pixels than allowed."""


def eight_bits(image: Image.Image, source: Image.Image) -> Image.Image:
    """Convert a grey image of 12, 16 or 32 bits to 8: the upper 8 bits of its depth, or of its declared range.

    `source` is the image as it was opened. 32-bit integers and floats have a range only if the file is a TIFF with
    SMinSampleValue and SMaxSampleValue, or MinSampleValue and MaxSampleValue. Raises ValueError for all others.
    """
    values, tags = np.asarray(image), getattr(source, "tag_v2", {})
    if image.mode.startswith("I;16") or (source.format == "PPM" and image.mode == "I"):  # in PPM 16 bits, too
        depth = 12 if tags.get(258) == (12,) else 16
        return Image.fromarray((values >> (depth - 8)).astype(np.uint8))
    kind = "float" if image.mode == "F" else "32-bit integer"
    for pair in ((340, 341), (280, 281)):
        if all(tag in tags for tag in pair):
            low, high = (float(np.ravel(tags[tag])[0]) for tag in pair)
            break
    else:
        raise ValueError(
            f"{kind} values without a declared range: convert the image to 8 or 16 bits, or write the TIFF tags "
            "SMinSampleValue and SMaxSampleValue"
        )
    if tags.get(339) == (1,):  # unsigned integers, which Pillow holds in a signed type
        values = values.view(np.uint32)
    if not (np.isfinite([low, high]).all() and low < high and np.isfinite(values).all()):
        raise ValueError(f"{kind} values or a declared range ({low:g} to {high:g}) that are not numbers in order")
    scaled = (values.astype(np.float64) - low) * 256 / (high - low)
    return Image.fromarray(np.clip(scaled, 0, 255).astype(np.uint8))


def upright_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB, rotated by its EXIF orientation. Transparency is dropped.

    Of an image that is more than 32 times as long as wide the middle is kept. Raises ValueError if it has no pixels, or
    has 32-bit values without a declared range (see `eight_bits`).
    """
    image.load()  # some formats store EXIF data behind the pixels
    source = image
    if image.getexif().get(0x0112) is not None:  # the orientation; exif_transpose copies images that have none
        image = ImageOps.exif_transpose(image)
    width, height = image.size
    if min(width, height) < 1:
        raise ValueError("the image has no pixels")
    if max(width, height) > 32 * min(width, height):  # resizing its shorter side up would fill the memory
        left, top = (width - min(width, 32 * height)) // 2, (height - min(height, 32 * width)) // 2
        image = image.crop((left, top, width - left, height - top))
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):  # convert() would clip all values above 255 to white
        image = eight_bits(image, source)
    return image if image.mode == "RGB" else image.convert("RGB")


def open_image(
    source: bytes | str | Path, *, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] | None = None
) -> Image.Image:
    """Open an encoded image (the bytes or the path of a local file) as upright RGB; of several frames the first.

    `formats` are Pillow's names of the accepted formats; None accepts all that Pillow decodes itself. The number of
    pixels is checked before they are decoded.

    Raises:
        TooLargeError: The image has more than `max_pixels` pixels, or Pillow takes it for a decompression bomb.
        ValueError: The image cannot be read.
    """
    if max_pixels > MAX_PIXELS and Image.MAX_IMAGE_PIXELS is not None:  # Pillow's own limit, for the whole process
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    try:
        # Not by its path: Pillow would map some TIFF files into memory, and read rotated ones wrongly.
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
        with Image.open(io.BytesIO(content), formats=formats) as image:
            if image.format in ("EPS", "WMF"):
                raise ValueError(f"Pillow decodes {image.format} with other programs: convert the image to PNG")
            if image.width * image.height <= max_pixels:
                image.load()  # the header of an ICO or ICNS file may name a smaller size than its picture has
            if image.width * image.height <= max_pixels:
                return upright_rgb(image)
            problem = f"{image.width} x {image.height} pixels, at most {max_pixels:,} are allowed"
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        problem = str(error)
    except Exception as error:  # Pillow raises nearly any type of error for a broken file
        unknown = isinstance(error, UnidentifiedImageError)  # its message names a path or an object in memory
        reason = "unknown format" if unknown else str(error)
        if isinstance(error, OSError) and error.filename:  # its message names all folders
            reason = f"{error.strerror}: {Path(error.filename).name}"
        if type(error) not in (UnidentifiedImageError, ValueError):
            reason = f"{type(error).__name__}: {reason}"
        raise ValueError(f"not a readable image ({' '.join(reason.split())})") from error
    raise TooLargeError(f"too large ({problem})")


def check_local(path: str) -> None:
    """Raise a ValueError if a path of a dataset is a URL, or names a folder, pipe or device."""
    if re.match(r"\w[\w+.-]*://", path) or ("::" in path and not os.path.exists(path)):
        raise ValueError(f"{path} is a URL and only local files are opened; download the file first")
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("a folder, pipe or device, not a file")


def open_encoded(encoded: Mapping[str, Any] | None, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open an image of a dataset: its `bytes`, or the local file at `path` where they are None. Raises ValueError."""
    source = None if encoded is None else encoded["path"] if encoded["bytes"] is None else encoded["bytes"]
    if source is None:
        raise ValueError("the row holds no image")
    if isinstance(source, str):
        check_local(source)
    return open_image(source, max_pixels=max_pixels)


def name_of_image(encoded: Mapping[str, Any] | None, row: int) -> str:
    """The path of an image of a dataset on one line, or `row N` where it has none."""
    path = (encoded or {}).get("path") or f"row {row}"
    return path if path.isprintable() else ascii(path)


def decode_image(
    encoded: Mapping[str, Any] | None, row: int, role: str, *, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """`open_encoded` for row `row` of the `role` split, with an UnreadableImageError that names both and the file."""
    try:
        return open_encoded(encoded, max_pixels=max_pixels)
    except ValueError as error:
        name = name_of_image(encoded, row)
        raise UnreadableImageError(
            f"Image {row} of the {role} split can't be decoded ({'' if name in str(error) else f'{name}: '}{error}): "
            f"{REPAIR}"
        ) from error


def image_lines(found: Iterable[tuple[int, str, str]], most: int | None = 10) -> str:
    """Images from `unreadable` as text, one line each with path and reason; of many the first ones."""
    return in_lines([reason if path in reason else f"{path}: {reason}" for _, path, reason in found], most)


def encoded_images(dataset: datasets.Dataset, column: str) -> datasets.Dataset:
    """The image column alone, not decoded, without the format that the user has set."""
    return dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False)).with_format(None)


def in_threads(work: Callable[[_In], _Out], items: Sequence[_In], desc: str) -> list[_Out]:
    """`work` of all items, in order: files may lie on a disk that answers slowly. Shows a bar where it takes long."""
    starts = range(0, len(items), _AT_A_TIME)
    with ThreadPoolExecutor(_THREADS) as pool:
        parts = pool.map(lambda start: [work(item) for item in items[start : start + _AT_A_TIME]], starts)
        return list(chain.from_iterable(datasets.utils.tqdm(parts, total=len(starts), desc=desc, delay=2)))


class EncodedImages:
    """The encoded images of a split, in the file of the dataset or in files of their own. It copies none of them."""

    def __init__(self, dataset: datasets.Dataset, column: str) -> None:
        images = encoded_images(dataset, column)
        storage = images.data.column(column)
        self._bytes, self._paths = (pc.struct_field(storage, name) for name in ("bytes", "path"))
        self._places = np.arange(len(images)) if images._indices is None else images._indices.column(0).to_numpy()

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Bytes and path of an image, either may be None."""
        return {"bytes": self._bytes[int(self._places[row])].as_py(), "path": self._path(row) or None}

    @cached_property
    def states(self) -> np.ndarray:
        """Size in bytes and, of a file, time of the last change, int64 `[N, 2]`; -1 bytes where there is no image."""
        sizes = pc.binary_length(self._bytes).cast("int64").fill_null(-1).to_numpy()[self._places]
        states = np.stack([sizes, np.zeros_like(sizes)], 1)
        if len(files := np.flatnonzero(sizes < 0)):
            states[files] = in_threads(self._state, files.tolist(), "Looking at image files")
        return states

    @property
    def sizes(self) -> np.ndarray:
        """Size of each image in bytes, int64 `[N]`; -1 where there is none."""
        return self.states[:, 0]

    def _state(self, row: int) -> tuple[int, int]:
        with suppress(OSError, ValueError):
            found = os.stat(self._path(row))
            if stat.S_ISREG(found.st_mode):  # reading a pipe would wait
                return found.st_size, found.st_mtime_ns
        return -1, 0

    def _path(self, row: int) -> str:
        return self._paths[int(self._places[row])].as_py() or ""

    def _open(self, row: int) -> Any:
        content = self._bytes[int(self._places[row])]
        if content.is_valid:
            return io.BytesIO(content.as_buffer())  # not pyarrow's reader: it lacks methods that Pillow calls
        if not (path := self._path(row)):
            raise ValueError("the row holds no image")
        check_local(path)
        return open(path, "rb")

    def name(self, row: int) -> str:
        return name_of_image({"path": self._path(row)}, row)

    def content(self, row: int) -> bytes:
        """The encoded image; empty where it cannot be read."""
        with suppress(OSError, ValueError), self._open(row) as file:
            return file.read()
        return b""

    def sample(self, row: int) -> bytes:
        """A hash of some bytes in the middle: of files of one size, nearly all differ there."""
        with suppress(OSError, ValueError), self._open(row) as file:
            file.seek(max(0, (int(self.sizes[row]) - _SAMPLE) // 2))
            return xxhash.xxh3_128_digest(file.read(_SAMPLE))
        return MISSING

    def dimensions(self, row: int) -> tuple[int, int] | str:
        """Width and height from the header, or why it cannot be read."""
        try:
            with self._open(row) as file, Image.open(file) as image:
                return image.size
        except UnidentifiedImageError:
            return "unknown format"
        except ValueError as error:
            return str(error)
        except Exception as error:  # Pillow raises nearly any type of error for a broken file
            return f"{type(error).__name__}: {error}"

    def hashes(self, rows: Sequence[int] | None = None) -> np.ndarray:
        """XXH3 of the encoded images of all rows or of some, uint8 `[n, 16]`; `MISSING` where there is none."""
        chosen = np.arange(len(self)) if rows is None else np.asarray(rows, np.int64)
        order = np.argsort(self._places[chosen])  # the table's own: row by row, a shuffled one takes long
        found = in_threads(self._hash, chosen[order].tolist(), "Hashing images")
        hashes = np.empty((len(chosen), len(MISSING)), np.uint8)
        hashes[order] = np.frombuffer(b"".join(found), np.uint8).reshape(-1, len(MISSING))
        return hashes

    def _hash(self, row: int) -> bytes:
        content = self.content(row)
        return xxhash.xxh3_128_digest(content) if content else MISSING


def unreadable(
    dataset: datasets.Dataset, column: str = "image", *, max_pixels: int = MAX_PIXELS
) -> list[tuple[int, str, str]]:
    """The images that cannot be decoded: row, path (or `row N`) and reason. Decodes all images, in a few threads."""
    images = EncodedImages(dataset, column)

    def problem(row: int) -> str | None:
        try:
            open_encoded(images[row], max_pixels=max_pixels)
        except ValueError as error:
            return str(error)
        return None

    found = in_threads(problem, range(len(images)), "Checking images")
    return [(row, images.name(row), reason) for row, reason in enumerate(found) if reason is not None]


def version_of(files: Sequence[str]) -> str:
    """A hash that changes when one of the files is written, also in place with its size and modification time kept.

    As `name` of `datasets.load_dataset` it keeps the cache of `datasets` from rows of an earlier file.
    """
    states = [os.stat(file) for file in sorted(files)]
    return xxhash.xxh3_64_hexdigest(repr([(state.st_size, state.st_ctime_ns) for state in states]).encode())
