"""What the Hub's own check of a card says: metadata that it can't read, or would refuse in a commit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

LICENSES = {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc0-1.0", "gpl-3.0"}
LICENSES |= {"openrail", "unknown", "other"}
"""Some of the identifiers that the Hub knows."""

REPO_ID = re.compile(r"(?:\w[\w.\-]*/)?\w[\w.\-]*")
LISTS = ("tags", "datasets", "metrics", "language")
"""Keys that hold a text or several."""


def card_metadata(content: str) -> Any:
    """The YAML between the first two lines of three dashes; None where there is none."""
    found = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", content, re.DOTALL)
    return yaml.safe_load(found[1]) if found else None


def card_problems(content: str, kind: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about README.md of a model, dataset or space."""
    try:
        card = card_metadata(content)
    except yaml.YAMLError as error:
        return [f"YAML metadata can't be read: {error}"], []
    if card is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(card, dict):
        return ["YAML metadata must be an object"], []
    errors, warnings = list(_wrong_values(card)), []
    if kind == "model":
        errors += _wrong_index(card.get("model-index", []))
    if kind == "space" and card.get("sdk") not in ("gradio", "docker", "static"):
        errors.append('"sdk" must be one of [gradio, docker, static]')
    warnings += [f'"datasets" with value "{d}" is not valid' for d in _listed(card, "datasets") if not _is_id(d)]
    return errors, warnings


def _listed(card: dict[str, Any], key: str) -> list[Any]:
    value = card.get(key) or []
    return value if isinstance(value, list) else [value]


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and REPO_ID.fullmatch(value) is not None


def _wrong_values(card: dict[str, Any]) -> Iterator[str]:
    for key in LISTS:
        if not all(isinstance(value, str) for value in _listed(card, key)):
            yield f'"{key}" must be a string or an array of strings'
    if not isinstance(card.get("tags", []), list):
        yield '"tags" must be an array'
    for name in _listed(card, "license"):
        if name not in LICENSES:
            yield f'"license" must be one of [{", ".join(sorted(LICENSES))}]'
    for name in _listed(card, "base_model"):
        if not _is_id(name):
            yield f'"base_model" with value "{name}" is not valid. Use a model id from https://hf.co/models.'
    for key in ("pipeline_tag", "library_name", "thumbnail"):
        if not isinstance(card.get(key, ""), str):
            yield f'"{key}" must be a string'


def _wrong_index(index: Any) -> Iterator[str]:
    """`model-index`: a list of models, each with results on a dataset for a task, each with metrics."""
    if not isinstance(index, list):
        yield '"model-index" must be an array'
        return
    for m, model in enumerate(index):
        at = f"model-index[{m}]"
        yield from _missing(model, at, name=str, results=list)
        for r, result in enumerate(_part(model, "results", list)):
            here = f"{at}.results[{r}]"
            yield from _missing(result, here, task=dict, dataset=dict, metrics=list)
            yield from _missing(_part(result, "task", dict), f"{here}.task", type=str)
            yield from _missing(_part(result, "dataset", dict), f"{here}.dataset", type=str, name=str)
            for n, metric in enumerate(_part(result, "metrics", list)):
                yield from _missing(metric, f"{here}.metrics[{n}]", type=str, value=object)


def _part(parent: Any, key: str, kind: type) -> Any:
    value = parent.get(key) if isinstance(parent, dict) else None
    return value if isinstance(value, kind) else kind()


def _missing(part: Any, at: str, **wanted: type) -> Iterator[str]:
    for key, kind in wanted.items():
        value = part.get(key) if isinstance(part, dict) else None
        if value is None:
            yield f'"{at}.{key}" is required'
        elif not isinstance(value, kind):
            yield f'"{at}.{key}" must be of type {kind.__name__}'
