"""The card in `model_cards/`: README.md repeats its numbers, the Hub accepts it, and its pictures are small."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ccssl_hf.card.facts import read_facts
from ccssl_hf.card.report import read_card
from ccssl_hf.card.text import format_table

CARDS = Path(__file__).resolve().parents[1] / "model_cards"
NAME = "digits_fixmatch_ccssl_seed0"


def test_the_table_repeats_the_numbers_of_the_card() -> None:
    found = {r.metric: r.value for r in read_facts(read_card(CARDS / NAME)).results if r.split == "test"}
    row = {
        "Card": f"[{NAME}]({NAME}/README.md)",
        "Top-1 accuracy": found["top1"],
        "OOD AUROC (confidence)": found["auroc"],
    }
    table = format_table([row], list(row), markdown=True)
    assert table in (CARDS / "README.md").read_text(encoding="utf-8"), f"write:\n{table}"
    assert [path.name for path in CARDS.iterdir() if path.is_dir()] == [NAME]


def test_the_card_is_complete(hub: Any) -> None:
    card = ModelCard.load(CARDS / NAME / "README.md")
    card.validate(repo_type="model")
    provenance = read_facts(read_card(CARDS / NAME)).provenance
    assert provenance is not None
    assert (provenance.weights, provenance.which, provenance.seed) == ("EMA", "last", 0)
    files = re.findall(r"!\[.*?\]\((.*?)\)", card.text)
    assert len(files) == 4
    assert sorted(files) == sorted(f"images/{path.name}" for path in (CARDS / NAME / "images").iterdir())
    assert all((CARDS / NAME / file).stat().st_size <= 60_000 for file in files)
