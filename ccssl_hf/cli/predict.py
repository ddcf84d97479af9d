"""`ccssl-hf predict`: labels of images, as a Parquet, CSV or JSON Lines file."""

from __future__ import annotations

import signal
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
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write: .parquet, .csv or .jsonl.")],
    top_k: Annotated[int, typer.Option(min=1, help="Number of classes to write.")] = 1,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Also write the probability of every class.")
    ] = False,
    embedding: Annotated[bool, typer.Option("--embedding", help="Also write embeddings.")] = False,
    batch_size: BatchSize = None,
    num_workers: NumWorkers = None,
    device: Device = None,
    image_column: ImageColumn = "image",
    image_root: ImageRoot = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first image that cannot be read.")] = False,
) -> None:
    """Predict labels, confidences and embeddings of images, and write a file with one row per image.

    Columns: path, label, confidence and error; label_2, confidence_2 and so on with --top_k. With --probabilities, a
    CSV file has a column probability_CLASS for each class. An interrupted run leaves its rows in _OUT.partial.
    pandas takes a class named NA or null in a CSV file for a missing value: read it with keep_default_na=False.
    """
    with errors_in_one_line():
        from ..deploy.predict import Classifier, open_images, predict_to_file
        from ..deploy.rows import check_output, partial_file

        check_output(out, source)
        images = open_images(source, image_column=image_column, image_root=image_root)
        classifier = Classifier.from_pretrained(model, device=device)
        settings: dict[str, Any] = dict(
            top_k=top_k, probabilities=probabilities, embedding=embedding, strict=strict, image_column=image_column
        )

        def end(number: int, frame: object) -> None:
            raise SystemExit(128 + number)

        signal.signal(signal.SIGTERM, end)
        try:
            done = predict_to_file(classifier, images, out, batch_size=batch_size, num_workers=num_workers, **settings)
        except (KeyboardInterrupt, SystemExit) as stop:
            typer.echo(f"Interrupted: the rows of the first images are in {partial_file(out)}.", err=True)
            raise typer.Exit(130 if isinstance(stop, KeyboardInterrupt) else 128 + signal.SIGTERM) from None
    unreadable = f" ({done.unreadable} could not be read, see column error)" if done.unreadable else ""
    typer.echo(f"{done.images:,} images{unreadable} at {done.images / done.seconds:,.1f} a second, written to {out}.")
