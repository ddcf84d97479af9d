"""Pictures and tables of results: convergence over seeds, confusions, calibration, confidence on strangers.

Every picture is drawn on a figure of its own, without pyplot and its global state, so that a training loop or several
threads can draw. The file's ending picks the format.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from .metrics import (
    OUT_OF_DISTRIBUTION,
    expected_calibration_error,
    out_of_distribution_auroc,
    reliability_bins,
    to_numpy,
)

# Okabe and Ito's palette (https://jfly.uni-koeln.de/color/): its colours stay apart under colour blindness. Without the
# yellow, which is too pale for a line on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_TEXT, _GREY, _AXIS, _GRID = "#222222", "#666666", "#AAAAAA", "#E4E4E4"
_DPI = 200


def _style(ax: Axes, *, xlabel: str, ylabel: str, note: str = "", grid: bool = True) -> None:
    """Thin axes, quiet ticks, named axes, and a note over the left corner."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(_AXIS)
    ax.tick_params(labelsize=9, length=3, color=_AXIS, labelcolor=_GREY)
    ax.set_xlabel(xlabel, fontsize=10, color=_TEXT, labelpad=6)
    ax.set_ylabel(ylabel, fontsize=10, color=_TEXT, labelpad=6)
    ax.set_title(note, fontsize=9, color=_GREY, loc="left", pad=8)
    if grid:
        ax.grid(axis="y", color=_GRID, linewidth=0.8)
        ax.set_axisbelow(True)


def _save(figure: Figure, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI, facecolor="white", bbox_inches="tight", pad_inches=0.08)


def _legend(ax: Axes, **kwargs: Any) -> None:
    ax.legend(frameon=False, fontsize=9, labelcolor=_TEXT, **kwargs)


def _spread_out(heights: Sequence[float], gap: float) -> list[float]:
    """`heights` moved apart to at least `gap`, in the same order: those that touch are stacked around their mean."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    stacks: list[tuple[float, int]] = []  # middle, number of labels
    for i in order:
        stacks.append((heights[i], 1))
        while len(stacks) > 1 and stacks[-1][0] - stacks[-2][0] < gap * (stacks[-1][1] + stacks[-2][1]) / 2:
            (low, n), (high, k) = stacks[-2:]
            stacks[-2:] = [((low * n + high * k) / (n + k), n + k)]
    placed = [middle + gap * (j - (size - 1) / 2) for middle, size in stacks for j in range(size)]
    return [height for _, height in sorted(zip(order, placed, strict=True))]


def _mean_and_spread(
    name: str, seeds: Sequence[Sequence[tuple[int, float]]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps that all seeds share, the mean over seeds and the standard deviation (0 of one seed) there."""
    by_step = [dict(history) for history in seeds]
    steps = sorted(set(by_step[0]).intersection(*by_step[1:])) if by_step else []
    if not steps:
        raise ValueError(f"The seeds of {name!r} share no step; measure all of them at the same steps.")
    values = np.array([[history[step] for step in steps] for history in by_step], dtype=np.float64)
    spread = values.std(0, ddof=1) if len(values) > 1 else np.zeros(len(steps))
    return np.array(steps), values.mean(0), spread


def plot_convergence(
    histories: Mapping[str, Sequence[Sequence[tuple[int, float]]]], path: str | Path, ylabel: str
) -> None:
    """Mean over seeds against optimizer steps, one line for each method, with a band of one standard deviation.

    Args:
        histories: Method to one history for each seed, `[(step, value), ...]`. Of a method whose seeds were measured at
            different steps, only the steps that all seeds share are drawn.
        path: The picture to write.
        ylabel: What the values are, with split, weights and unit.

    Raises:
        ValueError: If there is nothing to draw, or the seeds of a method share no step.
    """
    curves = [(name, len(seeds), *_mean_and_spread(name, seeds)) for name, seeds in histories.items()]
    if not curves:
        raise ValueError("There is no history to draw; pass at least one method with one seed.")
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    ax = figure.add_subplot()
    for (_, _, steps, mean, spread), color, marker in zip(curves, cycle(COLORS), cycle(MARKERS)):
        ax.fill_between(steps, mean - spread, mean + spread, color=color, alpha=0.16, linewidth=0)
        every = max(1, math.ceil(len(steps) / 12))
        ax.plot(steps, mean, color=color, linewidth=1.8, marker=marker, markersize=4, markevery=every)
    numbers = sorted({number for _, number, *_ in curves})
    seeds = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    note = f"Mean of {seeds} seeds, band: ± one standard deviation" if numbers[-1] > 1 else "One seed"
    _style(ax, xlabel="Optimizer steps", ylabel=ylabel, note=note)
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.margins(x=0.02)
    low, high = ax.get_ylim()
    heights = _spread_out([float(mean[-1]) for *_, mean, _ in curves], gap=0.06 * (high - low))
    for (name, _, steps, mean, _), height, color in zip(curves, heights, cycle(COLORS)):
        ax.annotate(
            f"{name}  {mean[-1]:.3g}",
            (steps[-1], height),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=color,
        )
    _save(figure, path)


