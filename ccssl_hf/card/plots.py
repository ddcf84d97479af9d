"""Pictures of a card: training curves, confusion matrix, reliability diagram, confidences and embeddings.

They are drawn on `Figure` objects, without pyplot and its global state, so training loops and threads can draw. The
suffix of a path sets the file format.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter
from PIL import Image

from ..data import OUT_OF_DISTRIBUTION
from ..escape import plot_text
from ..metrics import confidences, expected_calibration_error, out_of_distribution_auroc, reliability_bins, to_numpy
from ..record import (
    CONFIDENCE,
    CONFUSION_MATRIX,
    CURVES,
    EMBEDDINGS,
    IMAGES,
    PICTURES,
    RELIABILITY,
    RunRecord,
    SplitPredictions,
)

logger = logging.getLogger(__name__)

# The palette of Okabe and Ito (https://jfly.uni-koeln.de/color/), which color-blind readers can distinguish. Its yellow
# is left out: too pale for a line on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
TEXT, GREY = "#222222", "#666666"
LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 9, "labelcolor": TEXT}

MAX_CLASSES, MOST_CONFUSED = 50, 20  # of more than 50 classes, a confusion matrix shows the 20 most confused
EMBEDDED_IMAGES = 1000  # t-SNE takes some seconds

_PANELS = (
    ("top-1 accuracy", "Top-1 accuracy", r"eval_(?:(?P<name>.+)_)?top1"),
    ("loss and its terms before weighting", "Loss", r"(?P<name>loss(?:_.+)?)"),
    ("pseudo labels in training", "Share (training)", r"(?P<name>mask_rate|pseudo_label_precision)"),
)
"""Panels of the training curves: words for the caption, axis label, and a pattern for the keys of the log."""

_LINE_NAMES = {"loss": "total", "mask_rate": "Mask rate", "pseudo_label_precision": "Pseudo-label precision"}


def style(ax: Axes, *, xlabel: str, ylabel: str, note: str = "", grid: bool = True, percent: str = "") -> None:
    """Set axis labels, a note above the left corner, thin spines and a light grid; `percent` is "x", "y" or "xy"."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#AAAAAA")
    ax.tick_params(labelsize=9, length=3, color="#AAAAAA", labelcolor=GREY)
    ax.set_xlabel(xlabel, fontsize=10, color=TEXT, labelpad=6)
    ax.set_ylabel(ylabel, fontsize=10, color=TEXT, labelpad=6)
    ax.set_title(note, fontsize=9, color=GREY, loc="left", pad=8)
    for axis in percent:
        {"x": ax.xaxis, "y": ax.yaxis}[axis].set_major_formatter(PercentFormatter(1, decimals=0))
    if grid:
        ax.grid(axis="y", color="#E4E4E4", linewidth=0.8)
        ax.set_axisbelow(True)


def save(figure: Figure, path: str | Path) -> None:
    """Write the figure. A PNG is reduced to 128 colors, so that a card with several pictures loads quickly."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200, facecolor="white", bbox_inches="tight", pad_inches=0.08)
    if path.suffix == ".png":
        with Image.open(path) as drawn:
            reduced = drawn.convert("RGB").quantize(128, dither=Image.Dither.NONE)
        reduced.save(path, optimize=True, dpi=(200, 200))


def plot_lines(ax: Axes, lines: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Draw `(step, value)` points as lines. The legend is ordered by their last values, which it also states."""
    for (name, points), color, marker in zip(lines.items(), cycle(COLORS), cycle(MARKERS)):
        steps, values = np.array(points, dtype=float).T
        look: dict[str, Any] = {"color": color, "linewidth": 1.6, "marker": marker, "markersize": 4}
        look |= {"markevery": math.ceil(len(steps) / 12), "label": f"{plot_text(name)}  {values[-1]:.3g}"}
        ax.plot(steps, values, **look)
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.margins(x=0.02)
    by_last_value = sorted(zip(ax.lines, lines.values(), strict=True), key=lambda each: -each[1][-1][1])
    ax.legend(handles=[line for line, _ in by_last_value], loc="center left", bbox_to_anchor=(1, 0.5), **LEGEND)


