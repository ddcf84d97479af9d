"""The cards of the benchmarks' runs: each says what the lines of its runs say, and is what the script writes today."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from huggingface_hub import ModelCard

from ccssl_hf.card.model_card import results_of
from conftest import SHARED, needs_shared

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def cards() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("cards")


def reported(cards: ModuleType) -> dict[str, tuple[str, list[dict[str, Any]]]]:
    found = (method for data in cards.DATA for method in cards.methods(data, cards.RESULTS))
    return {name: (script, rows) for name, script, rows in found if rows}


def test_every_reported_run_has_a_card_that_says_its_numbers(cards: ModuleType, hub: Any) -> None:
    methods = reported(cards)
    assert sorted(path.stem for path in cards.CARDS.iterdir()) == sorted(methods)
    assert {len(rows) for _, rows in methods.values()} == {3}, "three seeds each"
    for name, (_, rows) in methods.items():
        card = ModelCard.load(cards.CARDS / f"{name}.md")
        card.validate(repo_type="model")
        found = {(r.metric.partition("@")[0], r.split[:4], r.provenance.seed): r.value for r in results_of(card)}
        for row in rows:
            for key, (metric, split) in cards.MEASURED.items():
                value = found.get((metric, split[:4], row["seed"]))
                assert value == pytest.approx(row.get(key), abs=1e-6), (name, key)


@needs_shared
@pytest.mark.parametrize("name", ["butterfly10_mini_comatch", "cifar10_mini_fast_flags_separate"])
def test_a_card_is_what_the_script_writes(cards: ModuleType, name: str) -> None:
    script, rows = reported(cards)[name]
    assert str(cards.card_of(name, script, rows, SHARED / "data")) == str(ModelCard.load(cards.CARDS / f"{name}.md"))
