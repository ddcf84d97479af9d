"""What a run's splits hold, found before it starts: images, classes, duplicates, and what cannot be read.

It reads labels, the sizes of files and the headers of images. The labeled and evaluation splits are decoded once: a
run must not stop at a damaged image hours later.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import PIL
from PIL import Image

from ..distributed import on_main_process, rank
from ..errors import UserError, in_lines, listed
from ..escape import printable
from .copies import Place, find_copies
from .images import MAX_PIXELS, UNREADABLE_LIMIT, EncodedImages, in_threads, unreadable
from .labels import OUT_OF_DISTRIBUTION, label_numbers, read_labels
from .sources import skipped
from .splits import check_images

logger = logging.getLogger(__name__)

TRAINING = ("labeled", "unlabeled")
_COLUMNS = "split|images|classes|fewest per class|most per class|OOD|in training|small|unreadable|skipped"
HEADERS = 20_000  # images of a split whose headers are read, evenly spread over the rows

_READER = 1
"""Increase it when `images.open_image` refuses other images, so that all splits are decoded again."""


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
        found |= dict(ood_images=sum(self.ood.values()), in_training=self.in_training, small=self.small)
        return found | dict(unreadable=len(self.unreadable), skipped=sum(map(len, self.skipped.values())))


@dataclass
class Survey:
    """What all splits hold, by name, and sentences about it."""

    splits: dict[str, SplitSurvey] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def add(self, kind: str, split: str, text: str) -> None:
        self.findings.append(Finding(kind, split, printable(text, lines=True)))

    def texts(self, kind: str, splits: Collection[str] | None = None) -> list[str]:
        """The sentences of one kind, about some splits or all."""
        return [each.text for each in self.findings if each.kind == kind and (splits is None or each.split in splits)]

    def errors(self) -> list[str]:
        """Why training cannot start."""
        return self.texts("error")

    def table(self, splits: Collection[str] | None = None) -> str:
        """One row for each split, as text. A column of zeros is left out."""
        rows = [_COLUMNS.split("|")]
        for name, split in self.splits.items():
            facts = split.facts()
            names = {key: " ".join(facts.get(f"{key}_class", "").split()) for key in ("fewest", "most")}
            extremes = [f"{facts[key]} ({name})" if key in facts else "" for key, name in names.items()]
            counts = [str(facts[key] or "") for key in ("ood_images", "in_training", "small", "unreadable", "skipped")]
            if splits is None or name in splits:
                rows.append([name, str(split.images), str(facts.get("classes", "")), *extremes, *counts])
        columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
        widths = [max(map(len, column)) for column in columns]
        lines = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in zip(*columns, strict=True))
        return printable("\n".join(lines), lines=True)


class RunSurvey:
    """Surveys the splits of a run. Every process calls it; the main process looks at the images and prints."""

    def __init__(self, training: Mapping[str, Any], class_names: Sequence[str], *, show: bool, **settings: Any) -> None:
        """`show`: whether to print. `settings` are those of `survey`."""
        self._show = show and rank() == 0
        self._training = {name: split for name, split in training.items() if split is not None}
        self._class_names, self._settings = class_names, settings
        self._found: dict[str, SplitSurvey] = {}  # by the fingerprint of the dataset

    def facts(self, split: datasets.Dataset) -> dict[str, Any]:
        """The numbers for the card; empty for a split that was not looked at."""
        found = self._found.get(split._fingerprint)
        return {} if found is None else found.facts()

    def of_all(self, evaluation: Mapping[str, datasets.Dataset]) -> Survey:
        """Survey all splits. Raises UserError if a split cannot be used."""
        return self._run(evaluation, [*self._training])

    def of_new(self, name: str, split: datasets.Dataset, **settings: Any) -> None:
        """Survey an evaluation split, unless it was looked at. Raises UserError if it cannot be used."""
        if split._fingerprint not in self._found:
            self._run({name: split}, [], decode=[self._name(name)], **settings)

    def _name(self, split: str) -> str:
        return f"evaluation {split}" if split in TRAINING else split

    def _run(self, evaluation: Mapping[str, Any], shown: list[str], **settings: Any) -> Survey:
        splits = self._training | {self._name(name): split for name, split in evaluation.items()}
        shown += map(self._name, evaluation)
        found = on_main_process(partial(survey, splits, self._class_names, **{**self._settings, **settings}))
        announce(found, shown, show=self._show)
        self._found |= {splits[name]._fingerprint: found.splits[name] for name in shown}
        return found


def announce(found: Survey, splits: Collection[str] | None = None, *, show: bool = True) -> None:
    """Print the table and the notes about some splits or all, and log warnings. Raises UserError with all errors."""
    if show:
        if found.splits:
            print(f"\n{found.table(splits)}\n", *found.texts("note", splits), sep="\n", flush=True)
        for text in found.texts("warning", splits):
            logger.warning(text)
    if errors := found.texts("error", splits):
        raise UserError("\n".join(errors))


def size_errors(labeled: int, unlabeled: int | None, *, batch: int, mu: int, repeat_labeled: bool) -> Iterator[str]:
    """Why splits are too small for a batch of `batch` labeled and `mu` times as many unlabeled images."""
    if labeled < batch and not repeat_labeled:
        yield (
            f"{labeled} labeled images are fewer than a batch of {batch}: lower per_device_train_batch_size, or set "
            "repeat_labeled=True to repeat images within a batch."
        )
    if unlabeled is not None and unlabeled < mu * batch:
        yield (
            f"{unlabeled} unlabeled images are fewer than the {mu * batch} of a step: lower mu or "
            "per_device_train_batch_size."
        )


def count_of(count: int, what: str) -> str:
    """`1 image`, `2 images`."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def unreadable_images(split: str, images: Sequence[str], most: int | None = None, note: str = "") -> list[str]:
    """An error that names unreadable images of a split, all or up to `most`, a line each; nothing if there are none."""
    fix = "Repair or remove them, or drop such rows with ccssl_hf.data.drop_unreadable(dataset)"
    count = count_of(len(images), "unreadable image")
    return [f"The {split} split has {count}{note}. {fix}:{in_lines(images, most)}"] if images else []


