"""The pictures beside a card: which of them there are, what they are drawn from, and what they say of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..metrics import confidences
from ..record import Provenance, SplitPredictions
from .curves import plot_training
from .model_card import CONFIDENCE, CONFUSION_MATRIX, CURVES, EMBEDDINGS, RELIABILITY
from .plots import (
    plot_confidence_histogram,
    plot_confusion_matrix,
    plot_embeddings,
    plot_reliability,
    shown_classes,
)

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
    """Draw what there is something to draw from; a picture that fails is logged and left out.

    Of several splits a picture is of `test`, or else of the last one that has what it shows.

    Args:
        folder: The folder of the card.
        predictions: Of each split.
        class_names: `C` names.
        history: `trainer.state.log_history`, for the curves.
        provenance: The weights that were evaluated, for their caption.
        only_these: Whether pictures go that lie there from before and are not drawn anew, as they are of other weights.

    Returns:
        File, relative to `folder`, to its caption.
    """
    (folder / CURVES).parent.mkdir(parents=True, exist_ok=True)
    pictures = {}
    ordered = sorted(predictions, key=lambda each: each.split == "test")  # stable: the last one measured comes last
    drawings: dict[str, Callable[[Path], str | None]] = {
        CURVES: lambda path: _curves(path, history, provenance),
        CONFUSION_MATRIX: lambda path: _confusion_matrix(path, ordered, class_names),
        RELIABILITY: lambda path: _reliability(path, ordered),
        CONFIDENCE: lambda path: _confidence(path, ordered),
        EMBEDDINGS: lambda path: _embeddings(path, ordered, class_names),
    }
    for file, draw in drawings.items():
        try:
            if only_these:
                (folder / file).unlink(missing_ok=True)
            caption = draw(folder / file)
        except Exception:
            logger.exception("%s could not be drawn; the card goes without it.", file)
            continue
        if caption is not None:
            pictures[file] = caption
    return pictures


def _last(predictions: Sequence[SplitPredictions], holds: Callable[[SplitPredictions], Any]) -> SplitPredictions | None:
    return next((each for each in reversed(predictions) if holds(each)), None)


def _curves(path: Path, history: Sequence[Mapping[str, Any]], provenance: Provenance | None) -> str | None:
    shown = plot_training(history, path)
    if not shown:
        return None
    run = (
        f" (evaluated: {provenance.weights} weights, trained: raw weights; seed {provenance.seed})"
        if provenance
        else ""
    )
    return f"The run over its optimizer steps{run}: {'; '.join(shown)}."


def _confusion_matrix(path: Path, predictions: Sequence[SplitPredictions], class_names: Sequence[str]) -> str | None:
    shown = _last(predictions, lambda each: each.in_distribution.any())
    if shown is None:
        return None
    guesses = shown.logits.argmax(1)
    plot_confusion_matrix(shown.labels, guesses, class_names, path)
    number = len(shown_classes(shown.labels, guesses, len(class_names)))
    which = (
        f"the {number} of {len(class_names)} classes that are mistaken most"
        if number < len(class_names)
        else "each class"
    )
    return f"Confusion matrix: what the images of {which} were taken for; {shown}."


def _reliability(path: Path, predictions: Sequence[SplitPredictions]) -> str | None:
    shown = _last(predictions, lambda each: each.in_distribution.any())
    if shown is None:
        return None
    plot_reliability(shown.logits[shown.in_distribution], shown.labels[shown.in_distribution], path)
    return f"Reliability diagram: how often answers of a confidence are right, and how many there are; {shown}."


def _confidence(path: Path, predictions: Sequence[SplitPredictions]) -> str | None:
    shown = _last(predictions, lambda each: each.in_distribution.any() and not each.in_distribution.all())
    if shown is None:
        return None
    confidence = confidences(shown.logits)
    plot_confidence_histogram(confidence[shown.in_distribution], confidence[~shown.in_distribution], path)
    return f"How confident the model is of images of known classes, and of images of no known class; {shown}."


def _embeddings(path: Path, predictions: Sequence[SplitPredictions], class_names: Sequence[str]) -> str | None:
    shown = _last(predictions, lambda each: each.embeddings is not None)
    if shown is None or shown.embeddings is None:
        return None
    number = plot_embeddings(shown.embeddings, shown.labels, class_names, path)
    return f"Embeddings of {number} images in two dimensions by t-SNE, coloured by their true class; {shown}."
