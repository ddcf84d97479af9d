"""Sources of images: loads a split from an image folder, parquet files or the Hub."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder


def load_split(source: str | os.PathLike[str], *, role: str) -> datasets.Dataset:
    """Load one split from an image folder, parquet files or the Hub.

    It reads every image of a folder. `load_dataset("imagefolder", data_dir=...)` does not: it takes words such as
    `train`, `test` and `val` in file and folder names for names of splits.

    `source` is an image folder (`<class>/<image>`: the label is the name of the folder that holds the image), parquet
    files (a folder, a file or a glob), or a dataset on the Hub (`user/name` or `user/name:split`).

    `role` names the split: `labeled`, `unlabeled`, `validation` or `test`. It is the split to take from the Hub if
    `source` names none; `train` replaces a missing `labeled` or `unlabeled`. An unlabeled image folder may be nested in
    any way, and its images get no labels.

    Raises:
        ValueError: `source` cannot be read or does not have that split.
    """
    name, source, path = f"The {role} split '{source}'", str(source), Path(source).expanduser()
    escaped = glob.escape(path.as_posix()) if path.exists() else path.as_posix()
    if path.is_dir() and not any(path.glob("*.parquet")):
        return _load_image_folder(name, path, f"{escaped}/**", labeled=role != "unlabeled")
    if path.is_dir() or path.suffix == ".parquet":
        return _load_parquet(name, f"{escaped}/*.parquet" if path.is_dir() else escaped)
    if path.exists() or path.is_absolute() or source.startswith((".", "/")) or source.count("/") > 1:
        raise ValueError(f"{name} is not a folder or parquet file: give an image folder, parquet or a Hub dataset.")
    return _load_from_hub(name, source, role)


def skipped(dataset: datasets.Dataset) -> dict[str, list[str]]:
    """Stand-in until the sources' own branch is merged: reason to the names of the files that were skipped."""
    return {}


def _load_image_folder(name: str, path: Path, pattern: str, *, labeled: bool) -> datasets.Dataset:
    if not any(file.suffix.lower() in ImageFolder.EXTENSIONS for file in path.rglob("*")):
        raise ValueError(f"{name} has no images in this folder or below it: give a folder that holds image files.")
    stray = sorted(file.name for file in path.iterdir() if file.suffix.lower() in ImageFolder.EXTENSIONS)
    if stray and labeled:
        raise ValueError(f"{name} has images outside of class folders ({stray[0]}): sort images as <class>/<image>.")
    # A pattern of files and not data_dir, with which `datasets` looks for names of splits in paths.
    options: dict[str, Any] = {"drop_labels": not labeled, "drop_metadata": not labeled}
    return datasets.load_dataset("imagefolder", data_files={"train": [pattern]}, split="train", **options)


def _load_parquet(name: str, files: str) -> datasets.Dataset:
    if not glob.glob(files):
        raise ValueError(f"{name} does not exist (no such parquet file): check the path.")
    try:
        return datasets.load_dataset("parquet", data_files={"train": [files]}, split="train")
    except (DatasetGenerationError, ValueError) as error:  # Arrow's errors are ValueErrors
        raise ValueError(f"{name} cannot be read ({error.__cause__ or error}): write the file again.") from error


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
            return found[each]
    missing = " or ".join(map(repr, wanted))
    raise ValueError(
        f"{name} does not exist: there is no split {missing} (only {', '.join(found)}); write {repository}:<split>."
    )
