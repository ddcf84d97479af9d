"""What a run's splits hold, found before it starts: images, classes, duplicates, and what cannot be read.

It reads labels, the sizes of files and the headers of images. The labeled and evaluation splits are decoded once: a
run must not stop at a damaged image hours later.
"""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import PIL
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from .data import OUT_OF_DISTRIBUTION, check_images, read_labels
from .images import MAX_PIXELS, content_hashes, encoded_images, unreadable
from .sources import skipped

logger = logging.getLogger(__name__)

TRAINING = ("labeled", "unlabeled")
NAMED = 10  # names in a sentence; errors name all
HEADERS = 20_000  # images of a split whose headers are read, evenly spread over the rows
_SAMPLE = 1 << 14  # bytes in the middle of a file that are compared before whole files


class Finding(NamedTuple):
    """A sentence about a split. `kind` is `error` (training cannot start), `warning` (probably a mistake) or `note`."""

    kind: str
    split: str
    text: str


@dataclass
class SplitSurvey:
    """What one split holds."""

    images: int
    per_class: dict[str, int] | None = None  # images of each class of the model that occurs; None: no labels were read
    ood: dict[str, int] = field(default_factory=dict)  # images by a name that is no class; "": no label
    unreadable: list[str] = field(default_factory=list)  # path or row, and reason
    skipped: dict[str, list[str]] = field(default_factory=dict)  # reason to the names of files that were left out
    headers: int = 0  # images whose size in pixels was read
    small: int = 0  # those with a side below half of the training size
    smallest: tuple[int, int] | None = None  # width and height of the smallest of them
    in_training: int = 0  # images of an evaluation split that a training split has, too

    def facts(self) -> dict[str, Any]:
        """The numbers for the card, by the fields of `record.Split`. Names of files stay here."""
        counts = self.per_class or {}
        found: dict[str, Any] = {} if self.per_class is None else {"classes": len(counts)}
        for key, pick in ("fewest", min), ("most", max):
            if counts:
                found[f"{key}_class"] = name = pick(counts, key=counts.__getitem__)
                found[key] = counts[name]
        numbers = dict(in_training=self.in_training, small=self.small, unreadable=len(self.unreadable))
        return found | {
            "ood_images": sum(self.ood.values()),
            **numbers,
            "skipped": sum(map(len, self.skipped.values())),
        }


@dataclass
class Survey:
    """What all splits hold, by name, and sentences about it."""

    splits: dict[str, SplitSurvey] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def add(self, kind: str, split: str, text: str) -> None:
        self.findings.append(Finding(kind, split, text))

    def texts(self, kind: str, splits: Collection[str] | None = None) -> list[str]:
        """The sentences of one kind, about some splits or all."""
        return [each.text for each in self.findings if each.kind == kind and (splits is None or each.split in splits)]

    def errors(self) -> list[str]:
        """Why training cannot start."""
        return self.texts("error")

    def table(self, splits: Collection[str] | None = None) -> str:
        """One row for each split, as text. A column of zeros is left out."""
        rows = [
            [
                "split",
                "images",
                "classes",
                "fewest per class",
                "most per class",
                "OOD",
                "in training",
                "small",
                "unreadable",
                "skipped",
            ]
        ]
        for name, split in self.splits.items():
            facts = split.facts()
            names = {key: " ".join(facts.get(f"{key}_class", "").split()) for key in ("fewest", "most")}
            extremes = [f"{facts[key]} ({name})" if key in facts else "" for key, name in names.items()]
            counts = [str(facts[key] or "") for key in ("ood_images", "in_training", "small", "unreadable", "skipped")]
            if splits is None or name in splits:
                rows.append([name, str(split.images), str(facts.get("classes", "")), *extremes, *counts])
        columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
        widths = [max(map(len, column)) for column in columns]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in zip(*columns, strict=True))


def announce(found: Survey, splits: Collection[str], *, show: bool = True) -> None:
    """Print the table and the notes about some splits, and log warnings. Raises ValueError with all errors."""
    if show:
        print(f"\n{found.table(splits)}\n", *found.texts("note", splits), sep="\n", flush=True)
        for text in found.texts("warning", splits):
            logger.warning(text)
    if errors := found.texts("error", splits):
        raise ValueError("\n".join(errors))


