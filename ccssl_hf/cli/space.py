"""`ccssl-hf space`: a Gradio Space for a model."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import errors_in_one_line
from .options import LABELED_SOURCE, ImageColumn, ImageRoot, LabelColumn


def space(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A published folder, which is copied, or a Hub id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; an earlier Space is replaced.")],
    labeled: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help=f"Images to show the nearest of, copied to OUT: {LABELED_SOURCE}."),
    ] = None,
    validation: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Labeled images to measure the thresholds for out-of-distribution (OOD) images on. Images of other "
            "classes than the model's are OOD: the page says how many it detects. A few are stored in OUT as examples.",
        ),
    ] = None,
    title: Annotated[str | None, typer.Option(help="The page's title; default: the model's name.")] = None,
    image_column: ImageColumn = "image",
    label_column: LabelColumn = "label",
    image_root: ImageRoot = None,
) -> None:
    """Write a web page to try the model: drop an image, see its classes, a heat map and the nearest labeled images."""
    with errors_in_one_line():
        from ..deploy.space import write_space

        columns: dict[str, Any] = dict(image_column=image_column, label_column=label_column, image_root=image_root)
        write_space(model, out, labeled=labeled, validation=validation, title=title, **columns)
    folder = shlex.quote(str(out))
    stored = " It has copies of your images: publish it only if you may publish them." if labeled or validation else ""
    typer.echo(
        f"A Space is in {out}.{stored}\n"
        f"Try it:      pip install -r {folder}/requirements.txt && python {folder}/app.py\n"
        f"Publish it:  hf upload USER/NAME {folder} . --repo-type space"
    )
