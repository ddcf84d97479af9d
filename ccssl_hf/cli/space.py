"""`ccssl-hf space`: a Gradio Space from a model."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from ..errors import errors_in_one_line

_SOURCE = "a folder of class folders, parquet files or a Hub data set"


def space(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A published folder, which is copied, or a Hub id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; an earlier Space is replaced.")],
    labeled: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE", help=f"Labeled images to show the nearest of: {_SOURCE}. Small copies are stored in OUT."
        ),
    ] = None,
    validation: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Labeled images to measure on when an image may be of no class. Those of other classes say how many "
            "strangers are found. A few are stored in OUT as examples.",
        ),
    ] = None,
    title: Annotated[str | None, typer.Option(help="Of the page; default: the model's name.")] = None,
    image_column: Annotated[str, typer.Option(help="Of parquet files and data sets.")] = "image",
    label_column: Annotated[str, typer.Option(help="Likewise.")] = "label",
) -> None:
    """A page to try the model on: drop an image, see its classes, a heat map, and the nearest labeled images."""
    with errors_in_one_line():
        from ..deploy.space import write_space

        columns = dict(image_column=image_column, label_column=label_column)
        write_space(model, out, labeled=labeled, validation=validation, title=title, **columns)
    folder = shlex.quote(str(out))
    stored = " It holds copies of your images: publish what you may." if labeled or validation else ""
    typer.echo(
        f"A Space is in {out}.{stored}\n"
        f"Try it:      pip install -r {folder}/requirements.txt && python {folder}/app.py\n"
        f"Publish it:  hf upload USER/NAME {folder} . --repo-type space"
    )
