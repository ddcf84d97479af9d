"""Writes rows of predictions to a Parquet, CSV or JSON Lines file, which replaces an earlier one at the end."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from ..output_folder import check_writable

FORMATS = (".parquet", ".csv", ".jsonl")


def partial_file(out: str | Path) -> Path:
    """The file of the rows of an unfinished run, in the folder of `out`."""
    return Path(out).with_name(f"_{Path(out).name}.partial")


def check_output(out: str | Path, source: Any) -> Path:
    """The path of the file to write. Raises ValueError if its format is unknown, or it is a folder or the source."""
    out = Path(out)
    if out.is_dir():
        raise ValueError(f"{out} is a folder: name the file to write, such as {out / 'predictions.parquet'}.")
    if out.suffix.lower() not in FORMATS:
        raise ValueError(f"{out} has none of the suffixes {', '.join(FORMATS)}: name such a file for the predictions.")
    if isinstance(source, (str, Path)) and out.resolve() == Path(source).resolve():
        raise ValueError(f"{out} is also the source: write the predictions to another file.")
    check_writable(out.parent)
    return out


@contextmanager
def rows_to(out: Path, schema: pa.Schema, labels: Sequence[str]) -> Iterator[Callable[[list[dict[str, Any]]], None]]:
    """A function that appends rows to a new file, in the format of its suffix. Without an error it becomes `out`."""
    file, kind = partial_file(out), out.suffix.lower()
    if kind == ".parquet":
        with pq.ParquetWriter(file, schema) as parquet:
            yield lambda rows: parquet.write_table(pa.Table.from_pylist(rows, schema))
    elif kind == ".csv":
        columns = {"probabilities": [(f"probability_{label}", pa.float32()) for label in labels]}
        columns |= {"embedding": [("embedding", pa.string())]}
        flat = pa.schema(chain.from_iterable(columns.get(each.name, [each]) for each in schema))
        with pa.csv.CSVWriter(file, flat) as csv:
            yield lambda rows: csv.write_table(pa.Table.from_pylist([_csv_row(row, labels) for row in rows], flat))
    else:
        with file.open("w", encoding="utf-8", newline="\n") as lines:

            def write(rows: list[dict[str, Any]]) -> None:
                for row in rows:
                    values = {name: row.get(name) for name in schema.names}
                    if (every := values.get("probabilities")) is not None:
                        values["probabilities"] = dict(zip(labels, every.tolist(), strict=True))
                    lines.write(json.dumps(values, ensure_ascii=False, default=np.ndarray.tolist) + "\n")

            yield write
    os.replace(file, out)


def _csv_row(row: dict[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    """A row with a column for each class, and the embedding as JSON text."""
    every = zip(labels, row.pop("probabilities", np.empty(0)).tolist())  # noqa: B905
    row |= {f"probability_{label}": value for label, value in every}
    if "embedding" in row:
        row["embedding"] = f"[{', '.join(f'{x:.9g}' for x in row['embedding'])}]"
    return row
