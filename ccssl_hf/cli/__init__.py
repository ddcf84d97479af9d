"""The `ccssl-hf` command. Its verbs import torch and transformers only when they run."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from .check import DATA_FLAGS, check
from .convert import convert
from .evaluate import evaluate
from .export import export
from .predict import predict
from .push import push
from .report import report
from .serve import serve
from .space import space
from .train import ANY_FLAG, train

app = typer.Typer(
    name="ccssl-hf", no_args_is_help=True, help="Semi-supervised image classification for the Hugging Face ecosystem."
)
RUNS, PUBLISHING = "Train and evaluate", "Publish and serve"

app.command(rich_help_panel=RUNS, **DATA_FLAGS)(check)
app.command(rich_help_panel=RUNS, **ANY_FLAG)(train)
app.command(rich_help_panel=RUNS)(evaluate)
app.command(rich_help_panel=RUNS)(predict)
app.command(rich_help_panel=RUNS)(report)
app.command(rich_help_panel=PUBLISHING)(push)
app.command(rich_help_panel=PUBLISHING)(serve)
app.command(rich_help_panel=PUBLISHING)(space)
app.add_typer(export, name="export", rich_help_panel=PUBLISHING)
app.command(rich_help_panel=PUBLISHING)(convert)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ccssl-hf {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass
