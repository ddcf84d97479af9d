"""Labels and class names of a split, and a validation split from labeled images."""

from __future__ import annotations

import logging
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import listed, near_misses, warn
from .splits import feature_of

logger = logging.getLogger(__name__)

OUT_OF_DISTRIBUTION = -1
"""The label of an out-of-distribution (OOD) image, which shows none of the classes of the model."""

_TEXT = ("string", "large_string")
_NULL = np.iinfo(np.int64).min  # the number of a row without a label


def label_numbers(dataset: datasets.Dataset, column: str, role: str) -> tuple[list[str] | None, np.ndarray]:
    """The names of a label column, None for plain numbers, and the number of each row, int64 `[N]`.

    Null and blank names are below -1. Floating-point numbers must be whole, as pandas writes integers beside nulls.
    """
    argument = "hidden_label_column" if role == "unlabeled" else "label_column"
    feature = feature_of(dataset, column, role=role, argument=argument)
    names: list[str] | None = None
    kind, values = str(getattr(feature, "dtype", "")), dataset.data.column(column)
    if isinstance(feature, datasets.ClassLabel):
        names = feature.names
    elif kind in _TEXT:
        encoded = values.combine_chunks().dictionary_encode()
        names, values = encoded.dictionary.to_pylist(), encoded.indices
    elif not kind.startswith(("int", "uint", "bool", "null")) and not _are_whole(values):
        several = " to a column with one label per image" if "List" in str(feature) else ""
        raise ValueError(f"Column {column!r} of the {role} split holds {feature}, not labels: set {argument}{several}.")
    if kind.startswith("float"):
        values = pc.if_else(pc.is_nan(values), None, values)
    numbers = values.cast("int64").fill_null(_NULL).to_numpy(zero_copy_only=False)
    if dataset._indices is not None:  # shuffled or selected; `datasets` would read the rows one by one
        numbers = numbers[dataset._indices.column(0).to_numpy()]
    if names is not None and (blank := [number for number, name in enumerate(names) if not name.strip()]):
        numbers = np.where(np.isin(numbers, blank), _NULL, numbers)
    return names, numbers


def _are_whole(values: pa.ChunkedArray) -> bool:
    """Whether all values are whole numbers of a floating-point type, NaN and null apart."""
    if not pa.types.is_floating(values.type):
        return False
    numbers = values.cast("float64").to_numpy()
    return bool(np.all((numbers == np.round(numbers)) & np.isfinite(numbers) | np.isnan(numbers)))


def _aligned_numbers(numbers: np.ndarray, class_names: Sequence[str], where: str) -> tuple[list[str], np.ndarray]:
    """Names and numbers of plain whole numbers: numbers are names where all classes are numbers, else positions."""
    values = np.unique(numbers[numbers >= 0])
    if all(re.fullmatch(r"\d+", name) for name in class_names):
        shifted = [[int(name) + step for name in class_names] for step in (-1, 1)]
        if len(class_names) > 1 and sorted(values) in map(sorted, shifted):
            first = min(map(int, class_names))
            problem = f"holds {values[0]} to {values[-1]}, and the classes are numbered from {first}"
            raise ValueError(f"{where} {problem}: number the labels of all splits alike.")
        return [str(value) for value in values], np.where(numbers >= 0, np.searchsorted(values, numbers), numbers)
    if len(values) and values[0] == 1 and values[-1] == len(class_names):
        fix = "subtract 1, or replace them by class names"
        problem = f"holds 1 to {len(class_names)}, so its labels seem to start at 1 and not at 0"
        raise ValueError(f"{where} {problem}: {fix}.")
    return list(class_names), numbers


def _key(name: str) -> str:
    """Equal for names that people take for one: by Unicode form, case, spaces, hyphens, underscores, leading zeros."""
    name = unicodedata.normalize("NFC", name)
    if len(name) == 1:  # letters and signs are classes of their own: `a` and `A`, `-` and `_`
        return name
    if number := re.fullmatch(r"\s*(\d+)(\.0+)?\s*", name):
        return str(int(number[1]))
    words = re.sub(r"^[\s_]+|[\s_]+$", "", name)
    return unicodedata.normalize("NFC", re.sub(r"[\s_-]+", " ", words).casefold())


def _alike(names: Iterable[str], class_names: Iterable[str]) -> dict[str, str]:
    """Those of `names` that equal another name of `class_names` but for how they are written, and that name."""
    known = {_key(name): name for name in reversed(list(class_names))}
    return {name: known[_key(name)] for name in names if known.get(_key(name), name) != name}


