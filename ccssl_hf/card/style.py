"""The look of all plots.

Plots are drawn on `Figure` objects, without pyplot and its global state, so training loops and threads can draw. The
suffix of the path sets the file format.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image

# The palette of Okabe and Ito (https://jfly.uni-koeln.de/color/), which color-blind readers can distinguish. Its yellow
# is left out: too pale for a line on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
TEXT, GREY, AXIS, GRID = "#222222", "#666666", "#AAAAAA", "#E4E4E4"
LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 9, "labelcolor": TEXT}
DPI = 200


def style(ax: Axes, *, xlabel: str, ylabel: str, note: str = "", grid: bool = True, percent: str = "") -> None:
    """Set axis labels, a note above the left corner, thin spines and a light grid; `percent` is "x", "y" or "xy"."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(AXIS)
    ax.tick_params(labelsize=9, length=3, color=AXIS, labelcolor=GREY)
    ax.set_xlabel(xlabel, fontsize=10, color=TEXT, labelpad=6)
    ax.set_ylabel(ylabel, fontsize=10, color=TEXT, labelpad=6)
    ax.set_title(note, fontsize=9, color=GREY, loc="left", pad=8)
    for axis in percent:
        {"x": ax.xaxis, "y": ax.yaxis}[axis].set_major_formatter(PercentFormatter(1, decimals=0))
    if grid:
        ax.grid(axis="y", color=GRID, linewidth=0.8)
        ax.set_axisbelow(True)


def save(figure: Figure, path: str | Path) -> None:
    """Write the figure. A PNG is reduced to 128 colors, so that a card with several pictures loads quickly."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, facecolor="white", bbox_inches="tight", pad_inches=0.08)
    if path.suffix == ".png":
        with Image.open(path) as drawn:
            reduced = drawn.convert("RGB").quantize(128, dither=Image.Dither.NONE)
        reduced.save(path, optimize=True, dpi=(DPI, DPI))
