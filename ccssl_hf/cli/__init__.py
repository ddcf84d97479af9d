"""`ccssl-hf`: the package on the command line. One file a verb, and each imports for itself what takes long."""

from __future__ import annotations

import typer

from . import convert
from .predict import predict

app = typer.Typer(
    name="ccssl-hf", no_args_is_help=True, help="Semi-supervised image classification for the Hugging Face ecosystem."
)
app.add_typer(convert.app, name="convert")
app.command()(predict)
