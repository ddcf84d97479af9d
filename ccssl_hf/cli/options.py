"""Arguments and options that several commands share."""

from __future__ import annotations

import shutil
from typing import Annotated

import typer

LABELED_SOURCE = "a folder of class folders, a csv or jsonl file, parquet files or a Hub dataset"

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A published folder or Hub id.")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Images per forward pass; default: 16 on a CPU, else 64.")]
NumWorkers = Annotated[int | None, typer.Option(min=1, help="Threads; default: one per core, at most 8.")]
Device = Annotated[str | None, typer.Option(help="A device such as cuda:0; default: an accelerator, else the CPU.")]
ImageColumn = Annotated[str, typer.Option(help="The image column of parquet files and datasets.")]
LabelColumn = Annotated[str, typer.Option(help="The label column of parquet files and datasets.")]
ImageRoot = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER", help="Folder in which csv, jsonl and parquet files may name images, next to theirs."
    ),
]


def terminal_width() -> int:
    """Columns of the terminal; 0 where the output goes to a file or another program."""
    return shutil.get_terminal_size((0, 0)).columns
