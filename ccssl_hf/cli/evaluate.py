"""`ccssl-hf evaluate`: how good a published model is on labeled images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import errors_in_one_line
from .options import BatchSize, Device, ImageColumn, LabelColumn, Model, NumWorkers


def evaluate(
    model: Model,
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="Labeled images: a folder of class folders, parquet or a Hub data set."),
    ],
    split: Annotated[str, typer.Option(help="What the split is called; of a Hub data set, which it is.")] = "test",
    json_out: Annotated[
        Path | None, typer.Option("--json", metavar="OUT", help="Write the numbers there, too.")
    ] = None,
    batch_size: BatchSize = None,
    num_workers: NumWorkers = None,
    device: Device = None,
    image_column: ImageColumn = "image",
    label_column: LabelColumn = "label",
) -> None:
    """Top-1, top-5, macro F1 and calibration error, and AUROC where images are of no known class.

    Labels are matched by name. Those that are no class of the model, and -1, are images of no known class. The numbers
    are those of trainer.evaluate().
    """
    with errors_in_one_line():
        import json

        from ..card.report import provenance_of, results_table
        from ..deploy.evaluate import evaluate as measure
        from ..deploy.evaluate import load_labeled, unknown_names
        from ..deploy.predict import Classifier

        dataset = load_labeled(source, split)
        classifier = Classifier.from_pretrained(model, device=device, fold=False)
        results, predictions = measure(
            classifier,
            dataset,
            split,
            provenance=provenance_of(model),
            image_column=image_column,
            label_column=label_column,
            batch_size=batch_size,
            num_workers=num_workers,
        )
    images, unknown = len(predictions.labels), int((~predictions.in_distribution).sum())
    named = unknown_names(dataset, label_column, classifier.labels)
    names = f" ({', '.join([*named[:10], *(['...'] if len(named) > 10 else [])])})" if named else ""
    strangers = f", {unknown:,} of them of no known class{names}" if unknown else ""
    typer.echo(f"{model} on {source}: {images:,} images{strangers}\n\n{results_table(results)}")
    if json_out is not None:
        numbers = {result.metric: result.value for result in results}
        facts = {
            "model": model,
            "source": source,
            "split": split,
            "weights": str(predictions.provenance or "published"),
        }
        json_out.parent.mkdir(parents=True, exist_ok=True)
        json_out.write_text(json.dumps({**facts, "images": images, "unknown": unknown, **numbers}, indent=2) + "\n")
        typer.echo(f"\nWritten to {json_out}.")
