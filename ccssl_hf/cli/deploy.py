"""`ccssl-hf predict`, `serve`, `export`, `space` and `convert`: what is done with a published model."""

from __future__ import annotations

import shlex
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import errors_in_one_line, extra
from .options import LABELED_SOURCE, BatchSize, Device, ImageColumn, LabelColumn, Model, NumWorkers


def predict(
    model: Model,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Image folder, image, glob, parquet or Hub dataset.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The parquet file to write.")],
    embedding: Annotated[bool, typer.Option("--embedding", help="Also write embeddings.")] = False,
    batch_size: BatchSize = None,
    num_workers: NumWorkers = None,
    device: Device = None,
    image_column: ImageColumn = "image",
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first image that cannot be read.")] = False,
) -> None:
    """Predict labels, confidences and embeddings of images, and write a parquet file with one row per image."""
    with errors_in_one_line():
        from ..deploy.predict import Classifier, check_output, open_images, predict_to_parquet

        images = open_images(source, image_column=image_column)
        check_output(out, source)
        classifier = Classifier.from_pretrained(model, device=device)
        settings: dict[str, Any] = dict(batch_size=batch_size, num_workers=num_workers, image_column=image_column)
        done = predict_to_parquet(classifier, images, out, embedding=embedding, strict=strict, **settings)
    unreadable = f" ({done.unreadable} could not be read, see column error)" if done.unreadable else ""
    typer.echo(f"{done.images:,} images{unreadable} at {done.images / done.seconds:,.1f} a second, written to {out}.")


def serve(
    model: Model,
    host: Annotated[
        str, typer.Option(help="Address to listen on. 0.0.0.0 accepts other machines, without authentication.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 chooses a free one.")] = 8000,
    max_batch_size: BatchSize = None,
    max_wait_ms: Annotated[float, typer.Option(min=0, help="Longest wait of an image for a full batch.")] = 5,
    max_image_mb: Annotated[float, typer.Option(min=0, help="Most megabytes of images in one request.")] = 20,
    max_queue: Annotated[int, typer.Option(min=1, help="Most images in process; further ones get status 503.")] = 256,
    num_workers: Annotated[
        int | None,
        typer.Option(min=1, help="Threads that run the network; default: one per core, at most 8; 2 on accelerators."),
    ] = None,
    device: Device = None,
) -> None:
    """Serve a model over HTTP with the API of hosted image classification, for `InferenceClient(model=URL)`."""
    with errors_in_one_line():
        with extra("serve"):
            from ..deploy.serve import ServingSettings
            from ..deploy.serve import serve as serve_classifier

        from ..deploy.predict import Classifier

        classifier = Classifier.from_pretrained(model, device=device)
        settings = ServingSettings(max_batch_size, max_wait_ms, max_image_mb, max_queue, num_workers)
    typer.echo(f"{model}: {len(classifier.labels):,} classes, on {classifier.device}.")
    serve_classifier(classifier, host=host, port=port, settings=settings)


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


def space(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A published folder, which is copied, or a Hub id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; an earlier Space is replaced.")],
    labeled: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help=f"Images to show the nearest of, copied to OUT: {LABELED_SOURCE}."),
    ] = None,
    validation: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Labeled images to measure the thresholds for out-of-distribution (OOD) images on. Images of other "
            "classes than the model's are OOD: the page says how many it detects. A few are stored in OUT as examples.",
        ),
    ] = None,
    title: Annotated[str | None, typer.Option(help="The page's title; default: the model's name.")] = None,
    image_column: ImageColumn = "image",
    label_column: LabelColumn = "label",
) -> None:
    """Write a web page to try the model: drop an image, see its classes, a heat map and the nearest labeled images."""
    with errors_in_one_line():
        from ..deploy.space import write_space

        columns = dict(image_column=image_column, label_column=label_column)
        write_space(model, out, labeled=labeled, validation=validation, title=title, **columns)
    folder = shlex.quote(str(out))
    stored = " It has copies of your images: publish it only if you may publish them." if labeled or validation else ""
    typer.echo(
        f"A Space is in {out}.{stored}\n"
        f"Try it:      pip install -r {folder}/requirements.txt && python {folder}/app.py\n"
        f"Publish it:  hf upload USER/NAME {folder} . --repo-type space"
    )


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
    backbone: Annotated[str, typer.Option(help="timm name, such as wide_resnet28_2_cifar.")] = "resnet50",
    weights: Annotated[Weights, typer.Option(help="Averaged (ema) or raw weights; MoCo has one set.")] = Weights.ema,
    image_size: Annotated[int | None, typer.Option(help="Side of the input in pixels; default: the source's.")] = None,
    mean: Annotated[Channels | None, typer.Option(help="Mean per channel; default: the source's.")] = None,
    std: Annotated[Channels | None, typer.Option(help="Standard deviation per channel; default: the source's.")] = None,
    with_head: Annotated[bool, typer.Option(help="Keep SemiCLS's projection head, to continue training.")] = True,
    allow_unknown: Annotated[bool, typer.Option(help="Leave out unknown keys and list them.")] = False,
) -> None:
    """Convert a checkpoint of other code to a published folder."""
    arguments = locals()
    with errors_in_one_line():
        from ..deploy.convert import convert as convert_checkpoint

        file = Path(labels)
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else labels.split(",")
        arguments |= dict(source=source.value, labels=[line.strip() for line in lines if line.strip()])
        report = convert_checkpoint(**arguments)
    typer.echo(report)
