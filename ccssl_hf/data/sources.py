"""Sources of images: loads a split from an image folder, a table of file names, parquet files or the Hub."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import pyarrow as pa
import pyarrow.compute as pc
from datasets import config
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from datasets.table import InMemoryTable
from huggingface_hub.constants import HF_HUB_CACHE

from ..errors import listed, near_misses
from .files import TABLES, FoundFiles, find_images, is_hidden, parquet_files
from .images import version_of

SPLITS = {
    *("train", "training", "labeled", "labelled", "unlabeled", "unlabelled"),
    *("val", "valid", "validation", "dev", "eval", "evaluation", "test", "testing"),
}


@dataclass
class _FilesInfo(datasets.DatasetInfo):
    """Information about a dataset from files. It survives `select` and `shuffle`."""

    skipped: dict[str, list[str]] = field(default_factory=dict)


def skipped(dataset: datasets.Dataset) -> dict[str, list[str]]:
    """What `load_split` passed over: names relative to the folder, by reason. Empty for other datasets."""
    return getattr(dataset.info, "skipped", {})


def load_split(
    source: str | os.PathLike[str], *, role: str, image_root: str | os.PathLike[str] | None = None
) -> datasets.Dataset:
    """Load one split from an image folder, a table of file names, parquet files or the Hub.

    It reads every image of a folder. `load_dataset("imagefolder", data_dir=...)` does not: it takes words such as
    `train`, `test` and `val` in file and folder names for names of splits.

    `source` is an image folder (`<class>/**/<image>`: the class is the first folder below the root; or any folder with
    a `metadata.csv`, `.jsonl` or `.parquet`), a `.csv`, `.tsv` or `.jsonl` file with a column `file_name`, parquet
    files (a folder, a file or a glob), or a dataset on the Hub (`user/name` or `user/name:split`). An unlabeled image
    folder may be nested in any way, and its images get no labels. For what is skipped in a folder see `skipped`.

    `role` names the split: `labeled`, `unlabeled`, `validation` or `test`. It is the split to take from the Hub if
    `source` names none; `train` replaces a missing `labeled` or `unlabeled`.

    File names in tables and in parquet rows without bytes are relative to the folder of their file or, next, to
    `image_root`, and must stay inside of these folders. Links in them are followed.

    Raises:
        ValueError: `source` cannot be read or does not have that split, or it names files that are not there.
    """
    name, source, path = f"The {role} split '{source}'", str(source), Path(source).expanduser()
    root = None if image_root is None else os.path.abspath(Path(image_root).expanduser())
    if root is not None and not os.path.isdir(root):
        raise ValueError(f"image_root {image_root} is not a folder: name the folder that holds the images.")
    suffix = path.suffix.lower()
    files = sorted(glob.glob(glob.escape(str(path)) if path.exists() else str(path)))
    if path.is_dir():
        files, suffix = parquet_files(path), ".parquet"
        if not files:
            return _load_folder(name, os.path.abspath(path), root, role)
    files = [os.path.abspath(file) for file in files]
    if suffix in (".parquet", *TABLES) and not files:
        raise ValueError(f"{name} does not exist (no such {suffix[1:]} file): check the path.")
    if suffix in TABLES:
        return _load_tables(name, files, root, FoundFiles())
    if suffix == ".parquet":
        return _load_parquet(name, files, root, role)
    if path.exists() or path.is_absolute() or source.startswith((".", "/")) or source.count("/") > 1:
        fix = "give an image folder, parquet, csv or jsonl files, or a Hub dataset"
        raise ValueError(f"{name} is not a folder or parquet file: {fix}.")
    return _load_from_hub(name, source, role)


# ------------------------------------------------------------------------------------------------- folders and tables


def _load_folder(name: str, root: str, image_root: str | None, role: str) -> datasets.Dataset:
    found = find_images(Path(root)) or FoundFiles()
    if role != "unlabeled" and found.tables:
        return _load_tables(name, found.tables, image_root, found, root=root)
    if not found.images:
        problem = "has no images in this folder or below it: give a folder that holds image files"
        raise ValueError(f"{name} {problem}. {found.describe()}".rstrip())
    if role == "unlabeled":
        return _dataset(name, {"image": found.images}, {}, {}, found)
    start = len(os.path.join(root, ""))
    ends = [image.find(os.sep, start) for image in found.images]
    if stray := [image[start:] for image, end in zip(found.images, ends, strict=True) if end < 0]:
        fix = "sort images as <class>/<image>, or name their labels in metadata.csv"
        raise ValueError(f"{name} has images outside of class folders ({listed(stray)}): {fix}.")
    classes = [image[start:end] for image, end in zip(found.images, ends, strict=True)]
    number = {each: i for i, each in enumerate(sorted(set(classes)))}
    _check_class_folders(name, root, list(number), role)
    for folder in sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not is_hidden(entry.name)):
        if folder not in number:
            found.skip("class folders without images", folder)
    labels = np.fromiter((number[each] for each in classes), np.int64, len(classes))
    features = {"label": datasets.ClassLabel(names=list(number))}
    return _dataset(name, {"image": found.images}, {"label": labels}, features, found)


def _check_class_folders(name: str, root: str, classes: list[str], role: str) -> None:
    splits = [each for each in classes if each.casefold() in SPLITS]
    if len(splits) > 1 or splits == classes:
        fix = f"give one of them, such as {os.path.join(root, splits[0])}"
        raise ValueError(f"{name} has folders named like splits ({listed(splits)}) and not like classes: {fix}.")
    inner = os.path.join(root, classes[0])
    below = sorted(entry.name for entry in os.scandir(inner) if entry.is_dir() and not is_hidden(entry.name))
    if role == "labeled" and len(classes) == 1 and len(below) > 1:
        fix = f"if the folders in it ({listed(below)}) are the classes, give {inner}"
        raise ValueError(f"{name} has one class only ({classes[0]}): {fix}.")


def _dataset(
    name: str, files: dict[str, list[str]], columns: dict[str, Any], features: dict[str, Any], found: FoundFiles
) -> datasets.Dataset:
    """Image files and other columns as arrow columns, without an object per row."""
    found.tell(name)
    images = {key: _image_column(pa.array(paths, pa.string())) for key, paths in files.items()}
    features = {**{key: datasets.Image() for key in files}, **features}
    info = _FilesInfo(features=datasets.Features(features), builder_name="imagefolder", skipped=found.skipped)
    key = Hasher.hash([found.digest.hexdigest(), features])
    return datasets.Dataset(InMemoryTable(pa.table({**images, **columns})), info=info, fingerprint=key)


def _image_column(paths: pa.Array, content: pa.Array | None = None) -> pa.StructArray:
    content = pa.nulls(len(paths), pa.binary()) if content is None else content
    return pa.StructArray.from_arrays([content, paths], ["bytes", "path"])


def _load_tables(
    name: str, tables: Sequence[str], image_root: str | None, found: FoundFiles, *, root: str | None = None
) -> datasets.Dataset:
    """Rows of the files that tables name. `found` has the images of `root`, whose metadata the tables are."""
    files: dict[str, list[str]] = {}
    parts, resolver = [], _Names(image_root)
    for file in tables:
        where = f"{name}, {os.path.basename(file)}"
        try:
            table = _read_table(file)
        except (OSError, ValueError, pa.ArrowException) as error:  # pandas raises ValueErrors, too
            raise ValueError(f"{where} cannot be read ({str(error).splitlines()[0]}): write the file again.") from error
        names = [each for each in table.column_names if each == "file_name" or each.endswith("_file_name")]
        columns = {each: each.removesuffix("file_name").rstrip("_") or "image" for each in names}
        if not columns or {*columns.values()} & {*table.column_names}:
            problem = f"needs one column file_name and none named image (it has {', '.join(table.column_names)})"
            raise ValueError(f"{where} {problem}: rename its columns.")
        for column, key in columns.items():
            paths = table.column(column).to_pylist()
            files.setdefault(key, []).extend(resolver.resolve(paths, os.path.dirname(file)))
        parts.append(table.drop_columns([*columns]))
        found.digest.update(Path(file).read_bytes())
    counts = Counter(filter(None, files.get("image", ())))
    resolver.check(name, [file for file, count in counts.items() if count > 1])
    for file in sorted(set(found.images).difference(*files.values())):
        found.skip("images without a row in the metadata", os.path.relpath(file, root))
    try:
        rest = pa.concat_tables(parts, promote_options="default")
        features = datasets.Features.from_arrow_schema(rest.schema)
        return _dataset(name, files, dict(zip(rest.column_names, rest.columns, strict=True)), features, found)
    except pa.ArrowException as error:
        raise ValueError(f"{name} has metadata files of different columns ({error}): make them alike.") from error


def _read_table(file: str) -> pa.Table:
    """A table of file names. In a csv file, numbers are numbers; `01`, `NA` and `true` are text, and may be classes."""
    if file.endswith(".parquet"):
        return pa.Table.from_pandas(pd.read_parquet(file), preserve_index=False)
    if file.lower().endswith(".jsonl"):
        return pa.Table.from_pandas(pd.read_json(file, lines=True, dtype=False), preserve_index=False)
    with open(file, encoding="utf-8-sig") as lines:
        separator = max(",;\t", key=lines.readline().count)  # spreadsheets of some countries write semicolons
    words: dict[str, Any] = {"dtype": str, "keep_default_na": False, "na_values": [""], "skipinitialspace": True}
    frame = pd.read_csv(file, sep=separator, encoding="utf-8-sig", **words)
    for column in frame.columns:
        values = frame[column].dropna()
        numbers = len(values) > 0 and values.str.fullmatch(r"-?(0|[1-9]\d*)(\.\d+)?").all()
        if numbers and not column.endswith("file_name"):
            frame[column] = pd.to_numeric(frame[column])
    return pa.Table.from_pandas(frame, preserve_index=False)


# --------------------------------------------------------------------------------------------------------------- paths


class _Names:
    """Resolves the names of the files of a split, and collects those that cannot be read."""

    def __init__(self, image_root: str | None = None) -> None:
        self._further = () if image_root is None else (image_root,)
        self._outside: list[str] = []
        self._missing: list[str] = []

    def resolve(self, names: Iterable[Any], *folders: str) -> list[str]:
        """The absolute paths of file names relative to one of `folders` or, next, to `image_root`."""
        folders += self._further
        inside = tuple(os.path.join(folder, "") for folder in folders)
        paths: list[str] = []
        for row, name in enumerate(names):
            text = name if isinstance(name, str) else ""
            places = [os.path.normpath(os.path.join(folder, text)) for folder in folders]
            places = [place for place in places if place.startswith(inside) and "://" not in text]
            existing = [place for place in places if "\0" not in place and os.path.isfile(place)]
            if not existing:
                (self._missing if places or not text else self._outside).append(text or f"row {row} names none")
            paths.append(existing[0] if existing else "")
        return paths

    def check(self, split: str, repeated: Sequence[str] = ()) -> None:
        """Raise a ValueError that names all files that cannot be read, and those that are in several rows."""
        kinds = {
            "files outside of its folder and of image_root, or URLs, which are not opened": self._outside,
            "files that do not exist in its folder or in image_root": self._missing,
            "files in several rows": repeated,
        }
        told = [f"{what} ({len(files):,}): {listed(files)}" for what, files in kinds.items() if files]
        if told:
            raise ValueError(f"{split} has rows to correct or remove. It names {'; '.join(told)}.")


def _with_resolved_paths(dataset: datasets.Dataset, folders: Sequence[str], names: _Names) -> datasets.Dataset:
    """Resolve the paths of images that have no bytes. Other images are not read."""
    for column, feature in list(dataset.features.items()):
        if isinstance(feature, dict) and feature.keys() == {"bytes", "path"}:  # written without `datasets`
            dataset = dataset.cast_column(column, datasets.Image())
        elif not isinstance(feature, datasets.Image):
            continue
        table, chunks, resolved = dataset.data.table, [], []
        for chunk in table.column(column).chunks:
            content, paths = (pc.struct_field(chunk, key) for key in ("bytes", "path"))
            rows = pc.and_(pc.is_null(content), pc.is_valid(paths))
            if new := names.resolve(paths.filter(rows).to_pylist(), *folders):
                chunk = _image_column(pc.replace_with_mask(paths, rows, pa.array(new, pa.string())), content)
            chunks.append(chunk)
            resolved += new
        if resolved:
            table = table.set_column(table.column_names.index(column), column, pa.chunked_array(chunks))
            key = Hasher.hash([dataset._fingerprint, resolved])
            dataset = datasets.Dataset(InMemoryTable(table), info=dataset.info, split=dataset.split, fingerprint=key)
    return dataset


# ------------------------------------------------------------------------------------------------- parquet and the Hub


def _load_parquet(name: str, files: list[str], image_root: str | None, role: str) -> datasets.Dataset:
    stems = {re.split(r"[-_.]", os.path.basename(file))[0].casefold() for file in files}
    if len(splits := sorted(stems & SPLITS)) > 1 and role != "unlabeled":
        fix = f"give the files of one of them, such as '{os.path.dirname(files[0])}/{splits[0]}*.parquet'"
        raise ValueError(f"{name} has files of several splits ({listed(splits)}): {fix}.")
    parts, names = [], _Names(image_root)
    try:
        for folder, group in groupby(files, os.path.dirname):
            some = list(group)
            patterns = [glob.escape(file) for file in some]
            version = version_of(some)  # `datasets` would keep rows of a file that was written in place
            part = datasets.load_dataset("parquet", version, data_files={"train": patterns}, split="train")
            parts.append(_with_resolved_paths(part, [folder], names))
        dataset = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    except (DatasetGenerationError, ValueError) as error:  # Arrow's errors are ValueErrors
        raise ValueError(f"{name} cannot be read ({error.__cause__ or error}): write the file again.") from error
    names.check(name)
    return dataset


def _load_from_hub(name: str, source: str, role: str) -> datasets.Dataset:
    repository, _, split = source.partition(":")
    try:
        found = datasets.load_dataset(repository)
    except (OSError, ValueError, DatasetGenerationError) as error:
        raise ValueError(
            f"{name} is neither a path nor a dataset on the Hub ({type(error).__name__}: {error}): check the spelling "
            "and the network, or give an image folder or parquet files."
        ) from error
    # `train` never replaces validation or test: accuracy on training images would be too high.
    wanted = [split] if split else [role, "train"] if role in ("labeled", "unlabeled") else [role]
    for each in wanted:
        if each in found:
            caches, names = [config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, HF_HUB_CACHE], _Names()
            dataset = _with_resolved_paths(found[each], [os.path.abspath(cache) for cache in caches], names)
            names.check(name)
            return dataset
    missing = " or ".join(map(repr, wanted))
    raise ValueError(
        f"{name} does not exist: there is no split {missing} (only {', '.join(found)}); write {repository}:<split>."
        f"{near_misses(wanted[0], found)}"
    )
