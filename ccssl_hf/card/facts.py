"""The machine-readable block of a card: provenance, results, pictures and settings, stored as fields."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from ..record import PUBLISHED, Provenance, Result, Split

KEY = "ccssl_hf"
"""Name of the block in the card's metadata."""


@dataclass
class CardFacts:
    """What a card stores about a model.

    Args:
        provenance: The published weights; None if their run is unknown.
        splits: The data by name of the split, with public names.
        results: Measured numbers.
        pictures: File beside the card to its caption.
        settings: Settings of the training by name, in tables by title.
    """

    provenance: Provenance | None = None
    splits: dict[str, Split] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    pictures: dict[str, str] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)


def read_facts(card: ModelCard) -> CardFacts:
    """The facts that `store_facts` wrote; empty facts for any other card."""
    block = card.data.get(KEY) or {}
    return CardFacts(
        provenance=Provenance(**block["provenance"]) if "provenance" in block else None,
        splits={name: Split(**split) for name, split in block.get("splits", {}).items()},
        results=[_read_result(**result) for result in block.get("results", ())],
        pictures=dict(block.get("pictures", {})),
        settings=block.get("settings", {}),
    )


def _read_result(metric: str, value: float, split: str, **provenance: Any) -> Result:
    return Result(metric, value, split, Provenance(**provenance) if provenance else None)


def store_facts(card: ModelCard, facts: CardFacts, *, model_name: str) -> None:
    """Write facts into the metadata: the block, and the Hub's model index with the results.

    Results that are NaN or infinite are left out, because the Hub refuses them. Results of the model index that were
    not written here stay.

    Args:
        card: The card to change.
        facts: They replace the facts of the card.
        model_name: Name in the model index, if the card has no model index yet.
    """
    data = card.data
    own = {_identity(each) for each in _model_index(read_facts(card))}
    others = [each for each in data.get("eval_results") or () if _identity(each) not in own]
    index = [*others, *_model_index(facts)]
    if index:
        data["eval_results"], data["model_name"] = index, data.get("model_name") or model_name
        data["metrics"] = sorted({*data.get("metrics", ()), *(each.metric_type for each in index)})
    block = {
        "provenance": facts.provenance and asdict(facts.provenance),
        "splits": {name: _without_none(asdict(split)) for name, split in facts.splits.items()},
        "results": [_write_result(result) for result in facts.results if math.isfinite(result.value)],
        "pictures": facts.pictures,
        "settings": facts.settings,
    }
    data[KEY] = {name: value for name, value in block.items() if value} or None


def _write_result(result: Result) -> dict[str, Any]:
    fields = {"metric": result.metric, "value": _rounded(result.value), "split": result.split}
    return fields | (asdict(result.provenance) if result.provenance else {})


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _rounded(value: float) -> float:
    return round(float(value), 6)


def _identity(entry: EvalResult) -> tuple[str | None, ...]:
    return entry.metric_type, entry.dataset_split, entry.metric_name


def _model_index(facts: CardFacts) -> Iterator[EvalResult]:
    """The results in the form of the Hub's model index."""
    for result in facts.results:
        if not math.isfinite(result.value):
            continue
        dataset = facts.splits[result.split].data if result.split in facts.splits else "unknown"
        yield EvalResult(
            task_type="image-classification",
            task_name="Image Classification",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=result.split,
            metric_type=result.hub_name,
            metric_name=f"{result.name} ({result.provenance or PUBLISHED})",
            metric_value=_rounded(result.value),
        )
