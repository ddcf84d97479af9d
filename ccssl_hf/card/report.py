"""What there is to say of a published model: its numbers on labeled images, and a card that is brought up to date."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, snapshot_download

from ..checkpoint import CONFIG_FILE, WEIGHTS_FILE, find_checkpoint, is_own_backbone
from ..data import check_writable
from ..record import PUBLISHED, Provenance, Result, SplitPredictions
from .model_card import IMAGES, CardFacts, published_provenance, render_card, renew_results, results_of
from .pictures import draw_pictures
from .plots import format_table

CARD_FILE = "README.md"


def results_table(results: Iterable[Result]) -> str:
    """Results as plain text, each with its split and weights."""
    rows = [
        {"metric": r.name, "value": r.value, "split": r.split, "weights": str(r.provenance or PUBLISHED)}
        for r in results
    ]
    return format_table(rows, ["metric", "value", "split", "weights"], digits=4)


def card_folder(model: str) -> Path:
    """Where the card of a model and its pictures are: its folder, or what of its Hub repository was downloaded.

    Raises:
        FileNotFoundError: There is no such folder or repository.
    """
    if Path(model).is_dir():
        return Path(model)
    find_checkpoint(model)  # says it in one sentence where there is no such thing
    return Path(snapshot_download(model, allow_patterns=[CARD_FILE, f"{IMAGES}/*.png"]))


def provenance_of(model: str) -> Provenance | None:
    """Which weights of which run a model has, as its card says; None where it has none or says nothing."""
    card = read_card(card_folder(model))
    return published_provenance(card) if card else None


def read_card(folder: Path) -> ModelCard | None:
    """The card in a folder; None where there is none.

    Raises:
        ValueError: Its metadata can't be read.
    """
    path = folder / CARD_FILE
    if not path.is_file():
        return None
    try:
        return ModelCard.load(path)
    except Exception as error:  # the client raises those of YAML, and KeyErrors of a model index
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} has metadata that can't be read ({reason}): mend what stands above ---.") from error


def write_report(
    model: str,
    out: Path,
    results: Sequence[Result],
    predictions: Sequence[SplitPredictions],
    sources: Mapping[str, str],
) -> list[str]:
    """Puts results and pictures onto the card in `out`, which is the model's own or becomes a copy of it.

    Args:
        model: A published folder or Hub id.
        out: The folder of the card.
        results: Of each split.
        predictions: Likewise; embeddings are drawn where there are any.
        sources: Split to where it came from.

    Returns:
        The files that were written, relative to `out`.

    Raises:
        ValueError: The card that is there can't be read, or `out` can't be written to.
    """
    check_writable(out)
    config, name = _config(model), Path(model).resolve().name if Path(model).is_dir() else model
    source = out if (out / CARD_FILE).is_file() else card_folder(model)
    card = read_card(source) or render_card(
        CardFacts(
            model_name=name,
            backbone=config["architecture"],
            labels=config["label_names"],
            remote_code=is_own_backbone(config["architecture"]),
        )
    )
    if source.resolve() != out.resolve() and (source / IMAGES).is_dir():
        shutil.copytree(source / IMAGES, out / IMAGES, dirs_exist_ok=True)
    pictures = draw_pictures(out, predictions, config["label_names"])
    datasets = {split: re.sub(r":\w+$", "", source) for split, source in sources.items()}  # without user/name's :split
    renew_results(card, results, datasets=datasets, pictures=pictures, model_name=name)
    card.save(out / CARD_FILE)
    return [CARD_FILE, *pictures]


def _config(model: str) -> dict[str, Any]:
    return json.loads((find_checkpoint(model) / CONFIG_FILE).read_text(encoding="utf-8"))


def describe(model: str) -> str:
    """What a model is, its results, and how it was trained, as far as its folder and card say so."""
    config, folder = _config(model), find_checkpoint(model)
    labels = config["label_names"]
    size = config["pretrained_cfg"]["input_size"][-1]
    megabytes = (folder / WEIGHTS_FILE).stat().st_size / 1e6
    names = ", ".join([*labels[:8], *(["..."] if len(labels) > 8 else [])])
    lines = [f"{model}: {config['architecture']}, {size} px, {megabytes:.1f} MB, {len(labels)} classes ({names})"]
    card = read_card(card_folder(model))
    if card is None:
        return "\n".join([*lines, f"It has no card: `ccssl-hf report {model} --split NAME=SOURCE` writes one."])
    results = results_of(card)
    lines += ["", results_table(results) if results else "Its card has no results that say what they are."]
    training = re.search(r"^## Training\n.*?(?=^## |\Z)", card.text, re.MULTILINE | re.DOTALL)
    if training:
        without_pictures = re.sub(r"^!\[.*\n\n\*.*\*\n+", "", training[0], flags=re.MULTILINE)
        lines += ["", without_pictures.strip()]
    return "\n".join(lines)
