"""A Gradio Space from a published model: the page of `templates/space`, and all that it reads.

What is measured here is measured by the page's own code, so that it will say the same of an image.
"""

from __future__ import annotations

import io
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard, SpaceCard, SpaceCardData
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from .. import wide_resnet_cifar
from ..checkpoint import find_checkpoint, is_own_backbone
from ..data import OUT_OF_DISTRIBUTION, check_images, check_writable, load_split, read_labels
from ..images import decode_image, encoded_images
from ..metrics import top_k_accuracy
from ..modeling import CCSSLForImageClassification
from .space_page import app

TEMPLATE = Path(app.__file__).parent

SDK_VERSION = "6.31.0"
"""Of Gradio; the Hub wants one version, where requirements.txt has bounds."""

QUANTILE = 0.05
"""Share of the validation images of known classes that lie below a threshold."""

BATCH_SIZE = 16

THUMBNAIL_SIDE, EXAMPLE_SIDE = 160, 640
"""Longer side in pixels, at most, of stored images."""

LOSSLESS_SIDE = 96
"""Longer side in pixels up to which images are stored without loss."""

EXAMPLES_OF_CLASSES, EXAMPLES_OF_NONE = 6, 2


def write_space(
    model: str | Path,
    out: str | Path,
    *,
    labeled: str | None = None,
    validation: str | None = None,
    title: str | None = None,
    image_column: str = "image",
    label_column: str = "label",
) -> app.Settings:
    """Write a folder that the Hub runs as a Space, and `python app.py` anywhere, without this package.

    Args:
        model: A published folder, which is copied, or a Hub id, which the page loads at the revision of today.
        out: The folder to write. An earlier Space in it is replaced.
        labeled: Labeled images (as `load_split` takes them) to show the nearest of; small copies of all are stored.
        validation: Labeled images to measure the thresholds of "may be none of them" on. Those of no class of the
            model, and with the label -1, say how many strangers are found.
        title: Of the page; the model's name where None.
        image_column: Of both.
        label_column: Of both.

    Returns:
        What the page knows of itself.

    Raises:
        FileNotFoundError: There is no such model.
        ValueError: A source or an image can't be read, labels don't fit the model, or `out` holds other files.
    """
    out = _check_output(Path(out))
    folder = find_checkpoint(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has no projection head")  # of no use here
        trained = CCSSLForImageClassification.from_pretrained(folder)
    splits: dict[str, _Split] = {}
    for role, source in (("labeled", labeled), ("validation", validation)):
        if source is not None:
            splits[role] = _Split(source, role, trained.config.labels, image_column, label_column)

    _empty(out)
    local = Path(model).is_dir()
    if local:
        trained.save_pretrained(out / app.MODEL_FOLDER, with_head=False)
    network = app.Model(folder)
    if "labeled" in splits:
        _write_gallery(out, network, splits["labeled"])
    for split in list(splits.values())[-1:]:  # validation images, if there are any: the network has not seen them
        _write_examples(out / app.EXAMPLES_FOLDER, split)
    settings = app.Settings(
        title=title or Path(model).resolve().name,
        model=app.MODEL_FOLDER if local else str(model),
        revision=None if local else folder.name,
        thresholds=_measure(network, splits["validation"]) if "validation" in splits else None,
    )
    _write_card(out, settings, model, network.labels, splits)
    code = [TEMPLATE / "app.py", TEMPLATE / "requirements.txt"]
    if is_own_backbone(trained.config.architecture):
        code.append(Path(wide_resnet_cifar.__file__))
    for file in code:
        shutil.copyfile(file, out / file.name)
    settings.save(out)
    return settings


def _check_output(out: Path) -> Path:
    """Raises ValueError where `out` can't be written, or holds files that are not of a Space; hidden ones may lie."""
    if out.is_file():
        raise ValueError(f"{out} is a file: name a folder to write.")
    check_writable(out)
    others = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    if others and app.SETTINGS_FILE not in others:
        raise ValueError(f"{out} holds other files than a Space's, such as {others[0]}: name a new folder.")
    return out


def _empty(out: Path) -> None:
    """Removes what an earlier Space may have that the new one does not."""
    for folder in (app.MODEL_FOLDER, app.GALLERY_FOLDER, app.EXAMPLES_FOLDER):
        shutil.rmtree(out / folder, ignore_errors=True)
    (out / Path(wide_resnet_cifar.__file__).name).unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------------------- images


class _Split:
    """Labeled images, checked before any work is done.

    Attributes:
        name: What can be said of where they come from: a Hub id, or the last part of a path.
        labels: Class numbers `[N]`; -1 is an image of no class of the model, which the labeled split must not have.
    """

    def __init__(self, source: str, role: str, classes: list[str], image_column: str, label_column: str) -> None:
        dataset = load_split(source, role=role)
        check_images(dataset, role=role, image_column=image_column)
        unknown = role == "validation"
        self.labels = read_labels(dataset, label_column, classes, role=role, allow_ood=unknown)
        known, needed = int((self.labels != OUT_OF_DISTRIBUTION).sum()), round(1 / QUANTILE)
        if unknown and known < needed:
            raise ValueError(
                f"--validation {source}: {known} images of the model's classes are too few to say what "
                f"{1 - QUANTILE:.0%} of them pass; give at least {needed}, or leave it out."
            )
        self.name = Path(source).resolve().name if Path(source).exists() else source
        self._images, self._column, self._role = encoded_images(dataset, image_column), image_column, role

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, row: int) -> Image.Image:
        return decode_image(self._images[row][self._column], row, self._role)

    def batches(self) -> Iterator[list[Image.Image]]:
        """All images, with a progress bar."""
        with datasets.utils.tqdm(total=len(self), desc=f"Looking at {self._role} images", unit=" images") as progress:
            for start in range(0, len(self), BATCH_SIZE):
                images = [self.image(row) for row in range(start, min(start + BATCH_SIZE, len(self)))]
                yield images
                progress.update(len(images))