def plot_confusion_matrix(labels: Any, predictions: Any, class_names: Sequence[str], path: str | Path) -> None:
    """What the images of each class were taken for, as shares of that class (each row sums to 100 %).

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
    strangers = bool((labels == OUT_OF_DISTRIBUTION).any())
    counts = np.zeros((num_classes + strangers, num_classes), dtype=np.int64)
    np.add.at(counts, (labels, predictions), 1)  # -1 lands in the last row
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    row_names = [*class_names, "no known class"] if strangers else list(class_names)

    numbered = num_classes <= 20  # with more, numbers would be too small to read: colour has to do
    cell, font = (0.52, 9) if num_classes <= 12 else (0.4, 9) if numbered else (0.2, 7)  # inches, points
    figure = Figure(figsize=(cell * num_classes + 2.6, cell * len(row_names) + 2), layout="constrained")
    ax = figure.add_subplot()
    # Among many classes single confusions are small: the root keeps them visible.
    image = ax.imshow(shares, cmap="Blues", norm=PowerNorm(1 if numbered else 0.5, vmin=0, vmax=1))
    note = "Percent of the images of each class" if numbered else ""
    _style(ax, xlabel="Predicted class", ylabel="True class (number of images)", note=note, grid=False)
    ax.spines[:].set_visible(False)
    ax.set_xticks(range(num_classes), class_names, fontsize=font)
    ax.set_yticks(
        range(len(row_names)),
        [f"{name} ({n})" for name, n in zip(row_names, counts.sum(1), strict=True)],
        fontsize=font,
    )
    for tick in ax.get_xticklabels():
        tick.set(rotation=45 if numbered else 90, ha="right", va="center", rotation_mode="anchor")
    ax.set_xticks(np.arange(num_classes + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(len(row_names) + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="white", linewidth=1.5 if numbered else 0.6)
    ax.tick_params(which="both", length=0)
    if strangers:
        ax.axhline(num_classes - 0.5, color=_TEXT, linewidth=1)
    if numbered:
        for row, column in zip(*np.nonzero(shares >= 0.005), strict=True):
            share, color = shares[row, column], "white" if shares[row, column] > 0.55 else _TEXT
            ax.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=color)
    else:
        ticks = (0, 0.02, 0.1, 0.25, 0.5, 1)
        bar = figure.colorbar(image, ax=ax, ticks=ticks, format=PercentFormatter(1, decimals=0), shrink=0.5, aspect=30)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=8, length=0, labelcolor=_GREY)
        bar.set_label("Share of the images of each class", fontsize=9, color=_TEXT)
    _save(figure, path)


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
    top.plot((0, 1), (0, 1), color=_GREY, linewidth=1, linestyle=(0, (4, 3)), label="Perfect calibration")
    _style(top, xlabel="", ylabel="Accuracy", note=f"Expected calibration error {error:.3f} ({num_bins} bins)")
    top.set(xlim=(0, 1), ylim=(0, 1))
    top.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _legend(top, loc="upper left")

    bottom.bar(middle, counts / total, width * 0.9, color="#9A9A9A")
    _style(bottom, xlabel="Confidence (largest softmax probability)", ylabel="Images")
    bottom.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    bottom.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    bottom.yaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
    figure.align_ylabels()
    _save(figure, path)


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
        ax.stairs(height / len(values), edges, fill=True, color=color, alpha=0.12 if hatch else 0.3)
        label = f"{name} ({len(values)} images)"
        ax.stairs(height / len(values), edges, color=color, linewidth=1.5, hatch=hatch, label=label)
    note = f"AUROC {auroc:.3f} (1: told apart, 0.5: not at all)"
    _style(ax, xlabel="Confidence (largest softmax probability)", ylabel="Share of the images of each kind", note=note)
    ax.set_xlim(0, 1)
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    _legend(ax, loc="best")
    _save(figure, path)


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
