"""Serve a model over HTTP for `huggingface_hub.InferenceClient(model=URL).image_classification(...)`.

`POST /` takes the bytes of an image, or JSON: `{"inputs": <base64 text, or a list of it>, "parameters": {"top_k": 2}}`.
It answers as `transformers.pipeline` does. Images of different requests go through the network in one batch.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from torch import Tensor

from ..errors import near_misses
from ..record import library_versions
from .handler import MAX_PIXELS, TooLargeError, check_parameters, decode_base64, read_image
from .limits import SMALL_PIXELS, LimitedProtocol, PixelBudget, Quota, pixel_count, return_memory
from .predict import ACCELERATOR_BATCH, CPU_BATCH, MAX_WORKERS, NOT_FINITE, Classifier, sharing_threads

TOP_K = 5  # default number of classes in an answer, as in transformers' pipeline
UPLOAD_SECONDS = 60  # for the body of a request to arrive
STALL_SECONDS = 10  # between two parts of a body
PIXELS_PER_CORE = 12_000_000  # that are decoded at the same time: a photograph
SHUTDOWN_SECONDS = 30  # for open requests after the server was told to stop


@dataclass(frozen=True)
class ServingSettings:
    """Limits of batches and requests."""

    max_batch_size: int | None = None  # images per forward pass; where None 16 on a CPU and 64 on an accelerator
    max_wait_ms: float = 5.0  # that an image waits for a full batch
    max_image_mb: float = 20.0  # megabytes of encoded images in one request
    max_queue: int = 1024  # images being processed; further requests are answered with status 503
    num_workers: int | None = None  # threads that run the network; where None one per core, at most 8; accelerators: 2
    max_connections: int = 1024  # open connections
    max_memory_mb: float = 512.0  # megabytes of requests in memory; further requests are answered with status 503
    max_decoding_mpx: float | None = None  # megapixels decoded at once; None: 12 per core, at least 90
    client_share: float = 0.75  # of connections, images in process and memory that one client address gets


class Batcher:
    """Collects images from many threads into batches for `predict`: uint8 `[N, 3, H, W]` to logits `[N, C]`.

    A batch waits at most `max_wait_ms` to be full, from its first image on. A few threads run the network. Only one of
    them collects at a time, so that slowly arriving images are not divided among idle threads.
    """

    def __init__(self, predict: Callable[[Tensor], Tensor], *, max_batch_size: int, max_wait_ms: float) -> None:
        self._predict, self._max_batch_size, self._max_wait = predict, max_batch_size, max_wait_ms / 1000
        self._waiting: queue.SimpleQueue[tuple[Tensor, Future[Tensor]] | None] = queue.SimpleQueue()
        self._collecting = threading.Lock()

    @contextmanager
    def running(self, workers: int) -> Iterator[None]:
        """Run `workers` threads. At the end they answer everything that was submitted before."""
        with sharing_threads(workers) as pool:
            running = [pool.submit(self._work) for _ in range(workers)]
            try:
                yield
            finally:
                for _ in running:
                    self._waiting.put(None)
                for worker in running:
                    worker.result()

    def submit(self, pixels: Tensor) -> Future[Tensor]:
        """A future of the logits `[C]` of an image `[3, H, W]`."""
        answer: Future[Tensor] = Future()
        self._waiting.put((pixels, answer))
        return answer

    def _collect(self) -> list[tuple[Tensor, Future[Tensor]]]:
        """The next batch; empty at the end."""
        batch: list[tuple[Tensor, Future[Tensor]]] = []
        until = float("inf")
        with self._collecting:
            while len(batch) < self._max_batch_size:
                try:
                    left = max(until - time.monotonic(), 0)
                    taken = self._waiting.get(timeout=left) if batch else self._waiting.get()
                except queue.Empty:
                    break
                if taken is None:
                    if batch:
                        self._waiting.put(None)  # read again in this thread's next call
                    break
                until = min(until, time.monotonic() + self._max_wait)
                if taken[1].set_running_or_notify_cancel():  # else the client has left
                    batch.append(taken)
        return batch

    def _work(self) -> None:
        while batch := self._collect():
            pixels, answers = zip(*batch, strict=True)
            try:
                logits = self._predict(torch.stack(pixels))
            except Exception as error:
                for answer in answers:
                    answer.set_exception(error)
            else:
                for answer, row in zip(answers, logits, strict=True):
                    answer.set_result(row)


class _Service:
    def __init__(self, classifier: Classifier, settings: ServingSettings) -> None:
        self.classifier, self.settings = classifier, settings
        self._max_bytes = int(settings.max_image_mb * 1e6)
        on_cpu = classifier.device.type == "cpu"
        self._workers = settings.num_workers or (min(MAX_WORKERS, torch.get_num_threads()) if on_cpu else 2)
        self._batcher = Batcher(
            lambda pixels: classifier.predict_unchecked(pixels).logits,
            max_batch_size=settings.max_batch_size or (CPU_BATCH if on_cpu else ACCELERATOR_BATCH),
            max_wait_ms=settings.max_wait_ms,
        )
        share = settings.client_share
        self._images = Quota(settings.max_queue, share)
        self._bytes = Quota(int(settings.max_memory_mb * 1e6), share, at_least=self._max_bytes * 4 // 3 + 65536)
        pixels = (settings.max_decoding_mpx or 0) * 1e6 or max(MAX_PIXELS, PIXELS_PER_CORE * (os.cpu_count() or 1))
        self._budget = PixelBudget(int(pixels))

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        with ThreadPoolExecutor(os.cpu_count()) as decoders, self._batcher.running(self._workers):
            self._in_thread = partial(asyncio.get_running_loop().run_in_executor, decoders)
            yield

    async def health(self, request: Request) -> JSONResponse:
        return JSONResponse({"status": "ok"})

    async def root(self, request: Request) -> JSONResponse:
        """Classify images, or describe the model."""
        if request.method == "POST":
            return JSONResponse(await self._classify(request))
        name = self.classifier.name
        about = {
            "model": Path(name).name if Path(name).is_dir() else name,
            "task": "image-classification",
            "classes": self.classifier.labels,
            "device": str(self.classifier.device),
            "max_image_mb": self.settings.max_image_mb,
            "versions": library_versions(),
        }
        return JSONResponse(about)

    async def _classify(self, request: Request) -> list[Any]:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        is_json = kind == "application/json"
        # Clients that have only bytes send them without a type.
        if not is_json and not kind.startswith("image/") and kind not in ("", "application/octet-stream"):
            fix = "send an image with its type, such as image/jpeg, or base64 text in application/json."
            raise HTTPException(415, f"Content-Type is '{kind}': {fix}")
        query = request.query_params.items()
        given = {name: int(value) if value.isdecimal() and len(value) < 10 else value for name, value in query}
        with _status(422):
            parameters = check_parameters(given)
        client = request.client.host if request.client else ""
        at_most = self._max_bytes * 4 // 3 + 65536 if is_json else self._max_bytes
        with self._bytes.lending(client) as memory, self._images.lending(client) as places:
            body = await self._body(request, memory, at_most=at_most)
            inputs, more = await self._in_thread(_parse, body) if is_json else (body, {})
            parameters |= more
            images = inputs if (several := isinstance(inputs, list)) else [inputs]
            if len(images) > self._images.per_client:
                limit = f"at most {self._images.per_client} are allowed in one request: send several requests."
                raise HTTPException(413, f"inputs holds {len(images)} images, but {limit}")
            if not places(len(images)):
                raise _busy("The server's queue is full")
            where = "inputs[{}]: " if several else ""
            each = (self._answer(one, where.format(number), parameters) for number, one in enumerate(images))
            answers = await asyncio.gather(*each, return_exceptions=True)  # keep the places until all are done
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers if several else answers[0]  # type: ignore[return-value]

    async def _body(self, request: Request, memory: Callable[[int], bool], *, at_most: int) -> bytes:
        """The body of a request. It counts as memory in use until the request is answered."""
        body, parts = bytearray(), aiter(request.stream())
        try:
            with anyio.fail_after(UPLOAD_SECONDS):
                while True:
                    with anyio.fail_after(STALL_SECONDS):
                        chunk = await anext(parts, None)
                    if chunk is None:
                        return bytes(body)
                    if len(body) + len(chunk) > at_most:  # uvicorn discards the rest; clients see the answer
                        limit = f"at most {self.settings.max_image_mb:g} MB of images are allowed in one request"
                        raise HTTPException(413, f"The request is too large: {limit}. Send smaller or fewer images.")
                    if not memory(len(chunk)):
                        raise _busy("The server has no memory left for this request")
                    body += chunk
        except TimeoutError as error:
            problem = f"took more than {UPLOAD_SECONDS} s to arrive, or stopped for {STALL_SECONDS} s: try again."
            raise HTTPException(408, f"The request {problem}") from error

    async def _answer(self, encoded: Any, where: str, parameters: dict[str, Any]) -> list[dict[str, Any]]:
        """Labels and scores of an image, given as bytes or base64 text. Errors start with `where`."""
        with _status(400, where):
            pixels = await self._decode(encoded)
        logits = await asyncio.wrap_future(self._batcher.submit(pixels))
        scores = self.classifier.scores(logits, parameters.get("function_to_apply"))
        if not scores.isfinite().all():
            raise HTTPException(500, f"{where}For this image {NOT_FINITE}.")
        scores, numbers = scores.sort(descending=True, stable=True)
        best = zip(numbers.tolist(), scores.tolist(), strict=True)
        answer = [{"label": self.classifier.labels[number], "score": score} for number, score in best]
        return answer[: parameters.get("top_k", TOP_K)]

    async def _decode(self, encoded: Any) -> Tensor:
        """The network's input. A large image waits until there is memory for its pixels."""

        def decode() -> Tensor:
            try:
                return self.classifier.pixels(read_image(content))
            finally:
                if is_large:
                    return_memory()

        content = encoded if isinstance(encoded, bytes) else await self._in_thread(decode_base64, encoded)
        count = await self._in_thread(pixel_count, content)
        is_large = SMALL_PIXELS < count <= MAX_PIXELS  # an even larger one raises an error before it is decoded
        try:
            async with self._budget.held(count) if is_large else nullcontext():
                return await self._in_thread(decode)
        except TimeoutError as error:
            raise _busy("The server decodes too many large images") from error


