"""The cards in `model_cards/`: the table says their numbers, the Hub would take them, their pictures are small."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from ccssl_hf.card.facts import read_facts
from ccssl_hf.card.plots import format_table
from ccssl_hf.card.report import read_card

CARDS = Path(__file__).resolve().parents[1] / "model_cards"
METHODS = {"supervised": "Supervised", "fixmatch": "FixMatch", "fixmatch_ccssl": "FixMatch + CCSSL"}
NAMES = [f"digits_{method}_seed{seed}" for method in METHODS for seed in range(3)]


def table() -> str:
    rows = []
    for name in NAMES:
        results = read_facts(read_card(CARDS / name)).results
        found = {result.metric: result.value for result in results if result.split == "test"}
        method, seed = name.removeprefix("digits_").rsplit("_seed", 1)
        row = {"card": f"[{name}]({name}/README.md)", "method": METHODS[method], "seed": int(seed)}
        rows.append({**row, "top-1": found["top1"], "AUROC": found["auroc"]})
    return format_table(rows, ["card", "method", "seed", "top-1", "AUROC"], markdown=True)


def test_the_table_says_what_the_cards_say() -> None:
    assert table() in (CARDS / "README.md").read_text(encoding="utf-8"), f"write:\n{table()}"
    assert sorted(path.name for path in CARDS.iterdir() if path.is_dir()) == sorted([*NAMES, "benchmarks"])


@pytest.mark.parametrize("name", NAMES)
def test_a_card_is_whole(name: str, hub: Any) -> None:
    card = ModelCard.load(CARDS / name / "README.md")
    card.validate(repo_type="model")
    provenance = read_facts(read_card(CARDS / name)).provenance
    assert (
        provenance is not None
        and f"_seed{provenance.seed}" in name
        and (provenance.weights, provenance.which) == ("EMA", "last")
    )
    files = re.findall(r"!\[.*?\]\((.*?)\)", card.text)
    assert len(files) == 4
    assert sorted(files) == sorted(f"images/{path.name}" for path in (CARDS / name / "images").iterdir())
    assert all((CARDS / name / file).stat().st_size <= 60_000 for file in files)
