"""Pictures and tables of results: confusions, calibration, confidence on strangers, embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..data import OUT_OF_DISTRIBUTION
from ..metrics import (
    expected_calibration_error,
    out_of_distribution_auroc,
    reliability_bins,
    to_numpy,
)
from .style import COLORS, GREY, TEXT, legend, save, style

NAMED_CLASSES = 50
"""Up to so many classes a confusion matrix shows all; of more, the `MOST_MISTAKEN`."""

MOST_MISTAKEN = 20

EMBEDDED_IMAGES = 1000
"""t-SNE takes some seconds for these."""


def shown_classes(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Which classes a confusion matrix shows: all of a few, and of many those that are mistaken for each other most.

    Args:
        labels: `[N]`, in 0..C-1, or -1.
        predictions: `[N]`, in 0..C-1.
        num_classes: `C`.

    Returns:
        Their numbers: of many classes, two that are mistaken for each other stand side by side.
    """
    if num_classes <= NAMED_CLASSES:
        return np.arange(num_classes)
    wrong = (labels != predictions) & (labels != OUT_OF_DISTRIBUTION)
    pairs, counts = np.unique(labels[wrong] * num_classes + predictions[wrong], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    by_mistakes = np.stack(np.divmod(pairs[order], num_classes), axis=1).ravel().tolist()
    return np.array(list(dict.fromkeys([*by_mistakes, *range(num_classes)]))[:MOST_MISTAKEN])


def plot_confusion_matrix(labels: Any, predictions: Any, class_names: Sequence[str], path: str | Path) -> None:
    """What the images of each class were taken for, as shares of that class (each row sums to 100 %).

    Of many classes it shows those of `shown_classes`, and in a last column all the others.

    Args:
        labels: `[N]`, in 0..C-1, or -1 for an image of no known class: those make up a last row of their own.
        predictions: `[N]`, in 0..C-1.
        class_names: `C` names.
        path: The picture to write.

    Raises:
        ValueError: If shapes differ, there is no image, or a number names no class.
    """
    labels, predictions, num_classes = to_numpy(labels), to_numpy(predictions), len(class_names)
    if labels.shape != predictions.shape or labels.ndim != 1 or not len(labels):
        raise ValueError(f"Pass labels and predictions [N], N >= 1; shapes are {labels.shape} and {predictions.shape}.")
    if min(labels.min(), predictions.min() - 1) < -1 or max(labels.max(), predictions.max()) >= num_classes:
        raise ValueError(f"Labels and predictions must name one of the {num_classes} classes (labels may also be -1).")
    shown, strangers = shown_classes(labels, predictions, num_classes), bool((labels == OUT_OF_DISTRIBUTION).any())
    # Rows and columns: the shown classes in their order, then all others as one column, and strangers as the last row.
    position = np.full(num_classes + 1, len(shown))
    position[shown] = np.arange(len(shown))
    kept = np.isin(labels, [*shown, OUT_OF_DISTRIBUTION])
    counts = np.zeros((len(shown) + 1, len(shown) + 1), dtype=np.int64)
    np.add.at(counts, (position[labels[kept]], position[predictions[kept]]), 1)  # -1 is the last position
    row_names = column_names = [class_names[number] for number in shown]
    if strangers:
        row_names = [*row_names, "no known class"]
    if len(shown) < num_classes:
        column_names = [*column_names, "another class"]
    counts = counts[: len(row_names), : len(column_names)]
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)

    rows, columns = shares.shape
    numbered = len(shown) <= 20  # with more, numbers would be too small to read: colour has to do
    cell, font = (0.52, 9) if len(shown) <= 12 else (0.4, 9) if numbered else (0.2, 7)  # inches, points
    figure = Figure(figsize=(cell * columns + 2.6, cell * rows + 2), layout="constrained")
    ax = figure.add_subplot()
    # Among many classes single confusions are small: the root keeps them visible.
    image = ax.imshow(shares, cmap="Blues", norm=PowerNorm(1 if numbered else 0.5, vmin=0, vmax=1))
    note = "Percent of the images of each class" if numbered else ""
    if len(shown) < num_classes:
        note += f"; the {len(shown)} of {num_classes} classes with the most mistakes between two"
    style(ax, xlabel="Predicted class", ylabel="True class (number of images)", note=note, grid=False)
    ax.spines[:].set_visible(False)
    ax.set_xticks(range(columns), column_names, fontsize=font)
    ax.set_yticks(
        range(rows),
        [f"{name} ({n})" for name, n in zip(row_names, counts.sum(1), strict=True)],
        fontsize=font,
    )
    for tick in ax.get_xticklabels():
        tick.set(rotation=45 if numbered else 90, ha="right", va="center", rotation_mode="anchor")
    ax.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="white", linewidth=1.5 if numbered else 0.6)
    ax.tick_params(which="both", length=0)
    if strangers:
        ax.axhline(rows - 1.5, color=TEXT, linewidth=1)
    if numbered:
        for row, column in zip(*np.nonzero(shares >= 0.005), strict=True):
            share, color = shares[row, column], "white" if shares[row, column] > 0.55 else TEXT
            ax.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=color)
    else:
        ticks = (0, 0.02, 0.1, 0.25, 0.5, 1)
        bar = figure.colorbar(image, ax=ax, ticks=ticks, format=PercentFormatter(1, decimals=0), shrink=0.5, aspect=30)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=8, length=0, labelcolor=GREY)
        bar.set_label("Share of the images of each class", fontsize=9, color=TEXT)
    save(figure, path)


