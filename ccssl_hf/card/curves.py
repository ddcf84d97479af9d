"""Pictures of runs over their steps: methods compared over seeds, and one run from its log."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from .style import COLORS, MARKERS, name_lines, save, style


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
    style(ax, xlabel="Optimizer steps", ylabel=ylabel, note=note)
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.margins(x=0.02)
    name_lines(ax, [(f"{name}  {mean[-1]:.3g}", steps[-1], mean[-1]) for name, _, steps, mean, _ in curves], COLORS)
    save(figure, path)


def plot_training(history: Sequence[Mapping[str, Any]], path: str | Path) -> list[str]:
    """One run over its optimizer steps: top-1 of its evaluations, terms of the loss, and how pseudo labels fared.

    Args:
        history: `trainer.state.log_history`.
        path: The picture to write; none is, where the log holds nothing twice.

    Returns:
        What is drawn, from above, in words.
    """
    series = _series(history)
    panels = [(words, axis, lines) for words, axis, names in _PANELS if (lines := _chosen(series, names))]
    if not panels:
        return []
    figure = Figure(figsize=(7.2, 0.5 + 2.1 * len(panels)), layout="constrained")
    for ax, (_, axis, lines) in zip(np.atleast_1d(figure.subplots(len(panels), sharex=True)), panels, strict=True):
        for points, color, marker in zip(lines.values(), cycle(COLORS), cycle(MARKERS)):
            steps, values = np.array(points).T
            every = max(1, math.ceil(len(steps) / 12))
            ax.plot(steps, values, color=color, linewidth=1.6, marker=marker, markersize=3.5, markevery=every)
        last = ax is figure.axes[-1]
        style(ax, xlabel="Optimizer steps" if last else "", ylabel=axis)
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        ax.margins(x=0.02)
        name_lines(
            ax, [(f"{name}  {points[-1][1]:.3g}", *points[-1]) for name, points in lines.items()], COLORS, gap=0.14
        )
    figure.align_ylabels()
    save(figure, path)
    return [words for words, _, _ in panels]


_PANELS = (
    ("top-1 accuracy in evaluation", "Top-1 accuracy", r"eval_(?:(?P<name>.+)_)?top1"),
    ("the loss and its terms before they are weighted", "Loss", r"(?P<name>loss(?:_.+)?)"),
    ("pseudo labels that were trained on", "Share", r"(?P<name>mask_rate|pseudo_label_precision)"),
)
"""What is drawn in words, the name of the axis, and which keys of the log it is."""


def _series(history: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Key of the log to its finite values over steps."""
    series: dict[str, list[tuple[int, float]]] = {}
    for entry in history:
        for key, value in entry.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                series.setdefault(key, []).append((entry["step"], value))
    return series


def _chosen(series: Mapping[str, list[tuple[int, float]]], keys: str) -> dict[str, list[tuple[int, float]]]:
    """The lines of one panel by the name that is written beside each."""
    found = {key: re.fullmatch(keys, key) for key in series}
    lines = {match["name"] or "validation": series[key] for key, match in found.items() if match}
    lines = {name: points for name, points in lines.items() if len(points) > 1}
    if lines.keys() == {"loss", "loss_x"}:  # of one term alone, both are the same line
        del lines["loss"]
    names = {"loss": "total", "mask_rate": "mask rate", "pseudo_label_precision": "precision"}
    return {names.get(name, name): points for name, points in lines.items()}
