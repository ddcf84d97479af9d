"""`ccssl-hf`: the package on the command line."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import errors_in_one_line

app = typer.Typer(
    name="ccssl-hf", no_args_is_help=True, help="Semi-supervised image classification for the Hugging Face ecosystem."
)
convert = typer.Typer(no_args_is_help=True, help="Turn a checkpoint of other code into a plain folder.")
app.add_typer(convert, name="convert")


class Weights(str, Enum):
    """Which of the two sets of weights of a checkpoint."""

    ema = "ema"
    raw = "raw"


Checkpoint = Annotated[Path, typer.Argument(metavar="CKPT", help="The file.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")]
Labels = Annotated[
    str, typer.Option(help="Class names in the order of the label numbers: `a,b,c`, or a text file with one a line.")
]
ImageSize = Annotated[int | None, typer.Option(help="Side of the images in pixels; default: the source's own.")]
Mean = Annotated[tuple[float, float, float] | None, typer.Option(help="Per channel, what images are normalised with.")]
Std = Annotated[tuple[float, float, float] | None, typer.Option(help="Likewise.")]
AllowUnknown = Annotated[bool, typer.Option(help="Leave out keys that nothing is known of; they are listed.")]
WhichWeights = Annotated[Weights, typer.Option(help="Averaged or raw weights.")]


def _names(labels: str) -> list[str]:
    path = Path(labels)
    text = path.read_text(encoding="utf-8").splitlines() if path.is_file() else labels.split(",")
    return [name.strip() for name in text if name.strip()]


def _convert(source: str, checkpoint: Path, out: Path, labels: str, **options: Any) -> None:
    with errors_in_one_line():
        from . import convert as functions

        report = getattr(functions, f"convert_{source}")(checkpoint, out, labels=_names(labels), **options)
    typer.echo(report)


@convert.command()
def semicls(
    checkpoint: Checkpoint,
    out: Out,
    labels: Labels,
    backbone: Annotated[str, typer.Option(help="timm name, such as wide_resnet28_2_cifar or resnet50.")],
    weights: WhichWeights = Weights.ema,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    with_head: Annotated[bool, typer.Option(help="Keep the projection head, for training on.")] = True,
    allow_unknown: AllowUnknown = False,
) -> None:
    """A `.pth.tar` of the CCSSL authors' code."""
    given = dict(image_size=image_size, mean=mean, std=std, with_head=with_head, allow_unknown=allow_unknown)
    _convert("semicls", checkpoint, out, labels, backbone=backbone, weights=weights.value, **given)


@convert.command()
def moco(
    checkpoint: Checkpoint,
    out: Out,
    labels: Labels,
    backbone: Annotated[str, typer.Option(help="timm name.")] = "resnet50",
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    allow_unknown: AllowUnknown = False,
) -> None:
    """The query encoder of a MoCo v2 checkpoint, with a fresh classifier to train on from."""
    given = dict(image_size=image_size, mean=mean, std=std, allow_unknown=allow_unknown)
    _convert("moco", checkpoint, out, labels, backbone=backbone, **given)


@convert.command()
def usb(
    checkpoint: Checkpoint,
    out: Out,
    labels: Labels,
    backbone: Annotated[str, typer.Option(help="timm name, such as wide_resnet28_2_cifar.")],
    weights: WhichWeights = Weights.ema,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    allow_unknown: AllowUnknown = False,
) -> None:
    """A Wide ResNet of USB or TorchSSL."""
    given = dict(image_size=image_size, mean=mean, std=std, allow_unknown=allow_unknown)
    _convert("usb", checkpoint, out, labels, backbone=backbone, weights=weights.value, **given)


@app.command()
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
        from .inference import Classifier, check_output, open_images, predict_to_parquet

        images = open_images(source, image_column=image_column)
        check_output(out, source)
        classifier = Classifier.from_pretrained(model, device=device)
        settings: dict[str, Any] = dict(batch_size=batch_size, num_workers=num_workers, image_column=image_column)
        done = predict_to_parquet(classifier, images, out, embedding=embedding, strict=strict, **settings)
    unreadable = f" ({done.unreadable} could not be read, see column error)" if done.unreadable else ""
    typer.echo(f"{done.images:,} images{unreadable} at {done.images / done.seconds:,.1f} a second, written to {out}.")
