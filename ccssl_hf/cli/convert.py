"""`ccssl-hf convert`: checkpoints of other code as published folders."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..errors import errors_in_one_line


class Source(str, Enum):
    semicls = "semicls"
    moco = "moco"
    usb = "usb"


class Weights(str, Enum):
    ema = "ema"
    raw = "raw"


Channels = tuple[float, float, float]


def convert(
    source: Annotated[
        Source,
        typer.Argument(metavar="SOURCE", help="`semicls` (the CCSSL authors'), `moco` (v2) or `usb` (and TorchSSL)."),
    ],
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="The checkpoint file.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    labels: Annotated[
        str,
        typer.Option(help="Class names in the order of the label numbers: `a,b,c`, or a text file with one per line."),
    ],
    backbone: Annotated[
        str | None, typer.Option(help="timm name, such as wide_resnet28_2_cifar; default: resnet50 for MoCo.")
    ] = None,
    weights: Annotated[
        Weights | None, typer.Option(help="Averaged or raw weights; default: ema. MoCo has one set.")
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="Side of the input in pixels; default: the source's.")] = None,
    mean: Annotated[Channels | None, typer.Option(help="Mean per channel; default: the source's.")] = None,
    std: Annotated[Channels | None, typer.Option(help="Standard deviation per channel; default: the source's.")] = None,
    with_head: Annotated[
        bool | None, typer.Option(help="Keep the projection head of SemiCLS, to continue training; default: keep it.")
    ] = None,
    allow_unknown: Annotated[bool, typer.Option(help="Leave out unknown keys and list them.")] = False,
) -> None:
    """Convert a checkpoint of other code to a published folder."""
    arguments = locals()
    with errors_in_one_line():
        from ..deploy.convert import convert as convert_checkpoint

        file = Path(labels)
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else labels.split(",")
        arguments |= dict(source=source.value, weights=weights and weights.value)
        arguments["labels"] = [line.strip() for line in lines if line.strip()]
        report = convert_checkpoint(**arguments)
    typer.echo(report)
