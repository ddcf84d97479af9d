"""Finds image files: those of a folder, a glob or a single file, and what else lies there."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageFile

from ..errors import listed, warn
from . import images  # noqa: F401 -- with the plugins of Pillow

logger = logging.getLogger(__name__)

TABLES = (".csv", ".tsv", ".jsonl")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # as in the imagefolder of `datasets`
HIDDEN = "hidden files"
_SYSTEM = {"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "__pycache__", "@eadir", "$recycle.bin", "lost+found"}
_RAW = (".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".svg", ".exr", ".hdr", ".jxr", ".dcm", ".nii")
_FIXES = {
    **dict.fromkeys((".heic", ".heif", ".hif"), "install pillow-heif"),
    **dict.fromkeys(_RAW, "convert them to PNG"),  # Pillow would open the thumbnail in some of them
    ".jxl": "install pillow-jxl-plugin",
    ".avif": "install a Pillow that has AVIF",
}


@dataclass
class FoundFiles:
    """Image files, sorted by path. `skipped` has names relative to the folder, by reason; `tables` are metadata files.

    `digest` changes with the paths, sizes and times of the images.
    """

    images: list[str] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)
    tables: list[str] = field(default_factory=list)
    digest: Any = field(default_factory=hashlib.sha256)

    def skip(self, reason: str, name: str) -> None:
        self.skipped.setdefault(reason, []).append(name.encode(errors="backslashreplace").decode())

    def tell(self, name: str) -> None:
        """Log what was skipped."""
        if told := self.describe():
            warn(logger, "%s: %s", name, told)

    def describe(self) -> str:
        """What was skipped in one sentence, hidden files apart; empty if nothing was."""
        told = [f"{why} ({len(names):,}): {listed(names)}" for why, names in self.skipped.items() if why != HIDDEN]
        return f"Skipped: {'; '.join(told)}." if told else ""

    def sort_in(self, file: str, name: str) -> None:
        """Add a file to the images, the metadata or what is skipped."""
        suffix, base = os.path.splitext(name)[1].lower(), os.path.basename(name)
        try:
            state = os.stat(file)
            regular, content = stat.S_ISREG(state.st_mode), (state.st_size, state.st_mtime_ns)
        except OSError:  # a link to nowhere is an unreadable image, and reported as one
            regular, content = True, (0, 0)
        if is_hidden(base):
            self.skip(HIDDEN, name)
        elif not regular:
            self.skip("pipes, sockets and devices", name)
        elif base in METADATA:
            self.tables.append(file)
        elif not (readable := _decodes(Image.registered_extensions().get(suffix, ""))) and suffix in _FIXES:
            self.skip(f"images that Pillow cannot open here, {_FIXES[suffix]}", name)
        elif not readable and not _is_image(file):
            self.skip("files that are no images", name)
        else:
            try:
                self.digest.update(f"{file}\0{content}".encode())
                self.images.append(file)
            except UnicodeEncodeError:
                self.skip("files whose names are not UTF-8", name)


def find_images(path: Path) -> FoundFiles | None:
    """The images of a folder, a glob or a file; None for parquet files, tables of file names and Hub datasets.

    A file is an image if Pillow decodes files with its suffix, or if its content is an image. Links are followed.

    Raises:
        ValueError: Folders cannot be opened.
    """
    if path.suffix.lower() in (".parquet", *TABLES) or parquet_files(path):
        return None
    found = FoundFiles()
    if path.is_dir():
        _walk(str(path), found)
    elif path.is_file():
        found.sort_in(str(path), path.name.lstrip("."))  # also a hidden one, as the user names it
    elif glob.has_magic(str(path)):
        fixed = next(i for i, part in enumerate(path.parts) if glob.has_magic(part))
        root = str(Path(*path.parts[:fixed])) if fixed else ""
        for file in filter(os.path.isfile, glob.glob(str(path), recursive=True)):
            above = [each for each in Path(file).parents if each.name and len(str(each)) > len(root)]
            if not any(is_hidden(each.name) or _leads_back(str(each), root) for each in above):
                found.sort_in(file, file)
    else:
        return None
    found.images.sort()
    return found


def parquet_files(folder: Path) -> list[str]:
    """The parquet files of a folder, without metadata of images, sorted."""
    return sorted(str(file) for file in folder.glob("*.parquet") if file.name not in METADATA and file.name[0] != ".")


def is_hidden(name: str) -> bool:
    """Whether a file or folder belongs to the system: `.x`, `._x.jpg`, `__MACOSX`, `Thumbs.db`."""
    return name.startswith(".") or name.lower() in _SYSTEM


def _walk(root: str, found: FoundFiles) -> None:
    closed: list[OSError] = []
    start = len(os.path.join(root, ""))
    for folder, folders, files in os.walk(root, followlinks=True, onerror=closed.append):
        for name in sorted(folders):
            below = os.path.join(folder, name, "")
            if is_hidden(name) or _leads_back(below[:-1], root):
                found.skip(HIDDEN if is_hidden(name) else "links back to a folder above them", below[start:])
                folders.remove(name)
        folders.sort()
        for file in (os.path.join(folder, name) for name in sorted(files)):
            found.sort_in(file, file[start:])
    if closed:
        folders = [str(error.filename) for error in closed]
        raise ValueError(f"Folders cannot be opened: change their permissions or move them away: {listed(folders)}.")


def _leads_back(folder: str, root: str) -> bool:
    """Whether a link leads to a folder that contains it: a walk would never end."""
    if not os.path.islink(folder):
        return False
    target = os.path.join(os.path.realpath(folder), "")
    while folder != root:
        folder = os.path.dirname(folder)
        if os.path.join(os.path.realpath(folder), "").startswith(target):
            return True
    return False


def _decodes(kind: str) -> bool:
    """Whether Pillow or a plugin decodes a format. A stub only knows its name."""
    factory = Image.OPEN.get(kind, (ImageFile.StubImageFile,))[0]
    return kind != "MPEG" and not (isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile))


def _is_image(file: str) -> bool:
    """Whether the content is an image. Formats without a signature are not tried, nor EPS, which runs a program."""
    try:
        with open(file, "rb") as content:
            start = content.read(16)
            accepts = {kind: Image.OPEN[kind][1] for kind in Image.ID if _decodes(kind) and kind != "EPS"}
            kinds = [kind for kind, accept in accepts.items() if accept and accept(start) is True]
            content.seek(0)
            return bool(kinds) and Image.open(content, formats=kinds) is not None
    except Image.DecompressionBombError:
        return True  # for those who read it to refuse
    except Exception:  # Pillow raises nearly any type of error
        return False
