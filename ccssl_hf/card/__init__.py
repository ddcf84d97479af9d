"""Model card, tables and pictures of a run: functions of a `RunRecord`, or of a published folder."""

from __future__ import annotations

from pathlib import Path

from ..record import RunRecord
from .model_card import render_card


def write_card(
    record: RunRecord,
    folder: Path,
    *,
    model_name: str,
    license: str | None = None,
    tags: list[str] | None = None,
    limits: str | None = None,
) -> None:
    """Write README.md and its pictures into `folder`. For the arguments see `render_card`."""
    from .pictures import draw_pictures  # matplotlib takes long to import, and training does not need it

    pictures = draw_pictures(
        folder,
        record.predictions,
        record.class_names,
        history=record.history,
        provenance=record.provenance,
        only_these=True,
    )
    card = render_card(
        record, model_name=model_name, license=license, tags=tags or (), limits=limits, pictures=pictures
    )
    card.save(folder / "README.md")