def plot_reliability(logits: Any, labels: Any, path: str | Path, *, num_bins: int = 15) -> None:
    """Reliability diagram (Guo et al., ICML 2017): accuracy against confidence, and how many images have which.

    Args:
        logits: `[N, C]`.
        labels: `[N]`, in 0..C-1.
        path: The picture to write.
        num_bins: Bins of equal width, as in the expected calibration error that the picture names.
    """
    counts, accuracy, confidence = reliability_bins(logits, labels, num_bins=num_bins)
    error = expected_calibration_error(logits, labels, num_bins=num_bins)
    total, width = counts.sum(), 1 / num_bins
    middle, filled = (np.arange(num_bins) + 0.5) * width, counts > 0
    figure = Figure(figsize=(4.8, 5.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))

    top.bar(middle, accuracy, width * 0.9, color=COLORS[0], label="Accuracy")
    gap = {"color": "none", "edgecolor": COLORS[1], "hatch": "////", "linewidth": 0.8}
    gap_height = (confidence - accuracy)[filled]
    top.bar(middle[filled], gap_height, width * 0.9, accuracy[filled], label="Gap to mean confidence", **gap)
    top.plot((0, 1), (0, 1), color=GREY, linewidth=1, linestyle=(0, (4, 3)), label="Perfect calibration")
    style(top, xlabel="", ylabel="Accuracy", note=f"Expected calibration error {error:.3f} ({num_bins} bins)")
    top.set(xlim=(0, 1), ylim=(0, 1))
    top.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))

    bottom.bar(middle, counts / total, width * 0.9, color="#9A9A9A")
    style(bottom, xlabel="Confidence (largest softmax probability)", ylabel="Images")
    bottom.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    bottom.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    bottom.yaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
    figure.align_ylabels()
    # Below both, because bars may reach any place within.
    legend(figure, handles=top.get_legend_handles_labels()[0], loc="outside lower center", ncols=3, columnspacing=1)
    save(figure, path)


def plot_confidence_histogram(in_conf: Any, out_conf: Any, path: str | Path) -> None:
    """How confident the classifier is on images of its classes and on strangers; the less they overlap the better.

    Args:
        in_conf: Confidence in [0, 1] of each image of a known class, `[N]`.
        out_conf: The same for images of no known class, `[M]`.
        path: The picture to write.

    Raises:
        ValueError: If one of the two is empty or holds something else than numbers in [0, 1].
    """
    known, strangers = to_numpy(in_conf), to_numpy(out_conf)
    for values in (known, strangers):
        if values.ndim != 1 or not len(values) or not ((values >= 0) & (values <= 1)).all():
            raise ValueError("Pass two lists of confidences in [0, 1], neither of them empty.")
    scores = np.concatenate([known, strangers])
    auroc = out_of_distribution_auroc(scores, np.repeat([0, OUT_OF_DISTRIBUTION], [len(known), len(strangers)]))
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    ax = figure.add_subplot()
    for values, name, color, hatch in (
        (known, "Known classes", COLORS[0], None),
        (strangers, "No known class", COLORS[1], "////"),
    ):
        height, edges = np.histogram(values, bins=20, range=(0, 1))
        look: dict[str, Any] = {"facecolor": (color, 0.12 if hatch else 0.3), "edgecolor": color, "hatch": hatch}
        label = f"{name} ({len(values)} images)"
        ax.stairs(height / len(values), edges, fill=True, linewidth=1.5, label=label, **look)
    note = f"AUROC {auroc:.3f} (1: told apart, 0.5: not at all)"
    style(ax, xlabel="Confidence (largest softmax probability)", ylabel="Share of the images of each kind", note=note)
    ax.set_xlim(0, 1)
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    legend(ax, loc="best")
    save(figure, path)