def ood_sentence(ood: Mapping[str, int], split: str) -> str:
    """How many images of a split count as OOD, with the names that are no class of the model."""
    by_count = sorted(ood.items(), key=lambda item: (not item[0], -item[1], item[0]))
    counts = [f"{name or 'no label'} ({count:,})" for name, count in by_count]
    total = sum(ood.values())
    verbs = "shows no class of the model and counts" if total == 1 else "show no class of the model and count"
    return f"{count_of(total, 'image')} of the {split} split {verbs} as out-of-distribution (OOD): {listed(counts)}."


def count_labels(
    dataset: datasets.Dataset, column: str, labels: np.ndarray, class_names: Sequence[str]
) -> tuple[dict[str, int], dict[str, int]]:
    """Images of each class, and images by a name that is no class. `labels` `[N]` come from `read_labels`."""
    counts = np.bincount(labels[labels != OUT_OF_DISTRIBUTION], minlength=len(class_names)).tolist()
    names, numbers = label_numbers(dataset, column, "evaluation")
    ood: Counter[str] = Counter()
    for number, count in zip(*np.unique(numbers[labels == OUT_OF_DISTRIBUTION], return_counts=True), strict=True):
        ood["" if number < 0 else names[number].strip() if names else str(number)] += int(count)
    return {name: count for name, count in zip(class_names, counts, strict=True) if count}, dict(ood)


def _broken_images(dataset: datasets.Dataset, column: str, files: EncodedImages, max_pixels: int) -> list[str]:
    """The images that cannot be decoded, with reasons. A file in the cache marks a split that has none."""
    facts = repr([dataset._fingerprint, column, max_pixels, PIL.__version__, _READER]).encode()
    key = hashlib.sha256(facts + files.states.tobytes()).hexdigest()[:32]
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
    skip_bad: bool = True,
    decode: Collection[str] | None = None,
) -> Survey:
    """Look at all splits, by name: `labeled`, `unlabeled`, and evaluation splits of any name.

    Args:
        class_names: The classes of the model. None: labels are not read.
        hidden_label_column: Column of the unlabeled images' true classes.
        image_size: The shorter side that training uses, in pixels. None: sizes are not compared.
        max_pixels: Images of more pixels count as unreadable.
        skip_bad: Whether training skips unreadable unlabeled images. Otherwise they are an error, too.
        decode: Splits of which every image is decoded; others are only searched for copies of them. None: all, but of
            `unlabeled` only headers are read.
    """
    found, files, labels = Survey(), dict[str, EncodedImages](), dict[str, np.ndarray]()
    for name, dataset in splits.items():
        try:
            check_images(dataset, role=name, image_column=image_column)
        except ValueError as error:
            found.add("error", name, str(error))
            continue
        files[name] = EncodedImages(dataset, image_column)
        split = found.splits[name] = SplitSurvey(len(dataset), skipped=skipped(dataset))
        column = hidden_label_column if name == "unlabeled" else label_column
        if class_names is not None and column is not None:
            try:
                labels[name] = read_labels(dataset, column, class_names, role=name, allow_ood=name != "labeled")
                split.per_class, split.ood = count_labels(dataset, column, labels[name], class_names)
            except ValueError as error:
                found.add("error", name, str(error))
        whole = name != "unlabeled" if decode is None else name in decode
        must = name != "unlabeled" or not skip_bad
        if whole or decode is None:
            _read_headers(split, files[name], image_size, max_pixels)
        if whole:
            split.unreadable = _broken_images(dataset, image_column, files[name], max_pixels)
        _describe(found, name, class_names or (), image_size, must)
    known = {name: values for name, values in labels.items() if name != "unlabeled"}
    _describe_copies(found, find_copies(files, known), files, known, [*(class_names or ()), "no class"])
    return found


