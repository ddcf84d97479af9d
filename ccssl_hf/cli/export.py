"""`ccssl-hf export`: other forms of a published model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from ..errors import errors_in_one_line, extra
from .options import Model

app = typer.Typer(no_args_is_help=True, help="Write a published model in another form.")


@app.command()
def onnx(
    model: Model,
    out: Annotated[
        Path | None, typer.Option(help="The folder to write; default: the model's name with -ONNX, beside the folder.")
    ] = None,
    opset: Annotated[int, typer.Option(min=18, help="Version of ONNX's operators.")] = 18,
) -> None:
    """ONNX for transformers.js and onnxruntime, checked against PyTorch before it gets its name."""
    with errors_in_one_line():
        with extra("export"):
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401

        from ..deploy.export import export_onnx
        from ..modeling import CCSSLForImageClassification

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*has no projection head")  # of no use here
            loaded = CCSSLForImageClassification.from_pretrained(model)
        folder = Path(model)
        beside = folder.resolve().parent if folder.is_dir() else Path()
        written = export_onnx(loaded, out or beside / f"{folder.resolve().name}-ONNX", opset=opset)
    typer.echo(
        f"{written.file}: logits of {written.images} images are PyTorch's within {written.difference:.1e}, and the "
        "classes are the same."
    )


@app.command()
def handler(
    model: Model,
    out: Annotated[Path | None, typer.Option(help="The folder to write to; default: MODEL, if it is a folder.")] = None,
) -> None:
    """handler.py for Hugging Face's Inference Endpoints, written into the folder."""
    with errors_in_one_line():
        from ..checkpoint import find_checkpoint
        from ..deploy.export import write_handler

        if out is None and not Path(model).is_dir():
            raise ValueError(f"{model} is no folder here: name one to write to with --out, then upload its files.")
        written = write_handler(find_checkpoint(model), out)
    typer.echo(f"Written to {out or model}: {', '.join(path.name for path in written)}.")
