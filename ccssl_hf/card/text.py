"""Values as text and plain data: names without local paths, cells and tables."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from enum import Enum
from numbers import Integral
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .. import escape
from ..escape import printable


def without_folder(text: str) -> str:
    """The last part of an absolute or `./`-like path; any other text as it is."""
    local = PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()
    return _last_part(text) if local or text.startswith(("~", "./", "../")) else text


def _last_part(path: str) -> str:
    return PureWindowsPath(path).name or path  # both separators


def public_name(name: str) -> tuple[str, bool]:
    """The name of a dataset or model on the card, and whether it is a Hub id. A path is cut to its last part."""
    name = re.sub(r"^(hf[-_]hub|local-dir):", "", name)
    try:
        validate_repo_id(name)
        on_hub = not Path(name).exists() and Path(name).suffix not in (".parquet", ".csv", ".json", ".zip")
    except HFValidationError:
        on_hub = False
    return name if on_hub else _last_part(name), on_hub


def plain(value: Any) -> Any:
    """A setting as plain data for YAML, without the folders of paths."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Enum):
        value = value.value
    if value is None or type(value) in (bool, int, float):
        return value
    return value.item() if hasattr(value, "item") else without_folder(str(value))


def words(value: Any) -> str:
    """A value as text, without the folders of paths."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        value = [f"{key}={words(item)}" for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return ", ".join(map(words, value))
    return "none" if value is None else without_folder(str(value))


def cell(value: Any) -> str:
    """A value as a cell or line of Markdown, without the folders of paths."""
    return escape.markdown(words(value))


def format_table(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    *,
    digits: int = 3,
    markdown: bool = False,
    width: int = 0,
) -> str:
    """Format rows, mappings of column to value, as a plain text or Markdown table with numbers aligned at the right.

    A list of numbers holds one value for each seed and is written as mean ± standard deviation. A missing value or None
    is written as a dash. `digits` are the decimals of fractions; whole numbers and texts are written unchanged, so
    texts of a Markdown table may hold markup. If a plain table is wider than `width` characters and that is not 0, its
    widest column is wrapped.

    Raises:
        ValueError: If there is no column.
    """
    if not columns:
        raise ValueError("Name at least one column of the table.")
    numeric = [not any(isinstance(row.get(column), str) for row in rows) for column in columns]
    cells = [[_number(row.get(column), digits) for column in columns] for row in rows]
    columns, *cells = [[printable(text) for text in row] for row in (columns, *cells)]
    if markdown:
        cells = [[text.replace("|", "\\|") for text in row] for row in cells]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]

    def line(texts: Sequence[str]) -> str:
        aligned = zip(texts, widths, numeric, strict=True)
        padded = [text.rjust(width) if right else text.ljust(width) for text, width, right in aligned]
        return f"| {' | '.join(padded)} |" if markdown else "  ".join(padded).rstrip()

    too_wide, widest = sum(widths) + 2 * (len(widths) - 1) - width, widths.index(max(widths))
    if width and too_wide > 0 and not markdown:
        widths[widest] = max(10, len(columns[widest]), widths[widest] - too_wide)
        cells = [line for row in cells for line in _wrapped(row, widest, widths[widest])]
    ends = [":" if right and markdown else "-" for right in numeric]
    dashes = ["-" * (width - 1) + end for width, end in zip(widths, ends, strict=True)]
    return "\n".join(map(line, [columns, dashes, *cells]))


def _wrapped(row: Sequence[str], column: int, width: int) -> list[list[str]]:
    """The lines of a row whose text in one column is wrapped."""
    lines = textwrap.wrap(row[column], width) or [""]
    rest = [["" if i != column else line for i in range(len(row))] for line in lines[1:]]
    return [[*row[:column], lines[0], *row[column + 1 :]], *rest]


def _number(value: Any, digits: int) -> str:
    if isinstance(value, str | Integral):
        return str(value)
    values = np.atleast_1d(np.asarray(value, float))
    if np.isnan(values).any():  # None, or undefined for one seed (precision of no pseudo labels) and so for the mean
        return "–"
    return f"{values.mean():.{digits}f}" + (f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else "")