def _read_headers(split: SplitSurvey, files: EncodedImages, image_size: int | None, max_pixels: int) -> None:
    """Counts small images, and those that cannot be opened or have too many pixels."""
    rows = np.unique(np.linspace(0, split.images - 1, min(split.images, HEADERS)).round().astype(int)).tolist()
    if max_pixels > MAX_PIXELS and Image.MAX_IMAGE_PIXELS is not None:  # as in `open_image`
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    for row, size in zip(rows, in_threads(files.dimensions, rows, "Reading headers"), strict=True):
        if isinstance(size, tuple) and size[0] * size[1] <= max_pixels:
            split.headers += 1
            if image_size is not None and 2 * min(size) < image_size:
                split.small += 1
                split.smallest = min(split.smallest or size, size, key=min)
        else:
            reason = size if isinstance(size, str) else f"too large: {size[0]} x {size[1]} pixels"
            split.unreadable.append(f"{files.name(row)}: {reason}")


def _describe(found: Survey, name: str, classes: Sequence[str], image_size: int | None, must: bool) -> None:
    """Sentences about one split."""
    split = found.splits[name]
    if must or len(split.unreadable) > UNREADABLE_LIMIT * min(split.images, HEADERS):
        some = () if must else (10, f", more than {UNREADABLE_LIMIT:.0%}")
        for text in unreadable_images(name, split.unreadable, *some):
            found.add("error", name, text)
    elif split.unreadable:
        count = count_of(len(split.unreadable), "unreadable image")
        found.add("warning", name, f"The {name} split has {count}: {listed(split.unreadable)}.")
    if split.ood and not split.per_class and set(split.ood) == {""}:
        found.add("note", name, f"The {name} split has no labels.")
    elif split.ood:
        found.add("note", name, ood_sentence(split.ood, name))
    if split.per_class and (missing := [each for each in classes if each not in split.per_class]):
        text = f"The {name} split has no image of {len(missing)} of the {len(classes)} classes: {listed(missing)}."
        found.add("warning" if name == "labeled" else "note", name, text)
    if split.smallest:
        looked = f" among {split.headers:,}" if split.images > HEADERS else ""
        size = f"much smaller than the training size of {image_size} px (the smallest: {split.smallest[0]} x "
        text = f"The {name} split has {count_of(split.small, 'image')}{looked} {size}{split.smallest[1]} px)."
        found.add("warning", name, text)


def _describe_copies(
    found: Survey,
    groups: Sequence[Sequence[Place]],
    files: Mapping[str, EncodedImages],
    labels: Mapping[str, np.ndarray],
    classes: Sequence[str],
) -> None:
    """Sentences about images that are in two splits, or in one split with two labels."""
    order = [*sorted(TRAINING, reverse=True), *(name for name in files if name not in TRAINING)]
    shared: dict[tuple[str, str], list[str]] = {}  # (split, earlier split): images of the first
    conflicts: dict[str, list[str]] = {}
    for group in groups:
        where = {split: rows for split in order if (rows := [row for name, row in group if name == split])}
        for other, name in combinations(where, 2):
            shared.setdefault((name, other), []).extend(map(files[name].name, where[name]))
        for name, rows in where.items():
            if name not in TRAINING and not where.keys().isdisjoint(TRAINING):
                found.splits[name].in_training += len(rows)
            numbers = labels[name][rows].tolist() if name in labels else []
            if len(set(numbers)) > 1:
                both = [f"{files[name].name(row)} ({classes[n]})" for row, n in zip(rows, numbers, strict=True)]
                conflicts.setdefault(name, []).append(" = ".join(both[:3]) + " = ..." * (len(both) > 3))
    for name, pairs in conflicts.items():
        text = f"The {name} split has {count_of(len(pairs), 'image')} with different labels: {listed(pairs)}."
        found.add("warning", name, f"{text} Keep the right one of each.")
    for (name, other), names in shared.items():
        text = f"The {name} split shares {count_of(len(names), 'image')} with the {other} split"
        if other in TRAINING and name not in TRAINING:
            text = f"{text}, so its results will be too high: {listed(names)}. Remove them from one of the two."
            found.add("warning", name, text)
        else:
            found.add("note", name, text + (", which does no harm." if name in TRAINING else "."))
