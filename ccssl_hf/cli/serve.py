"""`ccssl-hf serve`: a model over HTTP."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import errors_in_one_line, extra
from .options import Model


def serve(
    model: Model,
    host: Annotated[
        str, typer.Option(help="Address to listen on. 0.0.0.0 lets in other machines: no one is asked who they are.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    max_batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Images that go through the network at once; default: 16 on a CPU, else 64."),
    ] = None,
    max_wait_ms: Annotated[
        float, typer.Option(min=0, help="Milliseconds that an image waits for others, before a batch that isn't full.")
    ] = 5,
    max_image_mb: Annotated[float, typer.Option(min=0, help="Megabytes of encoded images in one request.")] = 20,
    max_queue: Annotated[int, typer.Option(min=1, help="Images in hand; beyond, clients are told to come back.")] = 256,
    num_workers: Annotated[
        int | None, typer.Option(min=1, help="Threads that compute, each a batch; default: one a core, at most 8.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Such as cuda:0; default: an accelerator, or the CPU.")] = None,
) -> None:
    """Answer requests over HTTP as hosted image classification does, for `InferenceClient(model=URL)` and others."""
    with errors_in_one_line():
        with extra("serve"):
            from ..deploy.serve import ServingSettings
            from ..deploy.serve import serve as serve_classifier

        from ..deploy.predict import Classifier

        classifier = Classifier.from_pretrained(model, device=device)
        settings = ServingSettings(
            max_batch_size=max_batch_size,
            max_wait_ms=max_wait_ms,
            max_image_mb=max_image_mb,
            max_queue=max_queue,
            num_workers=num_workers,
        )
    typer.echo(f"{model}: {len(classifier.labels):,} classes, on {classifier.device}.")
    serve_classifier(classifier, host=host, port=port, settings=settings)
