"""Reports of published models: a description, a table of results, and a card with new results."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, snapshot_download

from ..checkpoint import WEIGHTS_FILE, find_checkpoint
from ..config_file import read_config
from ..escape import printable
from ..hub import MAX_TEXT_MB, why_not_pushed
from ..modeling import CCSSLConfig
from ..output_folder import check_writable
from ..record import IMAGES, PICTURES, PUBLISHED, Provenance, Result, RunRecord, SplitPredictions
from .facts import read_facts, upgrade
from .model_card import found_in, render_card, renew_results
from .plots import draw_pictures
from .text import format_table, words

CARD_FILE = "README.md"


def results_table(results: Iterable[Result], *, width: int = 0) -> str:
    """Results as a plain text table with split and provenance; for `width` see `format_table`."""
    rows = [dict(metric=r.name, value=r.value, split=r.split, weights=str(r.provenance or PUBLISHED)) for r in results]
    return format_table(rows, ["metric", "value", "split", "weights"], digits=4, width=width)


def _card_folder(model: str) -> Path:
    """The folder of a model's card and pictures, downloaded if the model is on the Hub."""
    if Path(model).is_dir():
        return Path(model)
    find_checkpoint(model)  # a clear error if the repository does not exist
    return Path(snapshot_download(model, allow_patterns=[CARD_FILE, f"{IMAGES}/*.png"]))


def read_card(folder: Path) -> ModelCard | None:
    """The card in a folder, or None. A card of an earlier version gets the machine-readable block.

    Raises:
        ValueError: Its metadata cannot be read.
    """
    path = folder / CARD_FILE
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_TEXT_MB * 1e6:
        raise ValueError(f"{path} has more than {MAX_TEXT_MB} MB and cannot be a card: shorten or remove it.")
    try:
        card = ModelCard.load(path)
        upgrade(card)
        read_facts(card)
    except Exception as error:  # the Hub's client raises YAML errors and KeyErrors, and a block can be incomplete
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} has metadata that cannot be read ({reason}): correct the lines above ---.") from error
    return card


def provenance_of(model: str) -> Provenance | None:
    """The provenance of a model's weights from its card; None if the card is missing or does not have it."""
    card = read_card(_card_folder(model))
    return read_facts(card).provenance if card else None


def write_report(
    model: str,
    out: Path,
    results: Sequence[Result],
    predictions: Sequence[SplitPredictions],
    sources: Mapping[str, str],
    found: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[str]:
    """Put results and pictures on the card in `out`. Without a card there, a copy of the model's card is used.

    `sources` are those of the measured splits, by name, and `found` is what they hold (fields of `Split`). Returns the
    files that were written, relative to `out`.

    Raises:
        ValueError: The card cannot be read, or `out` cannot be written to.
    """
    check_writable(out)
    config, name = _config(model), Path(model).resolve().name if Path(model).is_dir() else model
    source = out if (out / CARD_FILE).is_file() else _card_folder(model)
    record = RunRecord(config.architecture, config.labels, predictions=predictions)
    card = read_card(source) or render_card(record, model_name=name)
    if source.resolve() != out.resolve():
        (out / IMAGES).mkdir(exist_ok=True)
        for picture in PICTURES:  # and no other file of a downloaded folder
            if why_not_pushed(source, picture) is None:
                shutil.copyfile(source / picture, out / picture)
    pictures = draw_pictures(record, out)
    datasets = {split: re.sub(r":\w+$", "", source) for split, source in sources.items()}  # user/name:split
    renew_results(card, results, datasets=datasets, pictures=pictures, model_name=name, found=found)
    card.save(out / CARD_FILE)
    return [CARD_FILE, *pictures]


def _config(model: str) -> CCSSLConfig:
    return CCSSLConfig.from_dict(read_config(find_checkpoint(model)))


def describe(model: str, *, width: int = 0) -> str:
    """A model's backbone and classes, and the results and training settings on its card, as text.

    Tables are at most `width` characters wide, if that is not 0.
    """
    config = _config(model)
    labels, size = config.labels, (config.pretrained_cfg or {}).get("input_size", ["?"])[-1]
    megabytes = (find_checkpoint(model) / WEIGHTS_FILE).stat().st_size / 1e6
    names = ", ".join(printable(label, most=60) for label in labels[:8]) + ", ..." * (len(labels) > 8)
    lines = [f"{model}: {config.architecture}, {size} px, {megabytes:.1f} MB, {len(labels)} classes ({names})"]
    card = read_card(_card_folder(model))
    if card is None:
        return "\n".join([*lines, f"It has no card: `ccssl-hf report {model} --split SOURCE` writes one."])
    facts = read_facts(card)
    table = results_table(facts.results, width=width) if facts.results else "Its card has no results with provenance."
    lines += ["", table]
    if facts.splits:
        rows = [{"split": split, "data": each.data, "images": each.images} for split, each in facts.splits.items()]
        lines += ["", format_table(rows, ["split", "data", "images"], width=width)]
        if found := found_in(facts.splits):
            lines += ["", format_table(found, list(found[0]), width=width)]
    for title, settings in facts.settings.items():
        rows = [{title: name, "value": words(value)} for name, value in settings.items()]
        lines += ["", format_table(rows, [title, "value"], width=width)]
    return "\n".join(lines)
