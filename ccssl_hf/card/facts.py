"""The machine-readable block of a card: provenance, results, pictures and settings, stored as fields."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from ..record import METRICS, PUBLISHED, Provenance, Result, Split

KEY = "ccssl_hf"
"""Name of the block in the card's metadata."""


@dataclass
class CardFacts:
    """What a card stores about a model."""

    provenance: Provenance | None = None  # of the published weights; None if their run is unknown
    splits: dict[str, Split] = field(default_factory=dict)  # by name, with public names of the data
    results: list[Result] = field(default_factory=list)
    pictures: dict[str, str] = field(default_factory=dict)  # file beside the card to its caption
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)  # of the training, in tables by title


def known(**values: Any) -> dict[str, Any]:
    """The values that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def read_facts(card: ModelCard) -> CardFacts:
    """The facts that `store_facts` wrote; empty facts for any other card."""
    block = card.data.get(KEY) or {}
    return CardFacts(
        provenance=Provenance(**block["provenance"]) if "provenance" in block else None,
        splits={name: Split(**split) for name, split in block.get("splits", {}).items()},
        results=[_read_result(**result) for result in block.get("results", ())],
        pictures={str(file): str(caption) for file, caption in block.get("pictures", {}).items()},
        settings=block.get("settings", {}),
    )


def _read_result(metric: str, value: float, split: str, **provenance: Any) -> Result:
    return Result(str(metric), float(value), str(split), Provenance(**provenance) if provenance else None)


def store_facts(card: ModelCard, facts: CardFacts, *, model_name: str) -> None:
    """Replace the facts of a card: in the block, and in the Hub's model index of results.

    Results that are NaN or infinite are left out, because the Hub refuses them. Results of the model index that were
    not written here stay. `model_name` is for a card without a model index.
    """
    data = card.data
    own = {_identity(each) for each in _model_index(read_facts(card))}
    finite = [replace(each, value=round(float(each.value), 6)) for each in facts.results if math.isfinite(each.value)]
    facts = replace(facts, results=finite)
    index = [each for each in data.get("eval_results") or () if _identity(each) not in own] + _model_index(facts)
    if index:
        data["eval_results"], data["model_name"] = index, data.get("model_name") or model_name
        data["metrics"] = sorted({*data.get("metrics", ()), *(each.metric_type for each in index)})
    block = {
        "provenance": facts.provenance and asdict(facts.provenance),
        "splits": {name: known(**asdict(split)) for name, split in facts.splits.items()},
        "results": [
            {"metric": each.metric, "value": each.value, "split": each.split}
            | (asdict(each.provenance) if each.provenance else {})
            for each in finite
        ],
        "pictures": facts.pictures,
        "settings": facts.settings,
    }
    data[KEY] = {name: value for name, value in block.items() if value} or None


def _identity(entry: EvalResult) -> tuple[str | None, ...]:
    return entry.metric_type, entry.dataset_split, entry.metric_name


def _model_index(facts: CardFacts) -> list[EvalResult]:
    data = {name: split.data for name, split in facts.splits.items()}
    return [
        EvalResult(
            task_type="image-classification",
            task_name="Image Classification",
            dataset_type=data.get(result.split, "unknown"),
            dataset_name=data.get(result.split, "unknown"),
            dataset_split=result.split,
            metric_type=result.hub_name,
            metric_name=f"{result.name} ({result.provenance or PUBLISHED})",
            metric_value=result.value,
        )
        for result in facts.results
    ]


# ------------------------------------------------------------------------------------- cards written before the block

_MARKED = re.compile(r"<!-- results of (?P<provenance>[^>]*?);[^>]*-->.*?<!-- /results -->", re.DOTALL)
_PROVENANCE = re.compile(r"(EMA|raw) weights, (last|best) step (\d+), seed (\d+)")
_PICTURE = re.compile(r"!\[(?P<caption>.*?)\]\((?P<file>[^)]*)\)")
_TABLE = re.compile(r"^### (.*)\n\n\| Setting \| Value \|\n.*\n((?:\|.*\n)+)", re.MULTILINE)
_ROW = re.compile(r"^\| (.*?) \| (.*) \|$", re.MULTILINE)


def upgrade(card: ModelCard) -> None:
    """Adds the block to a card that was written before it. Any other card stays as it is."""
    if KEY in card.data:
        return
    index = [(entry, _result(entry)) for entry in card.data.get("eval_results") or ()]
    marked = _MARKED.search(card.text)
    facts = CardFacts(
        provenance=_provenance(marked["provenance"]) if marked else None,
        splits={result.split: Split(entry.dataset_name) for entry, result in index if result},
        results=[result for _, result in index if result],
        pictures={found["file"]: found["caption"] for found in _PICTURE.finditer(marked[0])} if marked else {},
        settings={title: dict(_ROW.findall(rows)) for title, rows in _TABLE.findall(card.text)},
    )
    if facts != CardFacts():
        card.data["eval_results"] = [entry for entry, result in index if result is None]
        store_facts(card, facts, model_name=card.data.get("model_name") or "")


def _provenance(text: str) -> Provenance | None:
    found = _PROVENANCE.search(text)
    return Provenance(found[1], int(found[3]), found[2], int(found[4])) if found else None


def _result(entry: EvalResult) -> Result | None:
    """The result that was written as an entry of the model index; None if somebody else wrote the entry."""
    provenance = _provenance(entry.metric_name or "")
    if provenance is None and not (entry.metric_name or "").endswith(f"({PUBLISHED})"):
        return None
    hub_name, at, threshold = entry.metric_type.partition("@")
    metric = {metric.hub_name: name for name, metric in METRICS.items()}.get(hub_name, hub_name) + at + threshold
    return Result(metric, entry.metric_value, entry.dataset_split or "", provenance)
