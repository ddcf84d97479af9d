"""How every picture looks.

Each is drawn on a figure of its own, without pyplot and its global state, so that a training loop or several threads
can draw. The file's ending picks the format.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

# Okabe and Ito's palette (https://jfly.uni-koeln.de/color/): its colours stay apart under colour blindness. Without the
# yellow, which is too pale for a line on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
TEXT, GREY, AXIS, GRID = "#222222", "#666666", "#AAAAAA", "#E4E4E4"
DPI = 200


def style(ax: Axes, *, xlabel: str, ylabel: str, note: str = "", grid: bool = True) -> None:
    """Thin axes, quiet ticks, named axes, and a note over the left corner."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(AXIS)
    ax.tick_params(labelsize=9, length=3, color=AXIS, labelcolor=GREY)
    ax.set_xlabel(xlabel, fontsize=10, color=TEXT, labelpad=6)
    ax.set_ylabel(ylabel, fontsize=10, color=TEXT, labelpad=6)
    ax.set_title(note, fontsize=9, color=GREY, loc="left", pad=8)
    if grid:
        ax.grid(axis="y", color=GRID, linewidth=0.8)
        ax.set_axisbelow(True)


def save(figure: Figure, path: str | Path) -> None:
    """Write the picture; a PNG of few enough colours that a card with several is quick to load."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, facecolor="white", bbox_inches="tight", pad_inches=0.08)
    if path.suffix == ".png":
        with Image.open(path) as drawn:
            few = drawn.convert("RGB").quantize(128, dither=Image.Dither.NONE)
        few.save(path, optimize=True, dpi=(DPI, DPI))


def legend(parent: Axes | Figure, **kwargs: Any) -> None:
    parent.legend(frameon=False, fontsize=9, labelcolor=TEXT, **kwargs)


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


def name_lines(ax: Axes, ends: Sequence[tuple[str, float, float]], colors: Sequence[str], *, gap: float = 0.06) -> None:
    """Write the name of each line beside its end, in its colour.

    Args:
        ax: Axes with the lines on.
        ends: Name, x and y of the end of each line.
        colors: Their colours, used over again where there are more lines.
        gap: Least distance between two names, as a share of the axis.
    """
    low, high = ax.get_ylim()
    heights = _spread_out([y for _, _, y in ends], gap=gap * (high - low))
    for (name, x, _), height, color in zip(ends, heights, cycle(colors)):
        place: dict[str, Any] = {"xytext": (8, 0), "textcoords": "offset points", "va": "center"}
        ax.annotate(name, (x, height), fontsize=9, color=color, annotation_clip=False, **place)
