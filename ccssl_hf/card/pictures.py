"""Pictures of a card: draws those that the data of a run allow, and writes their captions."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..metrics import confidences
from ..record import Provenance, SplitPredictions
from . import plots
from .model_card import CONFIDENCE, CONFUSION_MATRIX, CURVES, EMBEDDINGS, PICTURES, RELIABILITY

logger = logging.getLogger(__name__)


def draw_pictures(
    folder: Path,
    predictions: Sequence[SplitPredictions],
    class_names: Sequence[str],
    *,
    history: Sequence[Mapping[str, Any]] = (),
    provenance: Provenance | None = None,
    only_these: bool = False,
) -> dict[str, str]:
    """Draw all pictures that there are data for. A picture that fails is logged and left out.

    A picture shows the split `test`, or else the last split that has the data for it.

    Args:
        folder: The folder of the card.
        predictions: Predictions on each split.
        class_names: `C` names.
        history: `trainer.state.log_history`, for the training curves.
        provenance: The evaluated weights, for the caption of the training curves.
        only_these: Remove earlier pictures that are not drawn again: they show other weights.

    Returns:
        Path of each picture, relative to `folder`, to its caption.
    """
    (folder / CURVES).parent.mkdir(parents=True, exist_ok=True)
    last_first = sorted(predictions, key=lambda each: each.split == "test")[::-1]  # the sort is stable
    labeled = [each for each in last_first if (each.labels >= 0).any()]
    mixed = [each for each in labeled if (each.labels < 0).any()]
    embedded = [each for each in last_first if each.embeddings is not None]
    shown = {CONFUSION_MATRIX: labeled, RELIABILITY: labeled, CONFIDENCE: mixed, EMBEDDINGS: embedded}
    captions = {}
    for file in PICTURES:
        try:
            if only_these:
                (folder / file).unlink(missing_ok=True)
            if file == CURVES and (subjects := plots.plot_training(history, folder / file)):
                captions[file] = _training_caption(subjects, provenance)
            elif splits := shown.get(file):
                captions[file] = f"{_draw(file, folder / file, splits[0], class_names)}; {splits[0]}."
        except Exception:
            logger.exception("%s could not be drawn; the card is written without it.", file)
    return captions


def _training_caption(subjects: Sequence[str], provenance: Provenance | None) -> str:
    weights = ""
    if provenance:
        weights = f" (evaluation: {provenance.weights} weights, training: raw weights, seed {provenance.seed})"
    return f"Training curves{weights}: {'; '.join(subjects)}."


def _draw(file: str, path: Path, split: SplitPredictions, class_names: Sequence[str]) -> str:
    """Draw a picture of a split, and return the first part of its caption."""
    known = split.in_distribution
    if file == CONFUSION_MATRIX:
        predicted, total = split.logits.argmax(1), len(class_names)
        plots.plot_confusion_matrix(split.labels, predicted, class_names, path)
        number = len(plots.shown_classes(split.labels, predicted, total))
        return "Confusion matrix" + (f" of the {number} most confused of {total} classes" if number < total else "")
    if file == RELIABILITY:
        plots.plot_reliability(split.logits[known], split.labels[known], path)
        return "Reliability diagram: accuracy and number of images against confidence"
    if file == CONFIDENCE:
        confidence = confidences(split.logits)
        plots.plot_confidence_histogram(confidence[known], confidence[~known], path)
        return "Confidence on in-distribution and out-of-distribution images"
    number = plots.plot_embeddings(split.embeddings, split.labels, class_names, path)
    return f"Embeddings of {number} images in two dimensions by t-SNE, colored by their true class"
