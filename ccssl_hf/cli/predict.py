"""`ccssl-hf predict`: labels of a folder of images, as parquet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import errors_in_one_line
from .options import BatchSize, Device, ImageColumn, Model, NumWorkers


def predict(
    model: Model,
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="A folder of images, an image, a glob, parquet files or a Hub data set."),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The parquet file to write.")],
    embedding: Annotated[bool, typer.Option("--embedding", help="Write embeddings, too.")] = False,
    batch_size: BatchSize = None,
    num_workers: NumWorkers = None,
    device: Device = None,
    image_column: ImageColumn = "image",
    strict: Annotated[bool, typer.Option("--strict", help="Stop at an image that can't be read.")] = False,
) -> None:
    """Labels, confidences and embeddings of images, as a parquet file with a row for each."""
    with errors_in_one_line():
        from ..deploy.predict import Classifier, check_output, open_images, predict_to_parquet

        images = open_images(source, image_column=image_column)
        check_output(out, source)
        classifier = Classifier.from_pretrained(model, device=device)
        settings: dict[str, Any] = dict(batch_size=batch_size, num_workers=num_workers, image_column=image_column)
        done = predict_to_parquet(classifier, images, out, embedding=embedding, strict=strict, **settings)
    unreadable = f" ({done.unreadable} could not be read, see column error)" if done.unreadable else ""
    typer.echo(f"{done.images:,} images{unreadable} at {done.images / done.seconds:,.1f} a second, written to {out}.")
