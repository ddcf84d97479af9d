"""`ccssl-hf convert`: convert checkpoints of other code to published folders."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import errors_in_one_line

app = typer.Typer(no_args_is_help=True, help="Convert a checkpoint of other code to a published folder.")


class Weights(str, Enum):
    """Averaged or raw weights."""

    ema = "ema"
    raw = "raw"


Checkpoint = Annotated[Path, typer.Argument(metavar="CKPT", help="The checkpoint file.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")]
Labels = Annotated[
    str, typer.Option(help="Class names in the order of the label numbers: `a,b,c`, or a text file with one per line.")
]
Backbone = Annotated[str, typer.Option(help="timm name of the backbone, such as wide_resnet28_2_cifar or resnet50.")]
WhichWeights = Annotated[Weights, typer.Option(help="Averaged (ema) or raw weights.")]
ImageSize = Annotated[int | None, typer.Option(help="Side of the input in pixels; default: the source's own.")]
Mean = Annotated[
    tuple[float, float, float] | None,
    typer.Option(help="Mean per channel for normalisation; default: the source's own."),
]
Std = Annotated[
    tuple[float, float, float] | None,
    typer.Option(help="Standard deviation per channel for normalisation; default: the source's own."),
]
AllowUnknown = Annotated[bool, typer.Option(help="Leave out unknown keys and list them.")]


def _convert(source: str, *, labels: str, **arguments: Any) -> None:
    with errors_in_one_line():
        from ..deploy import convert as functions

        path = Path(labels)
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else labels.split(",")
        names = [name.strip() for name in lines if name.strip()]
        report = getattr(functions, f"convert_{source}")(labels=names, **arguments)
    typer.echo(report)


# The parameters of a command are those of its function: locals() has them all.


@app.command()
def semicls(
    checkpoint: Checkpoint,
    out: Out,
    labels: Labels,
    backbone: Backbone,
    weights: WhichWeights = Weights.ema,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    with_head: Annotated[bool, typer.Option(help="Keep the projection head, to continue training.")] = True,
    allow_unknown: AllowUnknown = False,
) -> None:
    """Convert a `.pth.tar` of the CCSSL authors' code."""
    _convert("semicls", **locals())


@app.command()
def moco(
    checkpoint: Checkpoint,
    out: Out,
    labels: Labels,
    backbone: Backbone = "resnet50",
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    allow_unknown: AllowUnknown = False,
) -> None:
    """Convert the query encoder of a MoCo v2 checkpoint, with a new classifier, to start training from."""
    _convert("moco", **locals())


@app.command()
def usb(
    checkpoint: Checkpoint,
    out: Out,
    labels: Labels,
    backbone: Backbone,
    weights: WhichWeights = Weights.ema,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    allow_unknown: AllowUnknown = False,
) -> None:
    """Convert a Wide ResNet of USB or TorchSSL."""
    _convert("usb", **locals())
