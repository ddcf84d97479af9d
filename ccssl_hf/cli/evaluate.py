"""`ccssl-hf evaluate`: metrics of a published model on labeled images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import errors_in_one_line
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


def evaluate(
    model: Model,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help=f"Labeled images: {LABELED_SOURCE}.")],
    split: Annotated[
        str | None,
        typer.Option(
            help="Name of the split in the results, and the split to load from a Hub dataset; default: the name of the "
            "folder or parquet file, and test on the Hub."
        ),
    ] = None,
    json_out: Annotated[
        Path | None, typer.Option("--json", metavar="OUT", help="Also write the metrics to this file.")
    ] = None,
    batch_size: BatchSize = None,
    num_workers: NumWorkers = None,
    device: Device = None,
    image_column: ImageColumn = "image",
    label_column: LabelColumn = "label",
    image_root: ImageRoot = None,
) -> None:
    """Measure top-1, top-5, macro F1 and calibration error, and AUROC if there are out-of-distribution (OOD) images.

    Labels are matched by name. Images of other classes than the model's, and with label -1, are OOD. The metrics are
    the same as those of trainer.evaluate().
    """
    with errors_in_one_line():
        from ..card.report import provenance_of, results_table
        from ..data.survey import Survey, ood_sentence
        from ..deploy.evaluate import evaluate as measure
        from ..deploy.evaluate import load_labeled, look_at, split_name
        from ..deploy.predict import Classifier
        from ..output_folder import check_writable

        if json_out is not None:
            if json_out.is_dir():
                raise ValueError(f"--json {json_out} is a folder: name a file.")
            check_writable(json_out.parent)
        split = split or split_name(source)
        dataset = load_labeled(source, split, image_root)
        classifier = Classifier.from_pretrained(model, device=device, fold=False)
        columns: dict[str, Any] = dict(image_column=image_column, label_column=label_column)
        reading = dict(batch_size=batch_size, num_workers=num_workers, **columns)
        held = look_at(dataset, split, classifier.labels, **columns)
        typer.echo(f"{model} on {source}\n\n{Survey({split: held}).table()}\n")
        if held.ood:
            typer.echo(f"{ood_sentence(held.ood, split)}\n")
        results, predictions = measure(classifier, dataset, split, provenance=provenance_of(model), **reading)
    images, ood = len(predictions.labels), int((~predictions.in_distribution).sum())
    typer.echo(results_table(results, width=terminal_width()))
    if json_out is not None:
        weights = str(predictions.provenance or "published")
        facts = dict(
            model=model, source=source, split=split, weights=weights, images=images, unknown=ood, ood_images=held.ood
        )
        json_out.write_text(json.dumps(facts | {each.metric: each.value for each in results}, indent=2) + "\n")
        typer.echo(f"\nWritten to {json_out}.")
