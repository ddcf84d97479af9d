"""What there is to say of a published model: its numbers on labeled images, and a card that is brought up to date."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from huggingface_hub import ModelCard, snapshot_download

from .analysis import format_table
from .card_pictures import draw_pictures
from .checkpoint import CONFIG_FILE, WEIGHTS_FILE, find_checkpoint, is_own_backbone
from .data import check_images, check_writable, load_split, read_labels
from .inference import Classifier, predict_all
from .metrics import classification_metrics
from .model_card import IMAGES, CardFacts, published_origin, render_card, renew_results, results_of
from .results import PUBLISHED, Origin, Result, SplitPredictions

CARD_FILE = "README.md"


def load_labeled(source: str, split: str) -> datasets.Dataset:
    """A labeled split from an image folder (`<class>/<image>`), parquet files or the Hub.

    Args:
        source: What `data.load_split` takes.
        split: Its name; of a Hub data set, the split that is taken where `source` names none.

    Raises:
        ValueError: It can't be read.
    """
    role = "test" if split in ("labeled", "unlabeled") else split  # as these, other rules would hold
    try:
        return load_split(source, role=role)
    except ValueError as error:
        raise ValueError(str(error).removeprefix(f"--{role} ")) from error


def evaluate(
    classifier: Classifier,
    dataset: datasets.Dataset,
    split: str,
    *,
    origin: Origin | None = None,
    image_column: str = "image",
    label_column: str = "label",
    batch_size: int | None = None,
    num_workers: int | None = None,
) -> tuple[list[Result], SplitPredictions]:
    """What `CCSSLTrainer.evaluate` would measure of a published model, but for what takes heads of training.

    Args:
        classifier: The model, not folded where every digit counts.
        dataset: Labeled images. Labels are aligned by name; those that are no class of the model, and -1, are images of
            no known class.
        split: What the results call it.
        origin: Which weights these are.
        image_column, label_column: Of `dataset`.
        batch_size, num_workers: As of `inference.predict_to_parquet`.

    Raises:
        ValueError: The data can't be measured on; the sentence names the fix.
    """
    check_images(dataset, role=split, image_column=image_column)
    labels = read_labels(dataset, label_column, classifier.labels, role=split, allow_unknown=True)
    said = predict_all(classifier, dataset, image_column=image_column, batch_size=batch_size, num_workers=num_workers)
    logits = said.logits.numpy()
    results = [Result(name, value, split, origin) for name, value in classification_metrics(logits, labels).items()]
    return results, SplitPredictions(split, origin, logits, labels, said.embeddings.numpy())


def results_table(results: Iterable[Result]) -> str:
    """Results as plain text, each with its split and weights."""
    rows = [
        {"metric": r.name, "value": r.value, "split": r.split, "weights": str(r.origin or PUBLISHED)} for r in results
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


def origin_of(model: str) -> Origin | None:
    """Which weights of which run a model has, as its card says; None where it has none or says nothing."""
    card = read_card(card_folder(model))
    return published_origin(card) if card else None


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


def unknown_names(dataset: datasets.Dataset, label_column: str, classes: Sequence[str]) -> list[str]:
    """The names among the labels of a split that are no class of the model."""
    feature = dataset.features[label_column]
    if isinstance(feature, datasets.ClassLabel):
        names = [feature.names[number] for number in np.unique(dataset[label_column][:]) if number >= 0]
    elif str(feature.dtype).endswith("string"):
        names = [name for name in dataset.unique(label_column) if name is not None]
    else:
        names = []
    return sorted(set(names) - set(classes))
