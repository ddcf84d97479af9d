"""`ccssl-hf export`: a model as ONNX, or with a handler."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import errors_in_one_line, extra
from .options import Model

export = typer.Typer(no_args_is_help=True, help="Export a published model.")


@export.command()
def onnx(
    model: Model,
    out: Annotated[Path | None, typer.Option(help="The folder to write; default: MODEL-ONNX, next to MODEL.")] = None,
    opset: Annotated[int, typer.Option(min=18, help="Version of the ONNX operators.")] = 18,
) -> None:
    """Export to ONNX for transformers.js and onnxruntime. The file is compared with PyTorch."""
    with errors_in_one_line():
        with extra("export"):
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401

        from ..deploy.export import BATCH_SIZES, export_onnx
        from ..deploy.predict import load_published

        name = f"{Path(model).resolve().name}-ONNX"
        out = out or (Path(model).resolve().with_name(name) if Path(model).is_dir() else Path(name))
        difference = export_onnx(load_published(model), out, opset=opset)
    typer.echo(
        f"{out / 'onnx' / 'model.onnx'}: logits of {sum(BATCH_SIZES)} images are PyTorch's within {difference:.1e}, "
        "and the classes are the same."
    )


@export.command()
def handler(
    model: Model,
    out: Annotated[Path | None, typer.Option(help="The folder to write to; default: MODEL, if it is a folder.")] = None,
) -> None:
    """Write handler.py for Hugging Face Inference Endpoints into the model's folder."""
    with errors_in_one_line():
        from ..checkpoint import find_checkpoint
        from ..deploy.export import write_handler

        if out is None and not Path(model).is_dir():
            raise ValueError(f"{model} is not a local folder: name one to write to with --out, then upload its files.")
        written = write_handler(find_checkpoint(model), out)
    typer.echo(f"Written to {out or model}: {', '.join(path.name for path in written)}.")
