"""What a step and the contrastive loss cost against their sizes: rows, and one figure.

    python benchmarks/cost.py

A step is FixMatch with CCSSL through `CCSSLTrainer`, at 32 px. Memory is what the run or the call adds to the resident
memory of a fresh process.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from contrastive import memory_and_seconds, ours
from harness import Bar, Row, in_child, main, rise_of_memory
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from PIL import Image
from transformers import TrainerCallback

from ccssl_hf import CCSSLForImageClassification, CCSSLTrainer, CCSSLTrainingArguments
from ccssl_hf.card.style import COLORS

BATCH = 8
STEP, LOSS = "training step, mu", "contrastive loss, N"
_GREY = "#666666"


class Clock(TrainerCallback):
    """Notes the time after each step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())


def images(count: int) -> datasets.Dataset:
    """Noise of 32 px."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    columns = {"image": list(map(Image.fromarray, pixels)), "label": [number % 2 for number in range(count)]}
    return datasets.Dataset.from_dict(columns, features=features)


def step_cost(mu: int, steps: int) -> tuple[float, float]:
    """MiB that a run adds, and the median seconds of its steps after the first: for a fresh process."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder)
        model = CCSSLForImageClassification.from_timm("wide_resnet10_1_cifar", labels=["a", "b"])
        args = CCSSLTrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            mu=mu,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = CCSSLTrainer(model, args, images(64), images(256), callbacks=[clock])
        mebibytes = rise_of_memory(trainer.train)
    return mebibytes, statistics.median(after - before for before, after in pairwise(clock.ends))


def line_fit(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Slope and intercept of the least-squares line, and R², its share of the variance."""
    slope, intercept = np.polyfit(x, y, 1)
    return float(slope), float(intercept), float(np.corrcoef(x, y)[0, 1] ** 2)


def _panel(ax: Axes, x: np.ndarray, y: np.ndarray, fit: np.ndarray, label: str, xlabel: str, ylabel: str) -> None:
    ax.plot(x, fit, color=_GREY, linewidth=1.2, linestyle=(0, (4, 3)), label=label)
    ax.plot(x, y, color=COLORS[0], linewidth=0, marker="o", markersize=5, label="Measured")
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.grid(color="#E4E4E4", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.legend(frameon=False, fontsize=9)


def costs_of(rows: Sequence[Row], subject: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The sizes of the subject's rows, and their seconds and MiB."""
    own = [row.details for row in rows if row.details.get("subject") == subject]
    return np.array([cost["size"] for cost in own]), {
        quantity: np.array([cost[quantity] for cost in own]) for quantity in ("seconds", "mebibytes")
    }


def draw(rows: Sequence[Row], folder: Path) -> None:
    """Four panels: a step above, the loss below; time at the left, memory at the right."""
    figure = Figure(figsize=(8.6, 6.6), layout="constrained")
    above, below = figure.subplots(2, 2)
    sizes, costs = costs_of(rows, STEP)
    for ax, quantity, ylabel in zip(above, costs, ("Time of a step (s)", "Memory of a run (MiB)"), strict=True):
        slope, intercept, r_squared = line_fit(sizes, costs[quantity])
        xlabel = "mu (unlabeled images per labeled one)"
        _panel(ax, sizes, costs[quantity], slope * sizes + intercept, f"Line, R² = {r_squared:.3f}", xlabel, ylabel)
        ax.set_xticks(sizes)
        ax.set_ylim(bottom=0)
    sizes, costs = costs_of(rows, LOSS)
    ylabels = ("Time of the loss (s)", "Memory of the loss (MiB)")
    for ax, quantity, ylabel, power in zip(below, costs, ylabels, (2, 1), strict=True):
        cost = costs[quantity]
        reference = cost[-1] * (sizes / sizes[-1]) ** power  # through the largest, where constants weigh least
        label = f"Slope {power} ({'quadratic' if power == 2 else 'linear'} in N)"
        ax.set_xscale("log")
        ax.set_yscale("log")
        _panel(ax, sizes, cost, reference, label, "N (images, two views each)", ylabel)
        ax.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=30)
        ax.xaxis.set_minor_locator(NullLocator())
    figure.savefig(folder / "cost.png", dpi=200, facecolor="white", bbox_inches="tight", pad_inches=0.08)


def measure(quick: bool) -> list[Row]:
    mus = [1, 2] if quick else [1, 3, 7, 15]
    sizes = [64, 128] if quick else [1 << power for power in range(10, 17)]
    measured = [(STEP, mu, in_child(step_cost, mu, 3 if quick else 12)) for mu in mus]
    measured += [(LOSS, size, in_child(memory_and_seconds, ours, size)) for size in sizes]
    rows = [
        Row(
            what=f"{subject} = {size:,}",
            baseline="",
            ours=f"{mebibytes:,.0f} MiB",
            figure=seconds,
            unit="s",
            details={"subject": subject, "size": size, "seconds": seconds, "mebibytes": mebibytes},
        )
        for subject, size, (mebibytes, seconds) in measured
    ]
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
