"""Unlabeled images that could not be read."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import TrainerState

from ..data.images import REPAIR, UNREADABLE_LIMIT, EncodedImages, image_lines
from ..distributed import all_gather_json
from ..errors import UserError

logger = logging.getLogger(__name__)


class UnreadableImages:
    """The unlabeled images of a run that could not be read, which other images replaced.

    They lie in the Trainer's log history, with which a resumed run goes on. Each process may find others.
    """

    _ENTRY = "unreadable_images"

    def __init__(self, dataset: datasets.Dataset | None, image_column: str) -> None:
        self._images: Any = [] if dataset is None else EncodedImages(dataset, image_column)
        self._new: dict[int, str] = {}

    def add(self, found: Iterable[tuple[int, str]]) -> None:
        """Keep rows and reasons for the next report."""
        self._new.update(found)

    def known(self, state: TrainerState) -> dict[int, tuple[str, str]]:
        """All images of the reports: name without folders, and reason, by row."""
        entries = (entry.get(self._ENTRY, ()) for entry in state.log_history)
        return {row: (name, reason) for entry in entries for row, name, reason in entry}

    def report(self, state: TrainerState, device: torch.device, *, total: bool = False) -> None:
        """Log the images that are new, or in total. Call it in every process."""
        known = self.known(state)
        merged = {row: why for part in all_gather_json([*self._new.items()], device) for row, why in part}
        found = [self._named(row, merged[row]) for row in sorted(merged.keys() - known.keys())]
        self._new = {}
        if found:
            public = []  # the history may be published
            for row, path, why in found:
                name = Path(path).name
                public.append([row, name if path == f"row {row}" else f"{name} (row {row})", why.replace(path, name)])
            entry: dict[str, Any] = {self._ENTRY: public, "step": state.global_step}
            state.log_history.append(entry)
            if state.is_world_process_zero:
                logger.warning(
                    "Unreadable unlabeled images, replaced by others (%d new):%s", len(found), image_lines(found)
                )
        if total and state.is_world_process_zero and (number := len(self.known(state))):
            logger.warning(
                "Unreadable unlabeled images, replaced by others in this run: %d of %d.", number, len(self._images)
            )

    def check(self, found: Mapping[int, str]) -> None:
        """Raise a UserError if these unreadable images, reasons by row, are too many."""
        if len(found) > UNREADABLE_LIMIT * len(self._images):
            raise UserError(
                f"{len(found):,} of {len(self._images):,} unlabeled images can't be decoded, more than "
                f"{UNREADABLE_LIMIT:.0%}: {REPAIR}{image_lines([self._named(*each) for each in sorted(found.items())])}"
            )

    def _named(self, row: int, reason: str) -> tuple[int, str, str]:
        return row, self._images.name(row), reason
