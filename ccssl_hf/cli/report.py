"""`ccssl-hf report`: what a model is, and a card that says how good it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..errors import errors_in_one_line
from .options import BatchSize, Device, ImageColumn, LabelColumn, Model, NumWorkers


def report(
    model: Model,
    out: Annotated[
        Path | None, typer.Argument(metavar="[OUT]", help="The folder of the card; default: MODEL, if it is a folder.")
    ] = None,
    split: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=SOURCE", help="Labeled images to measure on, as of evaluate; can be repeated."),
    ] = None,
    embeddings: Annotated[
        bool,
        typer.Option("--embeddings", help="Draw embeddings by t-SNE, of 1,000 images at most: some seconds."),
    ] = False,
    batch_size: BatchSize = None,
    num_workers: NumWorkers = None,
    device: Device = None,
    image_column: ImageColumn = "image",
    label_column: LabelColumn = "label",
) -> None:
    """Say what a model is, or, with --split, measure it and bring its card up to date.

    Without --split: what the folder and its card say of classes, results and training. With it: results and pictures go
    into README.md and images/. Numbers of other splits stay, and so does all text outside the two comments that enclose
    the results; a card without these gets them at its end.
    """
    with errors_in_one_line():
        from ..card.report import describe, provenance_of, results_table, write_report
        from ..deploy.evaluate import evaluate, load_labeled
        from ..deploy.predict import Classifier

        if not split:
            if out is not None or embeddings:
                raise ValueError("Nothing to measure on: name at least one --split NAME=SOURCE.")
            typer.echo(describe(model))
            return
        sources = dict(_name_and_source(each) for each in split)
        if out is None and not Path(model).is_dir():
            raise ValueError(f"{model} is on the Hub: name the folder to write its card to.")
        datasets = {name: load_labeled(source, name) for name, source in sources.items()}
        classifier = Classifier.from_pretrained(model, device=device, fold=False)
        provenance = provenance_of(model)
        results, predictions = [], []
        for name, dataset in datasets.items():
            measured, said = evaluate(
                classifier,
                dataset,
                name,
                provenance=provenance,
                image_column=image_column,
                label_column=label_column,
                batch_size=batch_size,
                num_workers=num_workers,
            )
            results += measured
            predictions.append(said if embeddings else replace(said, embeddings=None))
        folder = out or Path(model)
        written = write_report(model, folder, results, predictions, sources)
    typer.echo(f"{results_table(results)}\n\nWritten to {folder}: {', '.join(written)}.")


def _name_and_source(text: str) -> tuple[str, str]:
    name, equals, source = text.partition("=")
    if not (name and equals and source):
        raise ValueError(f"--split {text}: write NAME=SOURCE, such as test=photos/test.")
    return name, source
