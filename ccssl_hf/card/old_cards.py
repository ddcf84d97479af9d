"""Reads cards that were written before the machine-readable block, from their English sentences."""

from __future__ import annotations

import re

from huggingface_hub import EvalResult, ModelCard

from ..record import METRICS, PUBLISHED, Provenance, Result, Split
from .facts import KEY, CardFacts, store_facts

_MARKED = re.compile(r"<!-- results of (?P<provenance>[^>]*?);[^>]*-->.*?<!-- /results -->", re.DOTALL)
_PROVENANCE = re.compile(r"(EMA|raw) weights, (last|best) step (\d+), seed (\d+)")
_PICTURE = re.compile(r"!\[(?P<caption>.*?)\]\((?P<file>[^)]*)\)")
_TABLE = re.compile(r"^### (.*)\n\n\| Setting \| Value \|\n.*\n((?:\|.*\n)+)", re.MULTILINE)
_ROW = re.compile(r"^\| (.*?) \| (.*) \|$", re.MULTILINE)
_METRIC_OF_HUB_NAME = {metric.hub_name: name for name, metric in METRICS.items()}


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
    metric = _METRIC_OF_HUB_NAME.get(hub_name, hub_name) + at + threshold
    return Result(metric, entry.metric_value, entry.dataset_split or "", provenance)
