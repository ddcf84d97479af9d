"""Uploads of a running training: which files of a checkpoint are pushed, and uploads in the background."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, run_as_future
from transformers.trainer_utils import HubStrategy

from .hub import plan_push, upload


def files_of_checkpoint(folder: Path, strategy: HubStrategy) -> dict[str, Path]:
    """Path in the repository to file: the model of a checkpoint, and its training state as `hub_strategy` asks."""
    files = plan_push(folder).files
    if strategy != HubStrategy.EVERY_SAVE:
        name = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else folder.name
        state = plan_push(folder, with_head=True, with_training_state=True).files
        files |= {f"{name}/{path}": file for path, file in state.items()}
    return files


def upload_in_background(
    files: Mapping[str, Path], repo_id: str, *, keep_in: Path, **options: Any
) -> Future[CommitInfo]:
    """Upload files that may be deleted or overwritten meanwhile.

    Args:
        files: Path in the repository to the file here.
        repo_id: `user/name`.
        keep_in: The files are kept in a folder in here until the upload ends.
        **options: See `hub.upload`.
    """
    kept = tempfile.TemporaryDirectory(prefix="_push-", dir=keep_in)
    copies = {path: _link(file, Path(kept.name, path)) for path, file in files.items()}

    def work() -> CommitInfo:
        with kept:
            return upload(copies, repo_id, **options)

    return run_as_future(work)


def _link(file: Path, copy: Path) -> Path:
    """A hard link to a file, or a copy on a file system without links."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, copy)
    except OSError:
        shutil.copy(file, copy)
    return copy
