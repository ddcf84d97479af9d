"""`ccssl-hf predict`: labels of images, as a parquet file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import errors_in_one_line
from .options import BatchSize, Device, ImageColumn, ImageRoot, Model, NumWorkers


def predict(
    model: Model,
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Image folder, image, glob, csv, parquet or Hub dataset.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The parquet file to write.")],
    embedding: Annotated[bool, typer.Option("--embedding", help="Also write embeddings.")] = False,
    batch_size: BatchSize = None,
    num_workers: NumWorkers = None,
    device: Device = None,
    image_column: ImageColumn = "image",
    image_root: ImageRoot = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first image that cannot be read.")] = False,
) -> None:
    """Predict labels, confidences and embeddings of images, and write a parquet file with one row per image."""
    with errors_in_one_line():
        from ..deploy.predict import Classifier, check_output, open_images, predict_to_parquet

        images = open_images(source, image_column=image_column, image_root=image_root)
        check_output(out, source)
        classifier = Classifier.from_pretrained(model, device=device)
        settings: dict[str, Any] = dict(batch_size=batch_size, num_workers=num_workers, image_column=image_column)
        done = predict_to_parquet(classifier, images, out, embedding=embedding, strict=strict, **settings)
    unreadable = f" ({done.unreadable} could not be read, see column error)" if done.unreadable else ""
    typer.echo(f"{done.images:,} images{unreadable} at {done.images / done.seconds:,.1f} a second, written to {out}.")