def _busy(problem: str) -> HTTPException:
    return HTTPException(503, f"{problem}: try again in a second.", headers={"Retry-After": "1"})


@contextmanager
def _status(code: int, where: str = "") -> Iterator[None]:
    """Answer with this status if the content of a request raises ValueError."""
    try:
        yield
    except ValueError as error:
        raise HTTPException(413 if isinstance(error, TooLargeError) else code, f"{where}{error}") from error


def _parse(body: bytes) -> tuple[Any, dict[str, Any]]:
    """The `inputs` and `parameters` of a JSON body."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"The body is not JSON ({error}): send {{'inputs': <base64 text>}}.") from error
    if not isinstance(content, dict) or content.get("inputs") in (None, []):
        raise HTTPException(422, "The body must be an object with inputs: base64 text of an image, or a list of it.")
    for name in content.keys() - {"inputs", "parameters"}:
        near = near_misses(name, ("inputs", "parameters"))
        raise HTTPException(422, f"The body has '{name}', but there are only inputs and parameters.{near}")
    with _status(422):
        return content["inputs"], check_parameters(content.get("parameters") or {})


async def _error(request: Request, error: Exception) -> JSONResponse:
    """Answer with an error message that reveals nothing about the server."""
    if isinstance(error, ClientDisconnect):  # nobody reads this answer
        return JSONResponse({"error": "The request ended early."}, 400)
    if not isinstance(error, HTTPException):
        return JSONResponse({"error": "Internal error; see the server log."}, 500)
    path, usage = request.url.path, "POST an image to /, or GET / or /health."
    messages = {404: f"There is nothing at {path}: {usage}", 405: f"{path} does not accept {request.method}: {usage}"}
    message = messages.get(error.status_code, error.detail)
    return JSONResponse({"error": message}, error.status_code, headers=error.headers)


def create_app(classifier: Classifier, settings: ServingSettings | None = None) -> Starlette:
    """The ASGI application. Run it in one process, because batches are formed within a process."""
    service = _Service(classifier, settings or ServingSettings())
    routes = [Route("/", service.root, methods=["GET", "POST"]), Route("/health", service.health)]
    handlers = dict.fromkeys((HTTPException, ClientDisconnect, Exception), _error)
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=service.lifespan)


def server_config(classifier: Classifier, settings: ServingSettings | None = None, **options: Any) -> uvicorn.Config:
    """The configuration of uvicorn, with limits for connections. `options` are those of `uvicorn.Config`."""
    settings = settings or ServingSettings()
    connections = Quota(settings.max_connections, settings.client_share)
    http: Any = partial(LimitedProtocol, connections=connections)
    return uvicorn.Config(create_app(classifier, settings), http=http, ws="none", server_header=False, **options)


def serve(
    classifier: Classifier, *, host: str = "127.0.0.1", port: int = 8000, settings: ServingSettings | None = None
) -> None:
    """Serve until stopped by Ctrl+C or SIGTERM. Open requests are answered first."""
    how: dict[str, Any] = dict(host=host, port=port, timeout_graceful_shutdown=SHUTDOWN_SECONDS)
    with suppress(KeyboardInterrupt):  # which uvicorn raises again after it has stopped
        uvicorn.Server(server_config(classifier, settings, **how)).run()