def _encoded(image: Image.Image, side: int) -> bytes:
    """WebP of at most `side` pixels, without anything else that the file said of itself, such as where it was taken."""
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.BICUBIC)
    small.info = {}
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", lossless=max(small.size) <= LOSSLESS_SIDE, quality=85)
    return buffer.getvalue()


def _write_gallery(out: Path, network: app.Model, split: _Split) -> None:
    (out / app.GALLERY_FOLDER).mkdir()
    features: list[Tensor] = []
    row = 0
    with zipfile.ZipFile(out / app.THUMBNAILS_FILE, "w") as thumbnails:
        for images in split.batches():
            for image in images:
                # By a ZipInfo, so that equal images make equal files: a plain name would carry the time.
                thumbnails.writestr(zipfile.ZipInfo(app.thumbnail_name(row)), _encoded(image, THUMBNAIL_SIDE))
                row += 1
            features.append(network.describe(images)[1])
    embeddings = F.normalize(torch.cat(features), dim=1).half()
    tensors = {"embeddings": embeddings, "labels": torch.from_numpy(split.labels)}
    save_file(tensors, out / app.EMBEDDINGS_FILE)


def _write_examples(folder: Path, split: _Split) -> None:
    """The first image of some classes, and some of no class."""
    folder.mkdir()
    classes = np.unique(split.labels[split.labels != OUT_OF_DISTRIBUTION])[:EXAMPLES_OF_CLASSES]
    rows = [int(np.flatnonzero(split.labels == number)[0]) for number in classes]
    unknown = np.flatnonzero(split.labels == OUT_OF_DISTRIBUTION)
    rows += unknown[:: max(1, len(unknown) // EXAMPLES_OF_NONE)][:EXAMPLES_OF_NONE].tolist()  # apart: often sorted
    for number, row in enumerate(rows):
        (folder / f"{number}.webp").write_bytes(_encoded(split.image(row), EXAMPLE_SIDE))


# ---------------------------------------------------------------------------------------------------- thresholds, card


def _measure(network: app.Model, split: _Split) -> app.Thresholds:
    logits = torch.cat([network.describe(images)[0] for images in split.batches()])
    return thresholds(logits, split.labels, source=split.name)


def thresholds(logits: Tensor, labels: np.ndarray, *, source: str) -> app.Thresholds:
    """The thresholds below which an image may be of no class, and how well they work.

    Args:
        logits: `[N, C]`.
        labels: `[N]`, class numbers, and -1 for an image of no class.
        source: What the images are.
    """
    known = labels != OUT_OF_DISTRIBUTION
    limits = [float(np.quantile(scores[known].double(), QUANTILE)) for scores in app.confidence_and_energy(logits)]
    noted = app.may_be_none(logits, confidence=limits[0], energy=limits[1]).numpy()
    strangers = int((~known).sum())
    return app.Thresholds(
        confidence=limits[0],
        energy=limits[1],
        quantile=QUANTILE,
        source=source,
        images=int(known.sum()),
        top1=top_k_accuracy(logits[known], labels[known]),
        noted=float(noted[known].mean()),
        strangers=strangers,
        strangers_noted=float(noted[~known].mean()) if strangers else None,
    )


def _write_card(
    out: Path, settings: app.Settings, model: str | Path, classes: list[str], splits: dict[str, _Split]
) -> None:
    local = settings.revision is None
    data = SpaceCardData(
        title=settings.title,
        emoji="🔎",
        colorFrom="green",
        colorTo="blue",
        sdk="gradio",
        sdk_version=SDK_VERSION,
        app_file="app.py",
        pinned=False,
        models=None if local else [settings.model],
        **_license(Path(model) / "README.md" if local else str(model)),
    )
    card = SpaceCard.from_template(
        data,
        template_path=str(TEMPLATE / "README.md.j2"),
        **asdict(settings),
        classes=classes,
        labeled=len(splits["labeled"]) if "labeled" in splits else 0,
        floor=app.CONFIDENCE_FLOOR,
    )
    card.save(out / "README.md")


def _license(card: str | Path) -> dict[str, Any]:
    """What the model's card says of its license; nothing where there is no such card."""
    try:
        said = ModelCard.load(card, ignore_metadata_errors=True).data
    except (OSError, ValueError, HfHubHTTPError):
        return {}
    keys = ("license", "license_name", "license_link")
    return {key: said[key] for key in keys if said.get(key)}
