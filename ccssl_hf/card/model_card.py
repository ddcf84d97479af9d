"""The model card: a `RunRecord` in, `README.md` out. Nothing here uses the network or reads the run's files.

The card leaves out what is unknown, folders of local paths, and settings with `token` in their name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from typing import Any, get_args
from urllib.parse import quote

import jinja2
from huggingface_hub import ModelCard, ModelCardData

from ..algorithms import ALGORITHMS, CCSSL_PAPER
from ..checkpoint import is_own_backbone
from ..data import FINGERPRINTED_IMAGES
from ..escape import code
from ..record import CONFIDENCE, CURVES, PICTURES, Provenance, Result, RunRecord, Section, Split, duration
from .facts import CardFacts, known, read_facts, store_facts
from .text import cell, plain, public_name, without_folder

UNREADABLE_FILE = "unreadable_images.txt"
"""Lists the images that could not be read, if the card has no room for all. It is not uploaded."""

_MARKED = re.compile(r"<!-- results\b[^>]*-->.*?<!-- /results -->", re.DOTALL)
"""Results and pictures of a card. Earlier cards have the same comments with more words in the first."""


def _settings(record: RunRecord) -> dict[str, dict[str, Any]]:
    """Settings of the training by name, in tables by title; those that are unknown are left out."""
    if record.algorithm is None:
        return {}
    device = record.device and f"{record.num_processes} x {record.device.split(':')[0]}"
    run_time = None if record.run_time is None else duration(record.run_time)
    steps = known(steps=record.steps, batch_size=record.batch_size, seed=record.seed)
    tables = {
        "Method": known(algorithm=record.algorithm, mu=record.mu) | dict(record.hyperparameters),
        "Optimization": steps | dict(record.optimization),
        "Views": record.views,
        "Environment": known(device=device, run_time=run_time) | dict(record.versions),
    }
    public = {
        title: {name: plain(value) for name, value in table.items() if "token" not in name.lower()}
        for title, table in tables.items()
    }
    return {title: table for title, table in public.items() if table}


_FOUND = {
    "classes": "Classes",
    "fewest": "Fewest per class",
    "most": "Most per class",
    "ood_images": "OOD",
    "in_training": "Also in training",
    "small": "Much smaller",
    "unreadable": "Unreadable",
    "skipped": "Skipped files",
}


def found_in(splits: Mapping[str, Split]) -> list[dict[str, Any]]:
    """What was found in the splits, a row for each, by column title. Columns of zeros are left out."""
    titles = {key: title for key, title in _FOUND.items() if any(getattr(split, key) for split in splits.values())}
    return [
        {"Split": name} | {title: _with_class(split, key) for key, title in titles.items()}
        for name, split in splits.items()
        if titles
    ]


def _with_class(split: Split, key: str) -> Any:
    value, name = getattr(split, key), getattr(split, f"{key}_class", None)
    unknown = value is None or (key == "ood_images" and split.classes is None)  # no labels were read
    return "–" if unknown else value if name is None else f"{value} ({name})"


def _render(template: str, **values: Any) -> str:
    """A template without the blank lines of the sections that are left out."""
    source = resources.files(__package__).joinpath(f"templates/{template}.md.j2").read_text(encoding="utf-8")
    text = jinja2.Template(source).render(cell=cell, code=code, **values)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _render_results(results: Sequence[Result], pictures: Mapping[str, str], published: Provenance | None) -> str:
    """The part of a card that `renew_results` replaces."""
    sections = {name: [each for each in results if each.section == name] for name in get_args(Section)}
    return _render(
        "results",
        sections=sections,
        metrics={result.metric.partition("@")[0] for result in results},
        best=any(r.provenance and r.provenance.which == "best" for r in sections["classes"]),
        earlier=any(r.provenance and published and r.provenance.step != published.step for r in results),
        published=published,
        pictures={quote(file): text for file, text in pictures.items() if file not in (CURVES, CONFIDENCE)},
        confidence={CONFIDENCE: pictures[CONFIDENCE]} if CONFIDENCE in pictures else {},
    )


def render_card(
    record: RunRecord,
    *,
    model_name: str,
    license: str | None = None,
    tags: Iterable[str] | None = None,
    limits: str | None = None,
    pictures: Mapping[str, str] | None = None,
) -> ModelCard:
    """The card of a run, for `card.save(folder / "README.md")`.

    `model_name` is a Hub id (`user/name`), a folder or a title, and `license` an identifier of the Hub. `limits` are
    known limits of the model, in words. `pictures` are captions by file, relative to the card. Names that are local
    paths are cut to their last part and stay out of the Hub's metadata.
    """
    name = without_folder(model_name)
    pictures = {without_folder(file): caption for file, caption in (pictures or {}).items()}
    data = {split: public_name(each.data) for split, each in record.splits.items()}
    base_model, on_hub = public_name(record.base_model) if record.base_model else (None, False)
    if base_model and on_hub and "/" not in base_model:
        base_model = f"timm/{base_model}"
    paper = ALGORITHMS[record.algorithm].paper if record.algorithm in ALGORITHMS else None
    facts = CardFacts(
        provenance=record.provenance,
        splits={split: replace(each, data=data[split][0]) for split, each in record.splits.items()},
        results=list(record.results),
        pictures=pictures,
        settings=_settings(record),
    )
    own_tags = ["image-classification", "timm"] + ["semi-supervised-learning", "ccssl"] * bool(record.algorithm)
    metadata = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=list(dict.fromkeys([*own_tags, *(tags or ())])),
        base_model=base_model if on_hub else None,
        datasets=list(dict.fromkeys(each for each, on_hub in data.values() if on_hub)) or None,
    )
    text = _render(
        "model_card",
        record=record,
        name=name,
        results=_render_results(record.results, pictures, record.provenance),
        remote_code=is_own_backbone(record.backbone),
        initial_weights=base_model,
        initial_weights_on_hub=on_hub,
        paper=paper,
        ccssl=CCSSL_PAPER,
        contrastive=float(record.hyperparameters.get("lambda_contrast") or 0) > 0,
        data=data,
        found=found_in(record.splits),
        num_labeled=sum(record.labeled_per_class.values()),
        num_unlabeled=record.splits["unlabeled"].images if "unlabeled" in record.splits and record.mu else None,
        settings=facts.settings,
        limits=limits and limits.strip().replace("\n", "\n  "),  # within one item of a list
        fingerprinted=FINGERPRINTED_IMAGES,
        unreadable_file=UNREADABLE_FILE,
        curves={CURVES: pictures[CURVES]} if CURVES in pictures else {},
    )
    card = ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}")
    store_facts(card, facts, model_name=name)
    return card


def renew_results(
    card: ModelCard,
    results: Iterable[Result],
    *,
    datasets: Mapping[str, str],
    pictures: Mapping[str, str],
    model_name: str,
    found: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Put new results and pictures on any card: in its metadata, and between its two comments. Other text stays.

    Results replace those of the same splits. A card without the two comments gets them at its end. `datasets` are the
    Hub id or local path of each measured split, `found` is what they hold (fields of `Split`), and `model_name` is for
    metadata without a name.
    """
    results, facts = list(results), read_facts(card)
    renewed = {result.split for result in results}
    facts.results = [*(old for old in facts.results if old.split not in renewed), *results]
    found = found or {}
    facts.splits |= {split: Split(public_name(name)[0], **found.get(split, {})) for split, name in datasets.items()}
    facts.pictures = {file: text for file, text in facts.pictures.items() if file in PICTURES} | dict(pictures)
    store_facts(card, facts, model_name=model_name)
    section = _render_results(facts.results, facts.pictures, facts.provenance)
    if marked := _MARKED.search(card.text):
        card.text = f"{card.text[: marked.start()]}{section.strip()}{card.text[marked.end() :]}"
    else:
        card.text = f"{card.text.rstrip()}\n\n{section}"
