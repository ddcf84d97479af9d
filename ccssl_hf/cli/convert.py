"""`ccssl-hf convert`: checkpoints of other code become plain folders."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import errors_in_one_line

app = typer.Typer(no_args_is_help=True, help="Turn a checkpoint of other code into a plain folder.")


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
        from ..deploy import convert as functions

        report = getattr(functions, f"convert_{source}")(checkpoint, out, labels=_names(labels), **options)
    typer.echo(report)


@app.command()
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


@app.command()
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


@app.command()
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