def read_labels(
    dataset: datasets.Dataset, column: str, class_names: Sequence[str], *, role: str, allow_ood: bool
) -> np.ndarray:
    """Labels as indices into `class_names`, int64 `[N]`.

    Labels with names (a ClassLabel or text) are aligned by name, so splits may lack classes or have another order of
    classes. Whole numbers are positions in `class_names`; if all class names are numbers, they are aligned by name,
    too. With `allow_ood`, -1, null, blank names and names that are not in `class_names` become `OUT_OF_DISTRIBUTION`.

    Raises:
        ValueError: The column is missing or has no labels, or there are labels outside the classes. With `allow_ood`,
            also if a name and a class differ only by case, Unicode form, spaces, hyphens or underscores, or if no label
            is a class and some are names: these are probably misspelt.
    """
    names, numbers = label_numbers(dataset, column, role)
    if names is None:
        names, numbers = _aligned_numbers(numbers, class_names, f"Column {column!r} of the {role} split")
    position = {name: index for index, name in enumerate(class_names)}
    meaning = np.array([*(position.get(name, OUT_OF_DISTRIBUTION) for name in names), OUT_OF_DISTRIBUTION], np.int64)
    labels = meaning.take(numbers, mode="clip")  # numbers beyond the names take the last one
    labels[numbers < 0] = OUT_OF_DISTRIBUTION
    outside = (numbers != _NULL) & (numbers < OUT_OF_DISTRIBUTION) | (numbers >= len(names))
    wrong = outside if allow_ood else labels == OUT_OF_DISTRIBUTION
    if (labels == OUT_OF_DISTRIBUTION).all():  # misspelt names, or another dataset
        wrong = wrong | (numbers >= 0)
    used = {int(n): names[n] for n in np.unique(numbers[labels == OUT_OF_DISTRIBUTION]) if 0 <= n < len(names)}
    alike = _alike(used.values(), class_names)
    wrong = wrong | np.isin(numbers, [n for n, name in used.items() if name in alike])
    if wrong.any():
        stray = ["null" if n == _NULL else used.get(int(n), str(n)) for n in np.unique(numbers[wrong])]
        rows = listed(np.flatnonzero(wrong))
        fix = f"drop those rows, or build the model with their classes in labels=[...] (rows {rows})."
        if alike:
            same = listed(f"{name!r} as {other!r}" for name, other in alike.items())
            fix = f"write {same}. Case, Unicode form, spaces, hyphens and underscores do not distinguish classes."
        raise ValueError(
            f"{int(wrong.sum())} labels of the {role} split are not among the {len(class_names)} classes "
            f"({listed(stray)}): {fix}{near_misses(stray[0], class_names)}"
        )
    return labels


def read_class_names(dataset: datasets.Dataset, column: str) -> list[str]:
    """The classes of the labeled split: the names of a ClassLabel, or the sorted distinct texts or whole numbers.

    Raises:
        ValueError: The column is missing or has no labels, names fewer than two classes, a class without a name, or
            classes whose names differ only by case, Unicode form, spaces, hyphens or underscores.
    """
    names, numbers = label_numbers(dataset, column, "labeled")
    if names is None:
        names = [str(number) for number in np.unique(numbers[numbers >= 0])]
    elif isinstance(dataset.features[column], datasets.ClassLabel):
        names = list(names)
    else:
        names = sorted(names[number] for number in np.unique(numbers[numbers >= 0]))
    if blank := [number for number, name in enumerate(names) if not name.strip()]:
        raise ValueError(f"Classes of the labeled split have no name (numbers {listed(blank)}): name them.")
    if alike := _alike(names, names):
        same = listed(f"{name!r} and {other!r}" for name, other in alike.items())
        fix = "give them one name, or names that differ by more than case, Unicode form, spaces, hyphens or underscores"
        raise ValueError(f"The labeled split has class names that look like one ({same}): {fix}.")
    if len(names) < 2:
        fix = "label images of two or more"
        if (numbers == OUT_OF_DISTRIBUTION).any():
            fix += ", and not with -1, which means no class"
        raise ValueError(f"The labeled split has one class only ({', '.join(names) or 'none'}): {fix}.")
    return names


def split_validation(
    dataset: datasets.Dataset, fraction: float, *, label_column: str = "label", seed: int = 0
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Split labeled images into a labeled and a validation split, stratified by class, and log the counts.

    Args:
        fraction: Share of the images that go to the validation split, in (0, 1).
        seed: The same seed gives the same split.

    Raises:
        ValueError: A class would keep no labeled image, or the validation split has fewer images than classes.
    """
    from sklearn.model_selection import train_test_split  # takes half a second, and few runs need it

    if not 0 < fraction < 1:
        raise ValueError(f"The fraction of validation images is {fraction}: choose a value between 0 and 1.")
    names = read_class_names(dataset, label_column)
    labels = read_labels(dataset, label_column, names, role="labeled", allow_ood=False)
    counts = np.bincount(labels, minlength=len(names))
    kept, taken, used = np.arange(len(labels)), np.arange(0), np.count_nonzero(counts)
    poor = counts == 1  # scikit-learn refuses a class of one image
    if not poor.any() and used <= math.ceil(fraction * len(labels)) <= len(labels) - used:
        kept, taken = train_test_split(kept, test_size=fraction, random_state=seed, stratify=labels)
        poor = (counts > 0) & (np.bincount(labels[kept], minlength=len(names)) == 0)
    if poor.any():
        problem = f"{poor.sum()} classes would keep no labeled image ({listed(np.array(names)[poor])})"
        raise ValueError(f"{problem}: label more images of them, or give a validation split.")
    if not len(taken):
        problem = f"A fraction of {fraction:g} of {len(labels)} labeled images does not suit {used} classes"
        raise ValueError(f"{problem}, which need an image in both splits: change it, or give a validation split.")
    found = np.bincount(labels[taken], minlength=len(names))
    by_class = listed((f"{name} {found[i]} of {counts[i]}" for i, name in enumerate(names)), limit=50)
    told = "The validation split is %d of the %d labeled images, drawn by class with seed %d: %s."
    warn(logger, told, len(taken), len(labels), seed, by_class)
    return dataset.select(np.sort(kept)), dataset.select(np.sort(taken))
