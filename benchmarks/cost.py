"""Time and memory of a training step and of the contrastive loss against their sizes, with a plot.

A step is FixMatch with CCSSL through `CCSSLTrainer`, at 32 px. Memory is what a run or a call adds to the resident
memory of a fresh process.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
from contrastive import memory_and_seconds, ours
from harness import Bar, Row, in_child, main, rise_of_memory
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from workload import StepEnds, as_dataset, jpeg, make_trainer, photo_cuts

from ccssl_hf.card.plots import COLORS, GREY, LEGEND, save, style

BATCH = 8
STEP, LOSS = "training step, mu", "contrastive loss, N"


def step_cost(mu: int, steps: int) -> tuple[float, float]:
    """MiB that a run adds, and the median seconds of its steps after the first. To be called in a fresh process."""
    clock = StepEnds()
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder)
        images = as_dataset([jpeg(cut) for cut in photo_cuts(256, (32, 32), (32, 32))])
        args = {"max_steps": steps, "per_device_train_batch_size": BATCH, "mu": mu}
        labeled = images.select(range(64))
        trainer = make_trainer(folder, "wide_resnet10_1_cifar", labeled, images, callbacks=[clock], **args)
        mebibytes = rise_of_memory(trainer.train)
    return mebibytes, statistics.median(after - before for before, after in pairwise(clock.times[1:]))


def line_fit(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Slope and intercept of the least-squares line, and R², its share of the variance."""
    slope, intercept = np.polyfit(x, y, 1)
    return float(slope), float(intercept), float(np.corrcoef(x, y)[0, 1] ** 2)


def costs_of(rows: Sequence[Row], subject: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The sizes of the subject's rows, with their seconds and MiB."""
    own = [row.details for row in rows if row.details.get("subject") == subject]
    return np.array([cost["size"] for cost in own]), {
        quantity: np.array([cost[quantity] for cost in own]) for quantity in ("seconds", "mebibytes")
    }


def panel(ax: Axes, x: np.ndarray, y: np.ndarray, fit: np.ndarray, label: str, xlabel: str, ylabel: str) -> None:
    ax.plot(x, fit, color=GREY, linewidth=1.2, linestyle=(0, (4, 3)), label=label)
    ax.plot(x, y, color=COLORS[0], linewidth=0, marker="o", markersize=5, label="Measured")
    style(ax, xlabel=xlabel, ylabel=ylabel)
    ax.legend(**LEGEND)


def draw(rows: Sequence[Row], folder: Path) -> None:
    """Four panels: step and loss as rows, time and memory as columns."""
    figure = Figure(figsize=(8.6, 6.6), layout="constrained")
    above, below = figure.subplots(2, 2)
    sizes, costs = costs_of(rows, STEP)
    for ax, quantity, ylabel in zip(above, costs, ("Time of a step (s)", "Memory of a run (MiB)"), strict=True):
        slope, intercept, r_squared = line_fit(sizes, costs[quantity])
        xlabel = "mu (unlabeled images for each labeled image)"
        panel(ax, sizes, costs[quantity], slope * sizes + intercept, f"Line, R² = {r_squared:.3f}", xlabel, ylabel)
        ax.set_xticks(sizes)
        ax.set_ylim(bottom=0)
    sizes, costs = costs_of(rows, LOSS)
    ylabels = ("Time of the loss (s)", "Memory of the loss (MiB)")
    for ax, quantity, ylabel, power in zip(below, costs, ylabels, (2, 1), strict=True):
        cost = costs[quantity]
        reference = cost[-1] * (sizes / sizes[-1]) ** power  # through the largest size, where constants matter least
        ax.set(xscale="log", yscale="log")
        label = f"Slope {power} ({'quadratic' if power == 2 else 'linear'} in N)"
        panel(ax, sizes, cost, reference, label, "N (images, two views each)", ylabel)
        ax.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=30)
        ax.xaxis.set_minor_locator(NullLocator())
    save(figure, folder / "cost.png")


def measure(quick: bool) -> list[Row]:
    mus = [1, 2] if quick else [1, 3, 7, 15]
    sizes = [64, 128] if quick else [1 << power for power in range(10, 17)]
    measured = [(STEP, mu, in_child(step_cost, mu, 3 if quick else 12)) for mu in mus]
    measured += [(LOSS, size, in_child(memory_and_seconds, ours, size)) for size in sizes]
    rows = []
    for subject, size, (mebibytes, seconds) in measured:
        details = {"subject": subject, "size": size, "seconds": seconds, "mebibytes": mebibytes}
        rows.append(Row(f"{subject} = {size:,}", "", f"{mebibytes:,.0f} MiB", seconds, "s", details=details))
    step_sizes, step = costs_of(rows, STEP)
    loss_sizes, loss = costs_of(rows, LOSS)
    for quantity in step:
        rows.append(Row(f"{STEP}: {quantity}", "", "", line_fit(step_sizes, step[quantity])[2], "R² of a line"))
    for quantity, bar in (("seconds", None), ("mebibytes", Bar("≤", 1.1))):
        slope = line_fit(np.log(loss_sizes), np.log(loss[quantity]))[0]
        rows.append(Row(f"{LOSS}: {quantity}", "", "", slope, "slope of logarithms", bar))
    return rows


if __name__ == "__main__":
    main(__file__, measure, draw)
