"""Images a second of the server with 64 clients, against the model alone on the same cores and images.

The server is `ccssl-hf serve` with its defaults, in its own process. The model alone is `Classifier.predict` in as many
threads, with batches of the server's maximum size: once on decoded images (so it resizes, crops and normalizes too),
and once on pixels that are ready for the network. The server also decodes JPEG files and handles HTTP. The 64 clients
are connections of one more process on the same cores, so their work lowers the server's figure;
`clients_processor_seconds` says by how much. All must predict the same for each image.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from harness import Bar, Row, compared, in_turn, main
from PIL import Image
from predict import Case, for_each, largest_difference, prepare

from ccssl_hf.deploy.predict import CPU_BATCH, MAX_WORKERS, Classifier, sharing_threads

CLIENTS = 64
CASES = [Case("resnet18", 500, 224, 512, Bar("≥", 0.8))]
QUICK = [Case("test_resnet", 64, 32, 70)]


@contextmanager
def server(model: Path, log: Path) -> Iterator[int]:
    """Run the command, and yield its port."""
    command = [sys.executable, "-c", "from ccssl_hf.cli import app; app()", "serve", str(model), "--port", "0"]
    with (
        log.open("w") as output,
        subprocess.Popen([*command, "--device", "cpu"], stdout=output, stderr=output) as process,
    ):
        try:
            while not (found := re.search(r"running on http://127\.0\.0\.1:(\d+)", log.read_text())):
                if process.poll() is not None:
                    raise RuntimeError(f"The server did not start:\n{log.read_text()}")
                time.sleep(0.1)
            yield int(found[1])
        finally:
            process.terminate()


def ask(port: int, files: list[str]) -> tuple[list[Any], float]:
    """The answer for each file, and the processor seconds of the clients. Runs in the clients' process."""
    started, answers = time.process_time(), [None] * len(files)
    numbers = iter(range(len(files)))

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number in numbers:
            body = Path(files[number]).read_bytes()
            head = (
                f"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/jpeg\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            writer.write(head.encode() + body)
            length = re.search(rb"content-length: (\d+)", await reader.readuntil(b"\r\n\r\n"))
            assert length is not None
            answers[number] = json.loads(await reader.readexactly(int(length[1])))
        writer.close()

    async def all_clients() -> None:
        await asyncio.gather(*(client() for _ in range(CLIENTS)))

    asyncio.run(all_clients())
    return answers, time.process_time() - started


def measure(quick: bool) -> list[Row]:
    rounds = 1 if quick else 5

    def measure_case(case: Case, folder: Path) -> list[Row]:
        files = prepare(case, folder)
        classifier = Classifier.from_pretrained(folder / "model", device="cpu")
        images = [Image.open(file).convert("RGB") for file in files]
        workers = min(MAX_WORKERS, torch.get_num_threads())
        decoded = [images[start : start + CPU_BATCH] for start in range(0, len(files), CPU_BATCH)]
        pixels = [torch.stack([classifier.pixels(image) for image in batch]) for batch in decoded]
        alone: list[Any] = []
        answers: list[Any] = []
        clients_seconds: list[float] = []

        def predict(batches: list[Any]) -> None:
            with sharing_threads(workers) as pool:
                predictions = list(pool.map(classifier.predict, batches))
            labels = [label for batch in predictions for label in batch.labels]
            confidences = torch.cat([batch.confidences for batch in predictions]).tolist()
            alone[:] = zip(labels, confidences, strict=True)

        with (
            server(folder / "model", folder / "log") as port,
            ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as clients,
        ):

            def serve() -> None:
                answers[:], seconds = clients.submit(ask, port, files).result()
                clients_seconds.append(seconds)

            *others, served = in_turn(lambda: predict(decoded), lambda: predict(pixels), serve, rounds=rounds)
        largest = largest_difference([(top["label"], top["score"]) for top, *_ in answers], alone)
        what = f"serve {case.count} JPEGs of {case.side} px to {CLIENTS} clients, {case.name} at {case.image_size} px"
        return [
            compared(
                f"{what}; model alone on {kind}",
                taken,
                served,
                "of the model's throughput",
                case.bar,
                per_second=(case.count, "images/s"),
                clients_processor_seconds=clients_seconds[-rounds:],
                workers=workers,
                max_batch_size=CPU_BATCH,
                largest_difference_of_scores=largest,
            )
            for kind, taken in zip(("decoded images", "ready pixels"), others, strict=True)
        ]

    return for_each(QUICK if quick else CASES, measure_case)


if __name__ == "__main__":
    main(__file__, measure)
