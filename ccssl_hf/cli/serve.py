"""`ccssl-hf serve`: a model over HTTP."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import errors_in_one_line, extra
from .options import BatchSize, Device, Model


def serve(
    model: Model,
    host: Annotated[
        str, typer.Option(help="Address to listen on. 0.0.0.0 accepts other machines, without authentication.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 chooses a free one.")] = 8000,
    max_batch_size: BatchSize = None,
    max_wait_ms: Annotated[float, typer.Option(min=0, help="Longest wait of an image for a full batch.")] = 5,
    max_image_mb: Annotated[float, typer.Option(min=0, help="Most megabytes of images in one request.")] = 20,
    max_queue: Annotated[int, typer.Option(min=1, help="Most images in process; further ones get status 503.")] = 1024,
    num_workers: Annotated[
        int | None,
        typer.Option(min=1, help="Threads that run the network; default: one per core, at most 8; 2 on accelerators."),
    ] = None,
    max_connections: Annotated[int, typer.Option(min=1, help="Most open connections.")] = 1024,
    max_memory_mb: Annotated[float, typer.Option(min=1, help="Most megabytes of requests in memory.")] = 512,
    max_decoding_mpx: Annotated[
        float | None,
        typer.Option(min=1, help="Most megapixels that are decoded at once; default: 12 per core, at least 90."),
    ] = None,
    client_share: Annotated[
        float,
        typer.Option(
            min=0.01,
            max=1,
            help="Largest part of connections, images and memory for one client address; 1 behind a proxy.",
        ),
    ] = 0.75,
    device: Device = None,
) -> None:
    """Serve a model over HTTP with the API of hosted image classification, for `InferenceClient(model=URL)`."""
    with errors_in_one_line():
        with extra("serve"):
            from ..deploy.serve import ServingSettings
            from ..deploy.serve import serve as serve_classifier

        from ..deploy.predict import Classifier

        classifier = Classifier.from_pretrained(model, device=device)
        settings = ServingSettings(
            max_batch_size,
            max_wait_ms,
            max_image_mb,
            max_queue,
            num_workers,
            max_connections,
            max_memory_mb,
            max_decoding_mpx,
            client_share,
        )
    typer.echo(f"{model}: {len(classifier.labels):,} classes, on {classifier.device}.")
    serve_classifier(classifier, host=host, port=port, settings=settings)
