"""Write a Gradio Space for a published model: the page in `space_page/` and all files that it reads.

The page's own code computes the thresholds and embeddings, so that they match what the page computes.
"""

from __future__ import annotations

import io
import logging
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import asdict
from itertools import count
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
from ..data import OUT_OF_DISTRIBUTION, check_images, read_labels
from ..data.images import decode_image, encoded_images, unreadable
from ..data.sources import load_split
from ..data.survey import count_labels, ood_sentence, unreadable_images
from ..escape import markdown
from ..metrics import top_k_accuracy
from ..output_folder import check_writable
from ..standalone import standalone
from .predict import load_published
from .space_page import app

logger = logging.getLogger(__name__)

TEMPLATE = Path(app.__file__).parent

SDK_VERSION = "6.31.0"  # of Gradio: the Hub needs one version, requirements.txt has bounds
QUANTILE = 0.05  # share of the in-distribution validation images below each threshold
BATCH_SIZE = 16
THUMBNAIL_SIDE, EXAMPLE_SIDE = 160, 640  # longer side of stored images in pixels, at most
EXAMPLES_PER_SPACE, OOD_EXAMPLES = 6, 2


def write_space(
    model: str | Path,
    out: str | Path,
    *,
    labeled: str | None = None,
    validation: str | None = None,
    title: str | None = None,
    image_column: str = "image",
    label_column: str = "label",
    image_root: str | None = None,
) -> app.Settings:
    """Write a folder that runs as a Space on the Hub, and with `python app.py` anywhere, without this package.

    Args:
        model: A published folder, which is copied, or a Hub id, which the page loads at the current revision.
        out: The folder to write. An earlier Space in it is replaced.
        labeled: Labeled images (see `load_split`) of which the page shows the nearest. Small copies of all are stored.
        validation: Labeled images to measure the thresholds for out-of-distribution (OOD) images on. Images of other
            classes than the model's, and with label -1, are OOD: the page says how many of them it detects.
        title: The page's title; the model's name where None.
        image_root: See `load_split`.

    Raises:
        FileNotFoundError: The model does not exist.
        ValueError: A source or an image cannot be read, labels do not fit the model, or `out` has other files.
    """
    out = Path(out)
    if out.is_file():
        raise ValueError(f"{out} is a file: name a folder to write.")
    check_writable(out)
    others = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    if others and app.SETTINGS_FILE not in others:
        raise ValueError(f"{out} is not a Space and has other files, such as {others[0]}: name a new folder.")
    folder = find_checkpoint(model)
    trained = load_published(folder)
    gallery, measured = (
        None if source is None else _Split(source, role, trained.config.labels, image_column, label_column, image_root)
        for role, source in (("labeled", labeled), ("validation", validation))
    )

    for name in (app.MODEL_FOLDER, app.GALLERY_FOLDER, app.EXAMPLES_FOLDER):  # of an earlier Space
        shutil.rmtree(out / name, ignore_errors=True)
    own_backbone = Path(wide_resnet_cifar.__file__)
    (out / own_backbone.name).unlink(missing_ok=True)
    local = Path(model).is_dir()
    if local:
        trained.save_pretrained(out / app.MODEL_FOLDER, with_head=False)
    network = app.Model(folder)
    if gallery:
        _write_gallery(out, network, gallery)
    if examples := measured or gallery:  # the network was not trained on validation images
        _write_examples(out / app.EXAMPLES_FOLDER, examples)
    limits = None
    if measured:
        logits = torch.cat([network.logits_and_features(images)[0] for images in measured.batches()])
        limits = thresholds(logits, measured.labels, source=measured.name)
    settings = app.Settings(
        title=title or Path(model).resolve().name,
        model=app.MODEL_FOLDER if local else str(model),
        revision=None if local else folder.name,
        thresholds=limits,
    )
    metadata = SpaceCardData(
        title=settings.title,
        emoji="🔎",
        colorFrom="green",
        colorTo="blue",
        sdk="gradio",
        sdk_version=SDK_VERSION,
        app_file="app.py",
        models=None if local else [settings.model],
        **_license(Path(model) / "README.md" if local else str(model)),
    )
    facts = dict(asdict(settings), classes=network.labels, labeled=len(gallery or ()), floor=app.CONFIDENCE_FLOOR)
    facts |= {"title": markdown(settings.title), "source": markdown(limits.source) if limits else None}
    SpaceCard.from_template(metadata, template_path=str(TEMPLATE / "README.md.j2"), **facts).save(out / "README.md")
    (out / "app.py").write_text(standalone(TEMPLATE / "app.py"), encoding="utf-8")
    own = [own_backbone] if is_own_backbone(trained.config.architecture) else []
    for file in [TEMPLATE / "requirements.txt", *own]:
        shutil.copyfile(file, out / file.name)
    settings.save(out)
    return settings


