"""`ccssl-hf predict`: labels of a folder of images, as parquet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import errors_in_one_line


def predict(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A published folder or Hub id.")],
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="A folder of images, an image, a glob, parquet files or a Hub data set."),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The parquet file to write.")],
    embedding: Annotated[bool, typer.Option("--embedding", help="Write embeddings, too.")] = False,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Default: 16 on a CPU, 64 on an accelerator.")] = None,
    num_workers: Annotated[
        int | None, typer.Option(min=1, help="Threads that decode and predict; default: one a core, at most 8.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Such as cuda:0; default: an accelerator, or the CPU.")] = None,
    image_column: Annotated[str, typer.Option(help="Of parquet files and data sets.")] = "image",
    strict: Annotated[bool, typer.Option("--strict", help="Stop at an image that can't be read.")] = False,
) -> None:
    """Labels, confidences and embeddings of images, as a parquet file with a row for each."""
    with errors_in_one_line():
        from ..inference import Classifier, check_output, open_images, predict_to_parquet

        images = open_images(source, image_column=image_column)
        check_output(out, source)
        classifier = Classifier.from_pretrained(model, device=device)
        settings: dict[str, Any] = dict(batch_size=batch_size, num_workers=num_workers, image_column=image_column)
        done = predict_to_parquet(classifier, images, out, embedding=embedding, strict=strict, **settings)
    unreadable = f" ({done.unreadable} could not be read, see column error)" if done.unreadable else ""
    typer.echo(f"{done.images:,} images{unreadable} at {done.images / done.seconds:,.1f} a second, written to {out}.")