def plot_training(history: Sequence[Mapping[str, Any]], path: str | Path) -> list[str]:
    """Plot the log of a run against optimizer steps: evaluated top-1 accuracy, terms of the loss, and pseudo labels.

    Returns the subjects of the panels, from top to bottom. Nothing is drawn if no key was logged at least twice.
    """
    series: dict[str, list[tuple[float, float]]] = {}
    for entry in history:
        for key, value in entry.items():
            if isinstance(value, int | float) and math.isfinite(value):
                series.setdefault(key, []).append((entry["step"], value))
    panels = []
    for subject, ylabel, pattern in _PANELS:
        found = [match for key in series if (match := re.fullmatch(pattern, key)) and len(series[key]) > 1]
        lines = {_LINE_NAMES.get(match["name"], match["name"] or "validation"): series[match[0]] for match in found}
        if lines.keys() == {"total", "loss_x"}:  # a loss with one term: both lines are the same
            del lines["total"]
        if lines:
            panels.append((subject, ylabel, lines))
    if not panels:
        return []
    figure = Figure(figsize=(7.6, 0.5 + 2.1 * len(panels)), layout="constrained")
    for ax, (_, ylabel, lines) in zip(np.atleast_1d(figure.subplots(len(panels), sharex=True)), panels, strict=True):
        style(ax, xlabel="Optimizer steps" if ax is figure.axes[-1] else "", ylabel=ylabel)
        plot_lines(ax, lines)
    figure.align_ylabels()
    save(figure, path)
    return [subject for subject, *_ in panels]


