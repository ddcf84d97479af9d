"""`ccssl-hf evaluate`: metrics of a published model on labeled images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import errors_in_one_line
from ..escape import printable
from .options import LABELED_SOURCE, BatchSize, Device, ImageColumn, LabelColumn, Model, NumWorkers


def evaluate(
    model: Model,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help=f"Labeled images: {LABELED_SOURCE}.")],
    split: Annotated[
        str, typer.Option(help="Name of the split in the results, and the split to load from a Hub dataset.")
    ] = "test",
    json_out: Annotated[
        Path | None, typer.Option("--json", metavar="OUT", help="Also write the metrics to this file.")
    ] = None,
    batch_size: BatchSize = None,
    num_workers: NumWorkers = None,
    device: Device = None,
    image_column: ImageColumn = "image",
    label_column: LabelColumn = "label",
) -> None:
    """Measure top-1, top-5, macro F1 and calibration error, and AUROC if there are out-of-distribution (OOD) images.

    Labels are matched by name. Images of other classes than the model's, and with label -1, are OOD. The metrics are
    the same as those of trainer.evaluate().
    """
    with errors_in_one_line():
        from ..card.report import provenance_of, results_table
        from ..deploy.evaluate import evaluate as measure
        from ..deploy.evaluate import load_labeled, ood_names
        from ..deploy.predict import Classifier

        dataset = load_labeled(source, split)
        classifier = Classifier.from_pretrained(model, device=device, fold=False)
        reading: dict[str, Any] = dict(
            image_column=image_column, label_column=label_column, batch_size=batch_size, num_workers=num_workers
        )
        results, predictions = measure(classifier, dataset, split, provenance=provenance_of(model), **reading)
    images, ood = len(predictions.labels), int((~predictions.in_distribution).sum())
    names = ood_names(dataset, label_column, classifier.labels)
    named = f" ({', '.join(names[:10])}{', ...' * (len(names) > 10)})" if names else ""
    note = f", {ood:,} of them out of distribution{named}" if ood else ""
    typer.echo(printable(f"{model} on {source}: {images:,} images{note}\n\n{results_table(results)}", lines=True))
    if json_out is not None:
        weights = str(predictions.provenance or "published")
        facts = dict(model=model, source=source, split=split, weights=weights, images=images, unknown=ood)
        json_out.parent.mkdir(parents=True, exist_ok=True)
        json_out.write_text(json.dumps(facts | {each.metric: each.value for each in results}, indent=2) + "\n")
        typer.echo(f"\nWritten to {json_out}.")
