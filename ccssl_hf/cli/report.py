"""`ccssl-hf report`: describe a published model, or measure it and renew its card."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import errors_in_one_line
from ..escape import printable
from .options import (
    LABELED_SOURCE,
    BatchSize,
    Device,
    ImageColumn,
    ImageRoot,
    LabelColumn,
    Model,
    NumWorkers,
    terminal_width,
)


def report(
    model: Model,
    out: Annotated[
        Path | None, typer.Argument(metavar="[OUT]", help="Folder of the card. Default: MODEL, if it is a folder.")
    ] = None,
    split: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]SOURCE",
            help=f"Labeled images to measure on: {LABELED_SOURCE}. NAME is the folder's by default. Can be repeated.",
        ),
    ] = None,
    embeddings: Annotated[
        bool,
        typer.Option("--embeddings", help="Draw the embeddings of up to 1,000 images by t-SNE, which takes seconds."),
    ] = False,
    batch_size: BatchSize = None,
    num_workers: NumWorkers = None,
    device: Device = None,
    image_column: ImageColumn = "image",
    label_column: LabelColumn = "label",
    image_root: ImageRoot = None,
) -> None:
    """Describe a published model, or, with --split, measure it and renew its card.

    Without --split, print the backbone, classes, results and training settings of the model and its card. With --split,
    write results and pictures to README.md and images/. Results of other splits stay, and so does all text outside of
    the two comments that enclose the results. A card without these comments gets them at its end.
    """
    with errors_in_one_line():
        from ..card.report import describe, provenance_of, results_table, write_report
        from ..data.survey import Survey, ood_sentence
        from ..deploy.evaluate import evaluate, load_labeled, look_at, split_name
        from ..deploy.predict import Classifier

        if not split:
            if out is not None or embeddings:
                raise ValueError("There is no split to measure on: add at least one --split SOURCE.")
            typer.echo(printable(describe(model, width=terminal_width()), lines=True))
            return
        sources: dict[str, str] = {}
        for each in split:
            name, _, source = each.rpartition("=") if not Path(each).exists() else ("", "", each)
            name = name or split_name(source)
            if not source or name in sources:
                what = f"two splits are named {name}" if source else "it has no SOURCE"
                raise ValueError(f"--split {each}: {what}; use NAME=SOURCE, such as test=photos/test.")
            sources[name] = source
        if out is None and not Path(model).is_dir():
            raise ValueError(f"{model} is on the Hub: name the folder to write its card to.")
        datasets = {name: load_labeled(source, name, image_root) for name, source in sources.items()}
        classifier = Classifier.from_pretrained(model, device=device, fold=False)
        columns: dict[str, Any] = dict(image_column=image_column, label_column=label_column)
        reading = dict(batch_size=batch_size, num_workers=num_workers, **columns)
        held = {name: look_at(each, name, classifier.labels, **columns) for name, each in datasets.items()}
        said = [ood_sentence(each.ood, name) for name, each in held.items() if each.ood]
        typer.echo("\n".join([f"{Survey(held).table()}\n", *said, ""]))
        results, predictions, provenance = [], [], provenance_of(model)
        for name, dataset in datasets.items():
            measured, outputs = evaluate(classifier, dataset, name, provenance=provenance, **reading)
            results += measured
            predictions.append(outputs if embeddings else replace(outputs, embeddings=None))
        folder = out or Path(model)
        facts = {name: each.facts() for name, each in held.items()}
        written = write_report(model, folder, results, predictions, sources, facts)
    typer.echo(f"{results_table(results, width=terminal_width())}\n\nWritten to {folder}: {', '.join(written)}.")