def named(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def count_of(count: int, what: str) -> str:
    """`1 image`, `2 images`."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def ood_sentence(ood: Mapping[str, int], split: str) -> str:
    """How many images of a split count as OOD, with the names that are no class of the model."""
    counts = [
        f"{name} ({count:,})" for name, count in sorted(ood.items(), key=lambda item: (-item[1], item[0])) if name
    ]
    counts += [f"no label ({ood['']:,})"] if "" in ood else []
    total = sum(ood.values())
    verbs = "shows no class of the model and counts" if total == 1 else "show no class of the model and count"
    return f"{count_of(total, 'image')} of the {split} split {verbs} as out-of-distribution (OOD): {named(counts)}."


def count_labels(
    dataset: datasets.Dataset, column: str, labels: np.ndarray, class_names: Sequence[str]
) -> tuple[dict[str, int], dict[str, int]]:
    """Images of each class, and images by a name that is no class. `labels` `[N]` come from `read_labels`."""
    counts = np.bincount(labels[labels != OUT_OF_DISTRIBUTION], minlength=len(class_names)).tolist()
    others = dataset.select_columns([column]).with_format(None).select(np.flatnonzero(labels == OUT_OF_DISTRIBUTION))
    names = getattr(dataset.features[column], "names", None)
    ood: Counter[str] = Counter()
    for value in others[column]:
        named_number = value is not None and not isinstance(value, str) and value >= 0
        ood[names[value] if names is not None and named_number else value if isinstance(value, str) else ""] += 1
    return {name: count for name, count in zip(class_names, counts, strict=True) if count}, dict(ood)


def in_threads(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """`function` of all items: files may lie on a disk that answers slowly."""
    with ThreadPoolExecutor(min(16, 4 * (os.cpu_count() or 1))) as pool:
        return list(pool.map(function, items))


class _Encoded:
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
            return found.st_size, found.st_mtime_ns
        return -1, 0

    def _path(self, row: int) -> str:
        return self._paths[int(self._rows[row])].as_py() or ""

    def _open(self, row: int) -> Any:
        content = self._bytes[int(self._rows[row])]
        return pa.BufferReader(content.as_buffer()) if content.is_valid else open(self._path(row), "rb")

    def name(self, row: int) -> str:
        return self._path(row) or f"row {row}"

    def sample(self, row: int) -> bytes:
        """A hash of some bytes in the middle: of files of one length, nearly all differ there."""
        with suppress(OSError), self._open(row) as file:
            file.seek(max(0, (int(self.lengths[row]) - _SAMPLE) // 2))
            return hashlib.blake2b(file.read(_SAMPLE), digest_size=16).digest()
        return b""

    def size(self, row: int) -> tuple[int, int] | str:
        """Width and height from the header, or why it cannot be read."""
        try:
            with self._open(row) as file, Image.open(file) as image:
                return image.size
        except PIL.UnidentifiedImageError:
            return "unknown format"
        except Exception as error:  # Pillow raises nearly any type of error for a broken file
            return f"{type(error).__name__}: {error}"


def _broken_images(dataset: datasets.Dataset, column: str, files: _Encoded, max_pixels: int) -> list[str]:
    """The images that cannot be decoded, with reasons. A file in the cache marks a split that has none."""
    facts = repr([dataset._fingerprint, column, max_pixels, PIL.__version__]).encode()
    key = hashlib.sha256(facts + files.lengths.tobytes() + files.changed.tobytes()).hexdigest()[:32]
    mark = Path(datasets.config.HF_DATASETS_CACHE) / "ccssl_hf" / "readable" / key
    if mark.is_file():
        return []
    found = [f"{path}: {reason}" for _, path, reason in unreadable(dataset, column, max_pixels=max_pixels)]
    if not found:
        with suppress(OSError):  # without the mark, the next run decodes again
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
    return found


def survey(
    splits: Mapping[str, datasets.Dataset],
    class_names: Sequence[str] | None,
    *,
    image_column: str = "image",
    label_column: str | None = "label",
    hidden_label_column: str | None = None,
    image_size: int | None = None,
    max_pixels: int = MAX_PIXELS,
    decode: Collection[str] | None = None,
) -> Survey:
    """Look at all splits, by name: `labeled`, `unlabeled`, and evaluation splits of any name.

    Args:
        class_names: The classes of the model. None: labels are not read.
        hidden_label_column: Column of the unlabeled images' true classes.
        image_size: The shorter side that training uses, in pixels. None: sizes are not compared.
        max_pixels: Images of more pixels count as unreadable.
        decode: Splits of which every image is decoded. Of others only headers are read, and what is unreadable is no
            error. None: all but `unlabeled`.
    """
    found, files, labels = Survey(), dict[str, _Encoded](), dict[str, np.ndarray]()
    for name, dataset in splits.items():
        try:
            check_images(dataset, role=name, image_column=image_column)
        except ValueError as error:
            found.add("error", name, str(error))
            continue
        files[name] = _Encoded(dataset, image_column)
        split = found.splits[name] = SplitSurvey(len(dataset), skipped=skipped(dataset))
        column = hidden_label_column if name == "unlabeled" else label_column
        if class_names is not None and column is not None:
            try:
                labels[name] = read_labels(dataset, column, class_names, role=name, allow_ood=name != "labeled")
                split.per_class, split.ood = count_labels(dataset, column, labels[name], class_names)
            except ValueError as error:
                found.add("error", name, str(error))
        whole = name != "unlabeled" if decode is None else name in decode
        _read_headers(split, files[name], image_size, max_pixels)
        if whole:
            split.unreadable = _broken_images(dataset, image_column, files[name], max_pixels)
        _describe(found, name, class_names or (), image_size, whole)
    known = {name: values for name, values in labels.items() if name != "unlabeled"}
    groups = _copies(files, splits, known, image_column)
    _describe_copies(found, groups, files, known, [*(class_names or ()), "no class"])
    return found


def _read_headers(split: SplitSurvey, files: _Encoded, image_size: int | None, max_pixels: int) -> None:
    """Counts small images, and those that cannot be opened or have too many pixels."""
    rows = np.unique(np.linspace(0, split.images - 1, min(split.images, HEADERS)).round().astype(int)).tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # pixels are counted here
        sizes = in_threads(files.size, rows)
    for row, size in zip(rows, sizes, strict=True):
        if isinstance(size, tuple) and size[0] * size[1] <= max_pixels:
            split.headers += 1
            if image_size is not None and 2 * min(size) < image_size:
                split.small += 1
                split.smallest = min(split.smallest or size, size, key=min)
        else:
            reason = size if isinstance(size, str) else f"too large: {size[0]} x {size[1]} pixels"
            split.unreadable.append(f"{files.name(row)}: {reason}")


def _describe(found: Survey, name: str, classes: Sequence[str], image_size: int | None, whole: bool) -> None:
    """Sentences about one split."""
    split = found.splits[name]
    if count := len(split.unreadable):
        text = f"The {name} split has {count_of(count, 'unreadable image')}"
        fix = "Repair or remove them, or drop such rows with ccssl_hf.data.drop_unreadable(dataset)"
        if whole:
            found.add("error", name, "\n  ".join([f"{text}. {fix}:", *split.unreadable]))
        else:
            found.add("warning", name, f"{text}: {named(split.unreadable)}.")
    if split.ood and not split.per_class and set(split.ood) == {""}:
        found.add("note", name, f"The {name} split has no labels.")
    elif split.ood:
        found.add("note", name, ood_sentence(split.ood, name))
    if split.per_class and (missing := [each for each in classes if each not in split.per_class]):
        text = f"The {name} split has no image of {len(missing)} of the {len(classes)} classes: {named(missing)}."
        found.add("warning" if name == "labeled" else "note", name, text)
    if split.smallest:
        looked = f" among {split.headers:,}" if split.images > HEADERS else ""
        size = f"much smaller than the training size of {image_size} px (the smallest: {split.smallest[0]} x "
        text = f"The {name} split has {count_of(split.small, 'image')}{looked} {size}{split.smallest[1]} px)."
        found.add("warning", name, text)
    for reason, names in split.skipped.items():
        text = f"{count_of(len(names), 'file')} in the folder of the {name} split left out ({reason}): {named(names)}."
        found.add("note", name, text)


_Place = tuple[str, int]  # split and row


def _copies(
    files: Mapping[str, _Encoded], splits: Mapping[str, datasets.Dataset], labels: Mapping[str, np.ndarray], column: str
) -> list[list[_Place]]:
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

    def repeated(keys: Mapping[str, Sequence[bytes]]) -> list[list[_Place]]:
        groups: dict[bytes, list[_Place]] = {}
        for name, of_rows in keys.items():
            for row, key in zip(rows[name], of_rows, strict=True):
                groups.setdefault(key, []).append((name, row))
        return [group for group in groups.values() if len(group) > 1]

    alike = repeated({name: in_threads(own.sample, rows[name]) for name, own in files.items()})
    rows = {name: [row for each, row in chain.from_iterable(alike) if each == name] for name in files}
    return repeated({name: content_hashes(splits[name].select(some), column) for name, some in rows.items() if some})


def _describe_copies(
    found: Survey,
    groups: Sequence[Sequence[_Place]],
    files: Mapping[str, _Encoded],
    labels: Mapping[str, np.ndarray],
    classes: Sequence[str],
) -> None:
    """Sentences about images that are in two splits, or in one split with two labels."""
    order = list(files)
    shared: dict[tuple[str, str], list[str]] = {}  # (split, other split): images of the first
    conflicts: dict[str, list[str]] = {}
    for group in groups:
        where: dict[str, list[int]] = {}
        for name, row in group:
            where.setdefault(name, []).append(row)
        for name, rows in where.items():
            if name not in TRAINING and not where.keys().isdisjoint(TRAINING):
                found.splits[name].in_training += len(rows)
            for other in where:
                earlier = other in TRAINING or order.index(other) < order.index(name)
                if other != name and (earlier if name not in TRAINING else (name, other) == TRAINING):
                    shared.setdefault((name, other), []).extend(map(files[name].name, rows))
            numbers = labels[name][rows].tolist() if name in labels else []
            if len(set(numbers)) > 1:
                both = (f"{files[name].name(row)} ({classes[n]})" for row, n in zip(rows, numbers, strict=True))
                conflicts.setdefault(name, []).append(" = ".join(both))
    for name, pairs in conflicts.items():
        text = f"The {name} split has {count_of(len(pairs), 'image')} with different labels: {named(pairs)}."
        found.add("warning", name, f"{text} Keep the right one of each.")
    for (name, other), names in shared.items():
        text = f"The {name} split shares {count_of(len(names), 'image')} with the {other} split"
        if name in TRAINING:
            found.add("note", name, f"{text}, which does no harm.")
        else:
            text = f"{text}, so its results will be too high: {named(names)}. Remove them from one of the two."
            found.add("warning", name, text)