def shown_classes(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Classes that a confusion matrix shows: all, or of many those that are confused most often, as neighbors."""
    if num_classes <= MAX_CLASSES:
        return np.arange(num_classes)
    wrong = (labels != predictions) & (labels != OUT_OF_DISTRIBUTION)
    pairs, counts = np.unique(labels[wrong] * num_classes + predictions[wrong], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    by_mistakes = np.stack(np.divmod(pairs[order], num_classes), axis=1).ravel().tolist()
    return np.array(list(dict.fromkeys([*by_mistakes, *range(num_classes)]))[:MOST_CONFUSED])


def plot_confusion_matrix(labels: Any, predictions: Any, class_names: Sequence[str], path: str | Path) -> None:
    """Plot the predicted classes `[N]` of the images of each true class `[N]`, in percent of that class.

    Of many classes it shows the `shown_classes`, and all others as one last column. Out-of-distribution (OOD) images,
    with label -1, are the last row.

    Raises:
        ValueError: If shapes differ, there is no image, or a label or prediction is out of range.
    """
    labels, predictions, num_classes = to_numpy(labels), to_numpy(predictions), len(class_names)
    if labels.shape != predictions.shape or labels.ndim != 1 or not len(labels):
        raise ValueError(f"Pass labels and predictions [N], N >= 1; shapes are {labels.shape} and {predictions.shape}.")
    if min(labels.min(), predictions.min() - 1) < -1 or max(labels.max(), predictions.max()) >= num_classes:
        raise ValueError(f"Labels and predictions must name one of the {num_classes} classes (labels may also be -1).")
    shown, with_ood = shown_classes(labels, predictions, num_classes), bool((labels == OUT_OF_DISTRIBUTION).any())
    names, some = [plot_text(class_names[index]) for index in shown], len(shown) < num_classes
    row_names, column_names = names + ["OOD images"] * with_ood, names + ["other classes"] * some
    position = np.full(num_classes + 1, len(shown))  # the last position: other classes as columns, label -1 as row
    position[shown] = np.arange(len(shown))
    kept = np.isin(labels, [*shown, OUT_OF_DISTRIBUTION])
    counts = np.zeros((len(shown) + 1, len(shown) + 1), dtype=np.int64)
    np.add.at(counts, (position[labels[kept]], position[predictions[kept]]), 1)
    counts = counts[: len(row_names), : len(column_names)]
    totals = counts.sum(1, keepdims=True)
    row_names = [f"{name} ({total})" for name, total in zip(row_names, totals[:, 0], strict=True)]
    note = f"the {len(shown)} of {num_classes} classes with the most confusions" if some else ""
    _draw_matrix(counts / np.maximum(totals, 1), row_names, column_names, with_ood=with_ood, note=note, path=path)


def _draw_matrix(
    shares: np.ndarray, row_names: list[str], column_names: list[str], *, with_ood: bool, note: str, path: str | Path
) -> None:
    rows, columns = shares.shape
    numbered = rows - with_ood <= 20  # of more classes, numbers would be too small to read: color bar instead
    cell, font = (0.52, 9) if rows - with_ood <= 12 else (0.4, 9) if numbered else (0.2, 7)  # inches, points
    figure = Figure(figsize=(cell * columns + 2.6, cell * rows + 2), layout="constrained")
    ax = figure.add_subplot()
    # Among many classes single confusions are small: the root keeps them visible.
    norm = PowerNorm(1 if numbered else 0.5, vmin=0, vmax=1)
    mesh = ax.pcolormesh(shares, cmap="Blues", norm=norm, edgecolors="white", linewidth=1.5 if numbered else 0.6)
    note = "; ".join(filter(None, ["Percent of the images of each class" * numbered, note]))
    style(ax, xlabel="Predicted class", ylabel="True class (number of images)", note=note, grid=False)
    ax.set(aspect="equal", ylim=(rows, 0))
    ax.spines[:].set_visible(False)
    turned: dict[str, Any] = {"rotation": 45 if numbered else 90, "rotation_mode": "anchor", "ha": "right"}
    ax.set_xticks(np.arange(columns) + 0.5, column_names, fontsize=font, va="center", **turned)
    ax.set_yticks(np.arange(rows) + 0.5, row_names, fontsize=font)
    ax.tick_params(length=0)
    if with_ood:
        ax.axhline(rows - 1, color=TEXT, linewidth=1)
    if numbered:
        for row, column in zip(*np.nonzero(shares >= 0.005), strict=True):
            share = shares[row, column]
            color = "white" if share > 0.55 else TEXT
            ax.text(column + 0.5, row + 0.5, f"{100 * share:.0f}", color=color, ha="center", va="center", fontsize=8)
    else:
        ticks = (0, 0.02, 0.1, 0.25, 0.5, 1)
        bar = figure.colorbar(mesh, ax=ax, ticks=ticks, format=PercentFormatter(1, decimals=0), shrink=0.5, aspect=30)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=8, length=0, labelcolor=GREY)
        bar.set_label("Share of the images of each class", fontsize=9, color=TEXT)
    save(figure, path)


def plot_reliability(logits: Any, labels: Any, path: str | Path, *, num_bins: int = 15) -> None:
    """Plot a reliability diagram (Guo et al., ICML 2017): accuracy and number of images against confidence.

    Arguments are those of `metrics.reliability_bins`.
    """
    counts, accuracy, confidence = reliability_bins(logits, labels, num_bins=num_bins)
    error = expected_calibration_error(logits, labels, num_bins=num_bins)
    middle, filled, width = (np.arange(num_bins) + 0.5) / num_bins, counts > 0, 0.9 / num_bins
    figure = Figure(figsize=(4.8, 5.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    note = f"Expected calibration error {error:.3f} ({num_bins} bins)"
    style(top, xlabel="", ylabel="Accuracy", note=note, percent="y")
    top.set(xlim=(0, 1), ylim=(0, 1))
    top.bar(middle, accuracy, width, color=COLORS[0], label="Accuracy")
    gap: dict[str, Any] = {"color": "none", "edgecolor": COLORS[1], "hatch": "////", "linewidth": 0.8}
    difference = confidence[filled] - accuracy[filled]
    top.bar(middle[filled], difference, width, accuracy[filled], label="Gap to mean confidence", **gap)
    top.plot((0, 1), (0, 1), color=GREY, linewidth=1, linestyle=(0, (4, 3)), label="Perfect calibration")
    style(bottom, xlabel="Confidence (largest softmax probability)", ylabel="Images", percent="xy")
    bottom.bar(middle, counts / counts.sum(), width, color="#9A9A9A")
    bottom.yaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
    figure.align_ylabels()
    # Below the axes, because bars can reach any place within them.
    handles, _ = top.get_legend_handles_labels()
    figure.legend(handles=handles, loc="outside lower center", ncols=3, columnspacing=1, **LEGEND)
    save(figure, path)


def plot_confidence_histogram(in_conf: Any, out_conf: Any, path: str | Path) -> None:
    """Plot the confidences on in-distribution images `[N]` and OOD images `[M]`. Less overlap is better.

    Raises:
        ValueError: If one of the two is empty or holds anything but numbers in [0, 1].
    """
    inside, outside = to_numpy(in_conf), to_numpy(out_conf)
    for values in (inside, outside):
        if values.ndim != 1 or not len(values) or not ((values >= 0) & (values <= 1)).all():
            raise ValueError("Pass two lists of confidences in [0, 1], neither of them empty.")
    labels = np.repeat([0, OUT_OF_DISTRIBUTION], [len(inside), len(outside)])
    auroc = out_of_distribution_auroc(np.concatenate([inside, outside]), labels)
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    ax = figure.add_subplot()
    note = f"OOD AUROC (confidence) {auroc:.3f}; 1: perfect separation, 0.5: chance"
    style(ax, xlabel="Confidence (largest softmax probability)", ylabel="Share of each group", note=note, percent="xy")
    for values, group, color, alpha, hatch in (
        (inside, "In-distribution", COLORS[0], 0.3, None),
        (outside, "Out-of-distribution (OOD)", COLORS[1], 0.12, "////"),
    ):
        look: dict[str, Any] = {"facecolor": (color, alpha), "edgecolor": color, "hatch": hatch, "linewidth": 1.5}
        shares = np.full(len(values), 1 / len(values))
        label = f"{group}, {len(values)} images"
        ax.hist(values, bins=20, range=(0, 1), weights=shares, histtype="stepfilled", label=label, **look)
    ax.set_xlim(0, 1)
    ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    ax.legend(**LEGEND)
    save(figure, path)


def plot_embeddings(embeddings: Any, labels: Any, class_names: Sequence[str], path: str | Path) -> int:
    """Plot embeddings `[N, D]` in two dimensions by t-SNE (van der Maaten and Hinton, 2008), colored by label `[N]`.

    OOD images, with label -1, are gray crosses. Of at most 20 classes, the names are written at the median of their
    images. Returns the number of images drawn: `EMBEDDED_IMAGES` at most, evenly spread over the rows.

    Raises:
        ValueError: If there are fewer than 4 images, or shapes differ.
    """
    from sklearn.manifold import TSNE  # slow to import, and few pictures need it

    embeddings, labels = to_numpy(embeddings), to_numpy(labels)
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1] or len(labels) < 4:
        raise ValueError(f"Pass embeddings [N, D] and labels [N], N >= 4, not {embeddings.shape} and {labels.shape}.")
    rows = np.unique(np.linspace(0, len(labels) - 1, EMBEDDED_IMAGES).round().astype(int))
    perplexity = min(30, (len(rows) - 1) / 3)
    points = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(embeddings[rows].astype(np.float32))
    labels, num_classes = labels[rows], len(class_names)
    colors = COLORS if num_classes <= len(COLORS) else colormaps["turbo"](np.linspace(0.05, 0.95, num_classes))
    figure = Figure(figsize=(6.4, 6.4), layout="constrained")
    ax = figure.add_subplot()
    outside = points[labels == OUT_OF_DISTRIBUTION]
    ax.scatter(outside[:, 0], outside[:, 1], s=14, marker="x", linewidth=0.8, color="#9A9A9A")
    for index in np.unique(labels[labels != OUT_OF_DISTRIBUTION]):
        mine = points[labels == index]
        ax.scatter(mine[:, 0], mine[:, 1], s=14, color=[colors[index]], linewidth=0, alpha=0.75)
        if num_classes <= 20:
            (x, y), outline = np.median(mine, axis=0), [withStroke(linewidth=3, foreground="white")]
            look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 9, "color": TEXT}
            ax.text(x, y, plot_text(class_names[index]), **look, path_effects=outline)
    note = f"t-SNE of {len(rows)} images, color: true class"
    note += f", gray crosses: {len(outside)} OOD images" if len(outside) else ""
    style(ax, xlabel="", ylabel="", note=note, grid=False)
    ax.spines[:].set_visible(False)
    ax.set(xticks=[], yticks=[])
    save(figure, path)
    return len(rows)


def draw_pictures(record: RunRecord, folder: Path, *, only_these: bool = False) -> dict[str, str]:
    """Draw all pictures that the record has data for, and return the caption of each by its path below `folder`.

    A picture shows the split `test`, or else the last split that has the data for it. A picture that fails is logged
    and left out. `only_these` removes earlier pictures that are not drawn again: they show other weights.
    """
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    last_first = sorted(record.predictions, key=lambda each: each.split == "test")[::-1]  # the sort is stable
    labeled = [each for each in last_first if each.in_distribution.any()]
    mixed = [each for each in labeled if not each.in_distribution.all()]
    embedded = [each for each in last_first if each.embeddings is not None]
    shown = {CONFUSION_MATRIX: labeled, RELIABILITY: labeled, CONFIDENCE: mixed, EMBEDDINGS: embedded}
    captions = {}
    for file in PICTURES:
        try:
            if only_these:
                (folder / file).unlink(missing_ok=True)
            if file == CURVES and (subjects := plot_training(record.history, folder / file)):
                at = record.provenance
                weights = at and f" (evaluation: {at.weights} weights, training: raw weights, seed {at.seed})"
                captions[file] = f"Training curves{weights or ''}: {'; '.join(subjects)}."
            elif splits := shown.get(file):
                captions[file] = f"{_draw(file, folder / file, splits[0], record.class_names)}; {splits[0]}."
        except Exception:
            logger.exception("%s could not be drawn; the card is written without it.", file)
    return captions


def _draw(file: str, path: Path, split: SplitPredictions, class_names: Sequence[str]) -> str:
    """Draw a picture of a split, and return the first part of its caption."""
    known, total = split.in_distribution, len(class_names)
    if file == CONFUSION_MATRIX:
        plot_confusion_matrix(split.labels, split.logits.argmax(1), class_names, path)
        return "Confusion matrix" + f" of the {MOST_CONFUSED} most confused of {total} classes" * (total > MAX_CLASSES)
    if file == RELIABILITY:
        plot_reliability(split.logits[known], split.labels[known], path)
        return "Reliability diagram: accuracy and number of images against confidence"
    if file == CONFIDENCE:
        confidence = confidences(split.logits)
        plot_confidence_histogram(confidence[known], confidence[~known], path)
        return "Confidence on in-distribution and out-of-distribution images"
    number = plot_embeddings(split.embeddings, split.labels, class_names, path)
    return f"Embeddings of {number} images in two dimensions by t-SNE, colored by their true class"
