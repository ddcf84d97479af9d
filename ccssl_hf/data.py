"""From `datasets.Dataset` to uint8 batches: columns are checked, labels aligned by name, every image decoded once.

Small images (`decode="memory"`) become one table of uint8 pixels of the training size, kept in Arrow: `datasets` caches
it on disk, memory-mapped, and all processes and workers share it. Larger ones (`decode="stream"`) are decoded once per
sample, and the crop of each view is cut from that one image by the worker.
"""

from __future__ import annotations

import difflib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .sampling import LABELED, UNLABELED, PairedIndices
from .transforms import View, ViewSettings, crop_boxes

UNKNOWN = -1
"""The label of an image of no known class, in evaluation data and in hidden labels."""


def near_misses(name: str, known: Sequence[str]) -> str:
    """` Did you mean ...?` for a misspelt `name`, or nothing."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


# -------------------------------------------------------------------------------------------------------------- sources


def load_split(source: str, *, role: str) -> datasets.Dataset:
    """Load one split from an image folder, parquet files or the Hub.

    Args:
        source: A folder of images (labels are the names of the folders they lie in), a folder, file or glob of parquet,
            or a Hub data set as `user/name` or `user/name:split`.
        role: `labeled`, `unlabeled`, `validation` or `test`. Names the split in errors, and is the split that is taken
            from a Hub data set that names none (`train` where there is no split of that name). Unlabeled folders lose
            their labels.

    Raises:
        ValueError: `source` is neither readable here nor the name of a data set.
    """
    path = Path(source).expanduser()
    if path.is_dir() and not any(path.glob("*.parquet")):
        return _load_image_folder(path, role)
    if path.is_dir() or path.suffix == ".parquet" or any(c in source for c in "*?["):
        files = str(path / "*.parquet") if path.is_dir() else str(path)
        try:
            return datasets.load_dataset("parquet", data_files=files, split="train")
        except FileNotFoundError as error:
            raise ValueError(f"--{role} {source}: no such parquet file; check the path.") from error
    return _load_from_hub(source, role)


def _load_image_folder(path: Path, role: str) -> datasets.Dataset:
    # One call per split and explicit files: given a root, `datasets` guesses splits from words such as "test" in paths.
    extensions = {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    if not any(p.suffix.lower() in extensions for p in path.rglob("*")):
        raise ValueError(f"--{role} {path}: no images below this folder; point it at a folder that holds image files.")
    found = datasets.load_dataset(
        "imagefolder", data_files={"train": [str(path / "**")]}, drop_labels=role == "unlabeled", split="train"
    )
    if role != "unlabeled" and "label" not in found.column_names:
        raise ValueError(
            f"--{role} {path}: its images lie in fewer than two class folders; sort them as <class>/<image>."
        )
    return found


def _load_from_hub(source: str, role: str) -> datasets.Dataset:
    name, _, split = source.partition(":")
    if source.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(
            f"--{role} {source}: no such file or folder; give an image folder, parquet files or a Hub data set."
        )
    try:
        if not split:
            available = datasets.get_dataset_split_names(name)
            split = role if role in available else "train"
        return datasets.load_dataset(name, split=split)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--{role} {source}: neither a readable path nor a data set that the Hub gave ({type(error).__name__}: "
            f"{error}); check the spelling, or give an image folder or parquet files."
        ) from error


def name_of(dataset: datasets.Dataset) -> str:
    """What the data set calls itself, where it does."""
    return dataset.info.dataset_name or dataset.info.builder_name or "a data set in memory"


# --------------------------------------------------------------------------------------------------------------- checks


def check_images(dataset: Any, *, role: str, image_column: str) -> None:
    """Raise a ValueError that names the fix unless `dataset` is a non-empty map-style data set with an image column."""
    if isinstance(dataset, (datasets.IterableDataset, datasets.IterableDatasetDict)):
        raise ValueError(
            f"The {role} split is streamed, and a shuffled stream can't resume exactly: load it with streaming=False."
        )
    if isinstance(dataset, dict):
        raise ValueError(f"The {role} split is a dictionary of splits ({', '.join(dataset)}): pass one of them.")
    if not isinstance(dataset, datasets.Dataset):
        raise ValueError(f"The {role} split is a {type(dataset).__name__}: pass a datasets.Dataset.")
    if len(dataset) == 0:
        raise ValueError(f"The {role} split is empty: pass a split that holds at least one image.")
    _check_column(dataset, image_column, role=role, argument="image_column")
    feature = dataset.features[image_column]
    if not isinstance(feature, datasets.Image):
        raise ValueError(
            f"Column {image_column!r} of the {role} split holds {feature}, not images: choose another image_column, or "
            f"cast it with cast_column({image_column!r}, datasets.Image())."
        )


def _check_column(dataset: datasets.Dataset, column: str, *, role: str, argument: str) -> None:
    if column not in dataset.column_names:
        raise ValueError(
            f"The {role} split has no column {column!r} (it has {', '.join(dataset.column_names)}): set {argument}."
            + near_misses(column, dataset.column_names)
        )


def read_labels(
    dataset: datasets.Dataset, column: str, class_names: Sequence[str], *, role: str, allow_unknown: bool
) -> np.ndarray:
    """Labels as indices into `class_names`, int64 `[N]`.

    Named labels (a ClassLabel or strings) are aligned by name, so a folder that misses a class, or sorts its classes in
    another way, still means the same. With `allow_unknown`, a name that is no class, and -1, become `UNKNOWN`.

    Raises:
        ValueError: The column is missing, is no label column, or holds labels outside the classes.
    """
    argument = "hidden_label_column" if role == "unlabeled" else "label_column"
    _check_column(dataset, column, role=role, argument=argument)
    feature = dataset.features[column]
    kind = getattr(feature, "dtype", "")
    values = dataset.select_columns([column]).with_format("numpy")[:][column]
    position = {name: i for i, name in enumerate(class_names)}
    if isinstance(feature, datasets.ClassLabel):
        table = np.array([position.get(name, UNKNOWN) for name in feature.names] + [UNKNOWN], np.int64)
        labels, names = table[values], np.array([*feature.names, "-1"], object)[values]
    elif kind in ("string", "large_string"):
        labels, names = np.array([position.get(v, UNKNOWN) for v in values], np.int64), values
    elif kind.startswith(("int", "uint")):
        inside = (values >= 0) & (values < len(class_names))
        labels = np.where(inside | (values == UNKNOWN), values, UNKNOWN - 1 - inside).astype(np.int64)
        names = values
    else:
        raise ValueError(f"Column {column!r} of the {role} split holds {feature}, not labels: set {argument}.")
    wrong = labels < (UNKNOWN if allow_unknown else 0)
    if wrong.any():
        stray = sorted({str(name) for name in np.asarray(names)[wrong]})
        raise ValueError(
            f"{int(wrong.sum())} labels of the {role} split are none of the {len(class_names)} classes "
            f"({', '.join(stray[:5])}{', ...' if len(stray) > 5 else ''}): drop those rows, or build the model with "
            "their classes in labels=[...]."
        )
    return labels


def read_class_names(dataset: datasets.Dataset, column: str) -> list[str]:
    """The classes of the labeled split: a ClassLabel's names, or the sorted distinct strings of a text column.

    Raises:
        ValueError: The column is missing, or holds numbers without names.
    """
    _check_column(dataset, column, role="labeled", argument="label_column")
    feature = dataset.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    if getattr(feature, "dtype", "") in ("string", "large_string"):
        return sorted(dataset.unique(column))
    raise ValueError(
        f"Column {column!r} of the labeled split holds {feature}, which names no classes: cast it with "
        f"cast_column({column!r}, datasets.ClassLabel(names=[...]))."
    )


# ------------------------------------------------------------------------------------------------------------- decoding


def _decode(encoded: dict[str, Any]) -> Image.Image:
    """An upright RGB image from what `datasets.Image(decode=False)` gives."""
    source = io.BytesIO(encoded["bytes"]) if encoded["bytes"] is not None else encoded["path"]
    with Image.open(source) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image, copy=True)).permute(2, 0, 1)


def _unreadable(role: str, row: int, error: Exception) -> ValueError:
    return ValueError(
        f"Image {row} of the {role} split can't be decoded ({type(error).__name__}: {error}): drop such rows first "
        "with ccssl_hf.data.drop_unreadable(dataset)."
    )


def drop_unreadable(dataset: datasets.Dataset, image_column: str = "image") -> datasets.Dataset:
    """The rows of `dataset` whose images decode. Reads every image once, with a progress bar."""

    def readable(encoded: dict[str, Any]) -> bool:
        try:
            _decode(encoded)
        except (
            OSError,
            ValueError,
            SyntaxError,
        ):  # what PIL raises for broken files, UnidentifiedImageError among them
            return False
        return True

    kept = dataset.cast_column(image_column, datasets.Image(decode=False)).filter(
        readable, input_columns=image_column, desc="Checking images"
    )
    return kept.cast_column(image_column, datasets.Image())


def _square(image: Image.Image, size: int) -> Image.Image:
    """Shorter side to `size`, then the middle square; the image itself where it already has that size."""
    return image if image.size == (size, size) else ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)


def _encode_pixels(
    batch: dict[str, list[Any]], rows: list[int], *, column: str, size: int, role: str
) -> dict[str, Any]:
    pixels = []
    for row, encoded in zip(rows, batch[column], strict=True):
        try:
            pixels.append(_to_tensor(_square(_decode(encoded), size)).numpy().tobytes())
        except (OSError, ValueError, SyntaxError) as error:
            raise _unreadable(role, row, error) from error
    return {"pixels": pixels}


class PixelTable:
    """All images of a split as uint8 `[3, size, size]`, read from Arrow without a copy of the whole."""

    def __init__(self, dataset: datasets.Dataset, *, image_column: str, size: int, role: str) -> None:
        self.size = size
        encoded = dataset.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
        self._dataset = encoded.map(
            _encode_pixels,
            batched=True,
            with_indices=True,
            fn_kwargs={"column": image_column, "size": size, "role": role},
            remove_columns=[image_column],
            features=datasets.Features({"pixels": datasets.Value("binary")}),
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


class ImageFiles:
    """Encoded images of any size; the crops of all views of a sample are cut from one decoded image."""

    def __init__(self, dataset: datasets.Dataset, *, image_column: str, role: str) -> None:
        self.role = role
        self._column = image_column
        self._dataset = dataset.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self._dataset)

    def read(
        self,
        index: np.ndarray,
        draw: np.ndarray,
        views: Sequence[View],
        settings: ViewSettings,
        *,
        seed: int,
        stream: int,
    ) -> Tensor:
        """One crop for each of `views` of rows `index`, uint8 `[n, len(views), 3, size, size]`."""
        size = settings.image_size
        out = torch.empty((len(index), len(views), 3, size, size), dtype=torch.uint8)
        for i, (row, number) in enumerate(zip(index.tolist(), draw.tolist(), strict=True)):
            try:
                image = _decode(self._dataset[row][self._column])
            except (OSError, ValueError, SyntaxError) as error:
                raise _unreadable(self.role, row, error) from error
            height, width = torch.tensor([image.height]), torch.tensor([image.width])
            for v, view in enumerate(views):
                boxes = crop_boxes(
                    view, settings, seed=seed, stream=stream, draws=torch.tensor([number]), heights=height, widths=width
                )
                top, left, h, w = boxes[0].tolist()
                crop = image.crop((left, top, left + w, top + h)).resize((size, size), Image.Resampling.BILINEAR)
                out[i, v] = _to_tensor(crop)
        return out


# ------------------------------------------------------------------------------------------------------------- datasets


class PairedDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Labeled and unlabeled images of one batch at a time; its index is a `PairedIndices`.

    A batch holds `labeled_images`, `labels [B]`, `labeled_draws [B]` and, with unlabeled data, `unlabeled_images`,
    `unlabeled_draws [U]`, `unlabeled_index [U]` and, where they are known, `hidden_labels [U]`. Images are uint8
    `[n, 3, S, S]`, or `[n, views, 3, S, S]` where each view has a crop of its own.

    Args:
        labeled, unlabeled: Data sets that passed `check_images`.
        labels: int64 `[N]`, from `read_labels`.
        hidden_labels: True classes of the unlabeled images, for study only: nothing is trained on them.
        views: The views made of an unlabeled image; a labeled one has the weak view.
        decode: `memory` or `stream`.
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
    ) -> None:
        self.labels, self.hidden_labels = torch.from_numpy(labels), hidden_labels
        self.views, self.settings, self.seed = tuple(views), settings, seed

        def reader(dataset: datasets.Dataset, role: str) -> PixelTable | ImageFiles:
            if decode == "memory":
                return PixelTable(dataset, image_column=image_column, size=settings.image_size, role=role)
            return ImageFiles(dataset, image_column=image_column, role=role)

        self.labeled = reader(labeled, "labeled")
        self.unlabeled = None if unlabeled is None else reader(unlabeled, "unlabeled")

    def __len__(self) -> int:
        return len(self.labeled) + (0 if self.unlabeled is None else len(self.unlabeled))

    def _read(
        self, images: PixelTable | ImageFiles, index: np.ndarray, draw: np.ndarray, views: Sequence[View], stream: int
    ) -> Tensor:
        if isinstance(images, PixelTable):
            return images.read(index)
        return images.read(index, draw, views, self.settings, seed=self.seed, stream=stream)

    def __getitems__(self, batch: PairedIndices) -> dict[str, Any]:
        """The whole batch at once: torch's loader calls this instead of `__getitem__`, once per batch."""
        out: dict[str, Any] = {
            "labeled_images": self._read(self.labeled, batch.labeled_index, batch.labeled_draw, (View.WEAK,), LABELED),
            "labels": self.labels[batch.labeled_index],
            # Draws stay numpy, and so on the CPU, where random numbers are made: an accelerator need not wait for them.
            "labeled_draws": batch.labeled_draw,
        }
        if self.unlabeled is not None:
            index, draw = batch.unlabeled_index, batch.unlabeled_draw
            out["unlabeled_images"] = self._read(self.unlabeled, index, draw, self.views, UNLABELED)
            out["unlabeled_draws"], out["unlabeled_index"] = draw, torch.from_numpy(index)
            if self.hidden_labels is not None:
                out["hidden_labels"] = torch.from_numpy(self.hidden_labels[index])
        return out


class EvaluationDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows of an evaluation split under the very transform that the published model's image processor applies."""

    def __init__(
        self, dataset: datasets.Dataset, labels: np.ndarray | None, *, image_column: str, transform: Any, role: str
    ) -> None:
        self._dataset = dataset.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
        self._column, self._labels, self._transform, self._role = image_column, labels, transform, role

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, row: int) -> dict[str, Any]:
        try:
            image = _decode(self._dataset[row][self._column])
        except (OSError, ValueError, SyntaxError) as error:
            raise _unreadable(self._role, row, error) from error
        item = {"pixel_values": self._transform(image)}
        return item if self._labels is None else {**item, "labels": int(self._labels[row])}


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Raise a ValueError unless files can be written to `folder`, which is made if need be."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        probe = Path(folder) / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"output_dir {folder} can't be written to ({error.strerror}): choose another folder."
        ) from error