def plot_embeddings(embeddings: Any, labels: Any, class_names: Sequence[str], path: str | Path) -> int:
    """Embeddings in two dimensions by t-SNE (van der Maaten and Hinton, 2008): which images the model takes for alike.

    Args:
        embeddings: `[N, D]`; of more than `EMBEDDED_IMAGES`, so many are drawn, evenly spread over the rows.
        labels: `[N]`, in 0..C-1, or -1 for an image of no known class: those are grey crosses.
        class_names: `C` names, which are written beside their images where they are 20 at most.
        path: The picture to write.

    Returns:
        How many images are drawn.

    Raises:
        ValueError: If there are fewer than 4 images, or shapes differ.
    """
    from sklearn.manifold import TSNE  # takes a while, and few pictures need it

    embeddings, labels = to_numpy(embeddings), to_numpy(labels)
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1] or len(labels) < 4:
        raise ValueError(f"Pass embeddings [N, D] and labels [N], N >= 4, not {embeddings.shape} and {labels.shape}.")
    rows = np.unique(np.linspace(0, len(labels) - 1, EMBEDDED_IMAGES).round().astype(int))
    perplexity = min(30, (len(rows) - 1) / 3)
    points = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(embeddings[rows].astype(np.float32))
    labels, names = labels[rows], len(class_names) <= 20
    few = len(class_names) <= len(COLORS)
    colors = COLORS if few else colormaps["turbo"](np.linspace(0.05, 0.95, len(class_names)))
    figure = Figure(figsize=(6.4, 6.4), layout="constrained")
    ax = figure.add_subplot()
    strangers = points[labels == OUT_OF_DISTRIBUTION]
    ax.scatter(strangers[:, 0], strangers[:, 1], s=14, marker="x", linewidth=0.8, color="#9A9A9A")
    for number in np.unique(labels[labels != OUT_OF_DISTRIBUTION]):
        mine = points[labels == number]
        ax.scatter(mine[:, 0], mine[:, 1], s=14, color=[colors[number]], linewidth=0, alpha=0.75)
        if names:
            outline = [withStroke(linewidth=3, foreground="white")]
            x, y = np.median(mine, axis=0)
            ax.text(x, y, class_names[number], ha="center", va="center", fontsize=9, color=TEXT, path_effects=outline)
    note = f"t-SNE of {len(rows)} images, coloured by their true class"
    if len(strangers):
        note += f"; {len(strangers)} of no known class are grey crosses"
    style(ax, xlabel="", ylabel="", note=note, grid=False)
    ax.spines[:].set_visible(False)
    ax.set(xticks=[], yticks=[])
    save(figure, path)
    return len(rows)


def _cell(value: Any, digits: int) -> str:
    if value is None:
        return "–"
    if isinstance(value, str | Integral):
        return str(value)
    if isinstance(value, Sequence | np.ndarray):
        values = np.asarray(value, float)
        if np.isnan(values).any():  # undefined for a seed, such as the precision of no pseudo labels: so is the mean
            return "–"
        return f"{values.mean():.{digits}f}" + (f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else "")
    return f"{value:.{digits}f}"


def format_table(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], *, digits: int = 3, markdown: bool = False
) -> str:
    """Rows as a table: numbers at the right, one value for each seed as mean ± standard deviation.

    Args:
        rows: One mapping of column to value for each row. A list of numbers is one value for each seed; what is
            missing or None becomes a dash.
        columns: Which columns, in order.
        digits: Decimals of fractions; whole numbers and texts stay as they are.
        markdown: A Markdown table instead of plain text.

    Raises:
        ValueError: If there is no column.
    """
    if not columns:
        raise ValueError("Name at least one column of the table.")
    cells = [[_cell(row.get(column), digits) for column in columns] for row in rows]
    right = [not any(isinstance(row.get(column), str) for row in rows) for column in columns]
    if markdown:
        cells = [[cell.replace("|", "\\|") for cell in row] for row in cells]
    widths = [max(len(text) for text in column) for column in zip(columns, *cells, strict=True)]

    def line(texts: Sequence[str]) -> str:
        padded = [
            text.rjust(width) if flush else text.ljust(width)
            for text, width, flush in zip(texts, widths, right, strict=True)
        ]
        return f"| {' | '.join(padded)} |" if markdown else "  ".join(padded).rstrip()

    dashes = [
        f"{'-' * (width - 1)}{':' if flush and markdown else '-'}" for width, flush in zip(widths, right, strict=True)
    ]
    return "\n".join([line(columns), line(dashes), *map(line, cells)])
