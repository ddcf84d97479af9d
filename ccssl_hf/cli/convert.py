"""`ccssl-hf convert`: convert checkpoints of other code to published folders."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..errors import errors_in_one_line


class Source(str, Enum):
    """The code that wrote the checkpoint."""

    semicls = "semicls"
    moco = "moco"
    usb = "usb"


class Weights(str, Enum):
    """Averaged or raw weights."""

    ema = "ema"
    raw = "raw"


def convert(
    source: Annotated[
        Source,
        typer.Argument(
            metavar="SOURCE", help="`semicls` (the CCSSL authors' code), `moco` (v2) or `usb` (also TorchSSL)."
        ),
    ],
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="The checkpoint file.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    labels: Annotated[
        str,
        typer.Option(help="Class names in the order of the label numbers: `a,b,c`, or a text file with one per line."),
    ],
    backbone: Annotated[
        str, typer.Option(help="timm name of the backbone, such as wide_resnet28_2_cifar or resnet50.")
    ] = "resnet50",
    weights: Annotated[Weights, typer.Option(help="Averaged (ema) or raw weights; MoCo has one set.")] = Weights.ema,
    image_size: Annotated[int | None, typer.Option(help="Side of the input in pixels; default: the source's.")] = None,
    mean: Annotated[
        tuple[float, float, float] | None,
        typer.Option(help="Mean per channel for normalization; default: the source's."),
    ] = None,
    std: Annotated[
        tuple[float, float, float] | None,
        typer.Option(help="Standard deviation per channel for normalization; default: the source's."),
    ] = None,
    with_head: Annotated[bool, typer.Option(help="Keep SemiCLS's projection head, to continue training.")] = True,
    allow_unknown: Annotated[bool, typer.Option(help="Leave out unknown keys and list them.")] = False,
) -> None:
    """Convert a checkpoint of other code to a published folder."""
    arguments = locals()
    with errors_in_one_line():
        from ..deploy.convert import convert as convert_checkpoint

        path = Path(labels)
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else labels.split(",")
        arguments |= dict(source=source.value, labels=[line.strip() for line in lines if line.strip()])
        report = convert_checkpoint(**arguments)
    typer.echo(report)
