"""Model card, tables and pictures of a run: functions of a `RunRecord`, or of a published folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..record import RunRecord
from .model_card import UNREADABLE_FILE, render_card


def write_card(record: RunRecord, folder: Path, **about: Any) -> None:
    """Write README.md and its pictures into `folder`. `about` are arguments of `render_card`."""
    from .plots import draw_pictures  # matplotlib takes long to import, and training does not need it

    pictures = draw_pictures(record, folder, only_these=True)
    lines = [f"{split}: {name}: {why}\n" for split, all in record.unreadable.items() for name, why in all.items()]
    if len(lines) > 10:
        (folder / UNREADABLE_FILE).write_text("".join(lines), encoding="utf-8")
    render_card(record, pictures=pictures, **about).save(folder / "README.md")
