"""Tables of results as plain text or Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np


def _cell(value: Any, digits: int) -> str:
    if value is None:
        return "–"
    if isinstance(value, str | Integral):
        return str(value)
    if isinstance(value, Sequence | np.ndarray):
        values = np.asarray(value, float)
        if np.isnan(values).any():  # undefined for one seed (the precision of no pseudo labels), so the mean is too
            return "–"
        return f"{values.mean():.{digits}f}" + (f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else "")
    return f"{value:.{digits}f}"


def format_table(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], *, digits: int = 3, markdown: bool = False
) -> str:
    """Format rows as a table with numbers aligned at the right.

    Args:
        rows: One mapping of column to value for each row. A list of numbers holds one value for each seed and is
            written as mean ± standard deviation. A missing value or None is written as a dash.
        columns: The columns, in order.
        digits: Decimals of fractions. Whole numbers and texts are written unchanged.
        markdown: Return a Markdown table instead of plain text.

    Raises:
        ValueError: If there is no column.
    """
    if not columns:
        raise ValueError("Name at least one column of the table.")
    cells = [[_cell(row.get(column), digits) for column in columns] for row in rows]
    if markdown:
        cells = [[cell.replace("|", "\\|") for cell in row] for row in cells]
    numeric = [not any(isinstance(row.get(column), str) for row in rows) for column in columns]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]

    def line(texts: Sequence[str]) -> str:
        aligned = zip(texts, widths, numeric, strict=True)
        padded = [text.rjust(width) if right else text.ljust(width) for text, width, right in aligned]
        return f"| {' | '.join(padded)} |" if markdown else "  ".join(padded).rstrip()

    ends = [":" if right and markdown else "-" for right in numeric]
    dashes = ["-" * (width - 1) + end for width, end in zip(widths, ends, strict=True)]
    return "\n".join(map(line, [columns, dashes, *cells]))
