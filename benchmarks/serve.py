"""Requests a second under 64 clients against the model alone, on the same cores and images.

The server is `ccssl-hf serve` with its defaults, in a process of its own. The model alone is `Classifier.predict` in as
many threads, on batches of the size that the server makes at most: once on images that are decoded (so it resizes,
crops and normalises, too), and once on pixels that are ready for the network. The server also decodes the JPEGs, and
speaks HTTP. The 64 clients are connections of one more process. It has no cores of its own, so what the clients take is
missing in the server's figure; `clients_processor_seconds` says how much that is. All must say the same of each image.
"""

from __future__ import annotations

import asyncio
import json
import logging
import multiprocessing
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch
from PIL import Image
from predict import LABELS, SCORES_WITHIN, write_jpegs

from ccssl_hf import CCSSLForImageClassification
from ccssl_hf.deploy.predict import CPU_BATCH, MAX_WORKERS, Classifier, sharing_threads

CLIENTS = 64


@dataclass(frozen=True)
class Case:
    """A network, sides in pixels of the files and of the network's images, requests of a round, and the bar."""

    name: str
    side: int
    image_size: int
    requests: int
    bar: harness.Bar | None = None


CASES = (Case("resnet18", 500, 224, 512, harness.Bar("≥", 0.8)),)
QUICK = (Case("test_resnet", 64, 32, 70),)


@contextmanager
def server(model: Path, log: Path) -> Iterator[int]:
    """The port of the command, started and stopped."""
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
    """The answer for each file, and the processor seconds that asking took. Runs in the clients' process."""
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


def measure_case(case: Case, folder: Path, *, rounds: int) -> list[harness.Row]:
    files = write_jpegs(folder / "images", count=case.requests, side=case.side)
    torch.manual_seed(0)
    model = CCSSLForImageClassification.from_timm(case.name, labels=LABELS, image_size=case.image_size)
    model.save_pretrained(folder / "model")
    classifier = Classifier.from_pretrained(folder / "model", device="cpu")
    images = [Image.open(file).convert("RGB") for file in files]
    workers = min(MAX_WORKERS, torch.get_num_threads())
    starts = range(0, len(files), CPU_BATCH)
    decoded = [images[start : start + CPU_BATCH] for start in starts]
    pixels = [torch.stack([classifier.pixels(image) for image in batch]) for batch in decoded]
    alone: list[Any] = []
    answers: list[Any] = []
    clients_seconds: list[float] = []

    def predict(batches: list[Any]) -> None:
        with sharing_threads(workers) as pool:
            said = list(pool.map(classifier.predict, batches))
        labels = [label for batch in said for label in batch.labels]
        alone[:] = zip(labels, torch.cat([batch.confidences for batch in said]).tolist(), strict=True)

    with (
        server(folder / "model", folder / "log") as port,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as clients,
    ):

        def serve() -> None:
            answers[:], seconds = clients.submit(ask, port, files).result()
            clients_seconds.append(seconds)

        seconds = harness.in_turn(lambda: predict(decoded), lambda: predict(pixels), serve, rounds=rounds)
    top = [answer[0] for answer in answers]
    assert [one["label"] for one in top] == [label for label, _ in alone]
    furthest = max(abs(one["score"] - confidence) for one, (_, confidence) in zip(top, alone, strict=True))
    assert furthest < SCORES_WITHIN, furthest

    def rate(taken: list[float]) -> str:
        return f"{len(files) / statistics.median(taken):,.3g} images/s"

    what = f"serve {case.requests} JPEGs of {case.side} px to {CLIENTS} clients, {case.name} at {case.image_size} px"
    details = {
        "seconds": seconds[2],
        "clients_processor_seconds": clients_seconds[-rounds:],
        "workers": workers,
        "max_batch_size": CPU_BATCH,
        "largest_difference_of_scores": furthest,
    }
    return [
        harness.Row(
            what=f"{what}; alone: {kind}",
            baseline=rate(taken),
            ours=rate(seconds[2]),
            figure=harness.ratio(taken, seconds[2]),
            unit="of the model's throughput",
            bar=case.bar,
            details={"baseline_seconds": taken, **details},
        )
        for kind, taken in (("decoded images", seconds[0]), ("ready pixels", seconds[1]))
    ]


def measure(quick: bool) -> list[harness.Row]:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    rows = []
    for case in QUICK if quick else CASES:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure_case(case, Path(folder), rounds=1 if quick else 5)
    return rows


if __name__ == "__main__":
    harness.main(__file__, measure)
