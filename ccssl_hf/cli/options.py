"""Arguments that several verbs take."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A published folder or Hub id.")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Default: 16 on a CPU, 64 on an accelerator.")]
NumWorkers = Annotated[
    int | None, typer.Option(min=1, help="Threads that decode and predict; default: one a core, at most 8.")
]
Device = Annotated[str | None, typer.Option(help="Such as cuda:0; default: an accelerator, or the CPU.")]
ImageColumn = Annotated[str, typer.Option(help="Of parquet files and data sets.")]
LabelColumn = Annotated[str, typer.Option(help="Likewise.")]