class _Split:
    """Labeled images, checked before any work is done. `labels` `[N]` are class numbers, and -1 for OOD images."""

    def __init__(
        self, source: str, role: str, classes: list[str], image_column: str, label_column: str, image_root: str | None
    ) -> None:
        dataset = load_split(source, role=role, image_root=image_root)
        check_images(dataset, role=role, image_column=image_column)
        measured = role == "validation"
        self.labels = read_labels(dataset, label_column, classes, role=role, allow_ood=measured)
        images, needed = int((self.labels != OUT_OF_DISTRIBUTION).sum()), round(1 / QUANTILE)
        if measured and images < needed:
            raise ValueError(
                f"The {role} split {source} has {images} images of the model's classes. The thresholds need at least "
                f"{needed}: add images, or leave the split out."
            )
        for error in unreadable_images(role, [f"{path}: {why}" for _, path, why in unreadable(dataset, image_column)]):
            raise ValueError(error)
        if (self.labels == OUT_OF_DISTRIBUTION).any():
            logger.warning(ood_sentence(count_labels(dataset, label_column, self.labels, classes)[1], role))
        self.name = Path(source).resolve().name if Path(source).exists() else source
        self._images, self._column, self._role = encoded_images(dataset, image_column), image_column, role

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, row: int) -> Image.Image:
        return decode_image(self._images[row][self._column], row, self._role)

    def batches(self) -> Iterator[list[Image.Image]]:
        for start in datasets.utils.tqdm(range(0, len(self), BATCH_SIZE), desc=f"Reading {self._role} images"):
            yield [self.image(row) for row in range(start, min(start + BATCH_SIZE, len(self)))]


def _encoded(image: Image.Image, side: int) -> bytes:
    """WebP of at most `side` pixels, without metadata such as where the photo was taken. Small images lose nothing."""
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.BICUBIC)
    small.info = {}
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", lossless=max(small.size) <= 96, quality=85)
    return buffer.getvalue()


def _write_gallery(out: Path, network: app.Model, split: _Split) -> None:
    (out / app.GALLERY_FOLDER).mkdir()
    features: list[Tensor] = []
    rows = count()
    with zipfile.ZipFile(out / app.THUMBNAILS_FILE, "w") as thumbnails:
        for images in split.batches():
            for image in images:
                # ZipInfo has no time stamp: equal images give equal files.
                thumbnails.writestr(zipfile.ZipInfo(f"{next(rows)}.webp"), _encoded(image, THUMBNAIL_SIDE))
            features.append(network.logits_and_features(images)[1])
    embeddings = F.normalize(torch.cat(features), dim=1).half()
    tensors = {"embeddings": embeddings, "labels": torch.from_numpy(split.labels)}
    save_file(tensors, out / app.EMBEDDINGS_FILE)


def _write_examples(folder: Path, split: _Split) -> None:
    """The first image of some classes, and some OOD images."""
    folder.mkdir()
    classes = np.unique(split.labels[split.labels != OUT_OF_DISTRIBUTION])[:EXAMPLES_PER_SPACE]
    rows = [int(np.flatnonzero(split.labels == number)[0]) for number in classes]
    ood = np.flatnonzero(split.labels == OUT_OF_DISTRIBUTION)
    rows += ood[:: max(1, len(ood) // OOD_EXAMPLES)][:OOD_EXAMPLES].tolist()  # neighbours are often of one class
    for number, row in enumerate(rows):
        (folder / f"{number}.webp").write_bytes(_encoded(split.image(row), EXAMPLE_SIDE))


def thresholds(logits: Tensor, labels: np.ndarray, *, source: str) -> app.Thresholds:
    """The thresholds for OOD images from logits `[N, C]` and labels `[N]`, and how often images are below them."""
    inside = labels != OUT_OF_DISTRIBUTION
    limits = [float(np.quantile(scores[inside].double(), QUANTILE)) for scores in app.confidence_and_energy(logits)]
    flagged = app.possibly_ood(logits, confidence=limits[0], energy=limits[1]).numpy()
    ood_images = int((~inside).sum())
    return app.Thresholds(
        confidence=limits[0],
        energy=limits[1],
        quantile=QUANTILE,
        source=source,
        images=int(inside.sum()),
        top1=top_k_accuracy(logits[inside], labels[inside]),
        flagged=float(flagged[inside].mean()),
        ood_images=ood_images,
        ood_flagged=float(flagged[~inside].mean()) if ood_images else None,
    )


def _license(card: str | Path) -> dict[str, Any]:
    """The license in the metadata of the model's card; empty if there is no card."""
    try:
        found = ModelCard.load(card, ignore_metadata_errors=True).data
    except (OSError, ValueError, HfHubHTTPError):
        return {}
    return {key: found[key] for key in ("license", "license_name", "license_link") if found.get(key)}
