"""The server over HTTP: Hugging Face's client, invalid requests, many clients at once, and the end."""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import uvicorn
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from typer.testing import CliRunner

from ccssl_hf.cli import app
from ccssl_hf.deploy import handler
from ccssl_hf.deploy.predict import Classifier
from ccssl_hf.deploy.serve import Batcher, ServingSettings, create_app
from small_models import LABELS, picture, published

PORT_LINE = re.compile(r"running on http://127\.0\.0\.1:(\d+)")


@contextmanager
def served(classifier: Classifier, settings: ServingSettings | None = None) -> Iterator[str]:
    """The address of a server in a thread."""
    config = uvicorn.Config(create_app(classifier, settings), port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published(tmp_path_factory.mktemp("served") / "insects", "wide_resnet10_1_cifar", 16)


@pytest.fixture(scope="module")
def classifier(folder: Path) -> Classifier:
    return Classifier.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def url(classifier: Classifier) -> Iterator[str]:
    with served(classifier, ServingSettings(max_image_mb=0.1)) as address:
        yield address


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    return transformers.pipeline("image-classification", model=str(folder), device="cpu")


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def post(url: str, body: Any, kind: str | None = None, **headers: str) -> tuple[int, dict[str, str], Any]:
    """Status, headers and content of an answer, through the standard library alone."""
    host, _, path = url.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(host, timeout=60)
    try:
        connection.request("POST", f"/{path}", body, headers | ({"Content-Type": kind} if kind else {}))
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, json.load(answer)
    finally:
        connection.close()


def post_json(url: str, content: Any) -> tuple[int, Any]:
    status, _, answer = post(url, json.dumps(content), "application/json")
    return status, answer


def same(answer: list[Any], expected: list[Any]) -> bool:
    """Whether labels and their order are equal, and scores within the error of folded convolutions."""
    labels, scores = ([entry[key] for entry in answer] for key in ("label", "score"))
    return labels == [entry["label"] for entry in expected] and scores == pytest.approx(
        [entry["score"] for entry in expected], abs=1e-5
    )


# ------------------------------------------------------------------------------------------------------ what it answers


def test_the_hubs_client_gets_the_pipelines_scores(url, pipeline, tmp_path):
    image = picture(50, 40)
    image.save(tmp_path / "image.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(60, 30).save(tmp_path / "turned.jpg", exif=exif)
    client = InferenceClient(model=url)
    for path in (tmp_path / "image.png", tmp_path / "turned.jpg"):
        expected = pipeline(str(path))
        assert same(client.image_classification(str(path)), expected)
        assert same(client.image_classification(path.read_bytes()), expected)
        assert same(client.image_classification(path, top_k=2), expected[:2])
        for function in ("sigmoid", "softmax", "none"):
            answer = client.image_classification(path, function_to_apply=function)
            assert same(answer, pipeline(str(path), function_to_apply=function))


def test_json_query_and_batches(url, pipeline):
    images = [picture(40, 40), picture(30, 50).convert("L"), picture(20, 20)]
    texts = [base64.b64encode(encoded(image)).decode() for image in images]
    expected = pipeline(images)
    status, answers = post_json(url, {"inputs": texts})
    assert status == 200 and len(answers) == 3 and all(map(same, answers, expected))
    status, answers = post_json(url, {"inputs": texts[:1], "parameters": {"top_k": 1}})
    assert status == 200 and len(answers) == 1 and same(answers[0], expected[0][:1])
    status, answer = post_json(url, {"inputs": f"data:image/png;base64,{texts[0]}", "parameters": None})
    assert status == 200 and same(answer, expected[0])
    status, _, answer = post(f"{url}/?top_k=3", encoded(images[1], "BMP"), "application/octet-stream")
    assert status == 200 and same(answer, expected[1][:3])
    status, _, answer = post(f"{url}/?top_k=999", encoded(images[2]), "image/png; charset=binary")
    assert status == 200 and same(answer, expected[2])


def test_what_is_served_can_be_read(url, folder):
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    connection.request("GET", "/")
    text = connection.getresponse().read().decode()
    about = json.loads(text)
    assert about["model"] == "insects" and about["classes"] == LABELS and about["versions"]["torch"]
    assert str(folder.parent) not in text
    connection.request("GET", "/health")
    answer = connection.getresponse()
    assert answer.status == 200 and json.load(answer) == {"status": "ok"}
    connection.close()


# ------------------------------------------------------------------------------------------------------ what it refuses


def bomb(side: int) -> bytes:
    """A PNG of a few kilobytes with `side` x `side` black pixels."""
    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "PNG")
    return file.getvalue()


IMAGE = encoded(picture(20, 20))
TEXT = base64.b64encode(IMAGE).decode()


@pytest.mark.parametrize(
    ("body", "kind", "status", "words"),
    [
        (b"no image", "image/jpeg", 400, "not a readable image"),
        (IMAGE[:80], None, 400, "not a readable image"),
        (b"", "image/png", 400, "send a complete BMP"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "image/eps", 400, "not a readable image"),
        ({"inputs": "no base64!"}, None, 400, "not base64"),
        ({"inputs": base64.b64encode(b"no image").decode()}, None, 400, "not a readable image"),
        ({"inputs": [TEXT, "no base64!"]}, None, 400, "inputs[1]: This is not base64"),
        ({"inputs": 3}, None, 400, "must be base64 text, but this is of type int"),
        ({"inputs": "http://127.0.0.1/image.png"}, None, 400, "URLs are not fetched"),
        ({"inputs": "/etc/hostname.png"}, None, 400, "This is not base64"),
        (b'{"inputs": ', "application/json", 400, "The body is not JSON"),
        (b"[" * 50_000, "application/json", 400, "The body is not JSON"),
        (b"\xff\xfe", "application/json", 400, "The body is not JSON"),
        ([TEXT], None, 422, "must be an object with inputs"),
        ({"inputs": []}, None, 422, "must be an object with inputs"),
        ({"inputs": TEXT, "parametres": {}}, None, 422, "Did you mean 'parameters'?"),
        ({"inputs": TEXT, "parameters": {"topk": 2}}, None, 422, "no parameter 'topk': did you mean 'top_k'?"),
        ({"inputs": TEXT, "parameters": {"temperature": 2}}, None, 422, "there are top_k and function_to_apply"),
        ({"inputs": TEXT, "parameters": [2]}, None, 422, "parameters must be an object"),
        ({"inputs": TEXT, "parameters": {"top_k": 0}}, None, 422, "integer of at least 1, but is 0"),
        ({"inputs": TEXT, "parameters": {"top_k": True}}, None, 422, "integer of at least 1, but is True"),
        ({"inputs": TEXT, "parameters": {"function_to_apply": "relu"}}, None, 422, "softmax, sigmoid, none"),
        (IMAGE, "text/plain", 415, "Content-Type is 'text/plain': send an image"),
        (IMAGE, "application/x-www-form-urlencoded", 415, "image/jpeg"),
        (bytes(100_001), "image/png", 413, "too large: at most 0.1 MB of images"),
        ({"inputs": "A" * 200_000}, None, 413, "too large: at most 0.1 MB of images"),
        (bytes(30_000_000), "text/plain", 415, "Content-Type is 'text/plain': send an image"),
        (bomb(9_460), "image/png", 413, "9460 x 9460 pixels, at most 89,478,485 are allowed"),
        (bomb(14_000), "image/png", 413, "exceeds limit of 178956970 pixels"),
    ],
)
def test_a_wrong_request_gets_a_sentence(url, body, kind, status, words):
    answer = post(url, body, kind) if isinstance(body, bytes) else post(url, json.dumps(body), "application/json")
    assert answer[0] == status, answer
    assert list(answer[2]) == ["error"] and words in answer[2]["error"]
    assert " object at 0x" not in answer[2]["error"]


def test_wrong_places_methods_and_queries(url):
    status, _, answer = post(f"{url}/models/insects", IMAGE, "image/png")
    assert status == 404 and "nothing at /models/insects: POST an image to /" in answer["error"]
    status, headers, answer = post(f"{url}/health", IMAGE, "image/png")
    assert status == 405 and "/health does not accept POST" in answer["error"] and "GET" in headers["allow"]
    status, _, answer = post(f"{url}/?top_k=many", IMAGE, "image/png")
    assert status == 422 and "top_k must be an integer" in answer["error"]
    status, _, answer = post(f"{url}/?topk=1", IMAGE, "image/png")
    assert status == 422 and "did you mean 'top_k'?" in answer["error"]
    with pytest.raises(HfHubHTTPError, match="not a readable image"):
        InferenceClient(model=url).image_classification(b"no image")


def test_a_body_is_bounded_while_it_streams(url):
    chunks = (bytes(100_000) for _ in range(300))  # sent chunked: no Content-Length says how long it will be
    status, _, answer = post(url, chunks, "image/png")
    assert status == 413 and "too large" in answer["error"]


def test_pixels_are_counted_before_they_are_decoded():
    content = bomb(9_460)
    assert len(content) < 100_000
    with pytest.raises(handler.TooLargeError, match="9460 x 9460"):
        handler.read_image(content)


def half_sent(url: str, body: bytes) -> socket.socket:
    """A connection whose request has sent half of its body, which the server is reading."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    head = f"POST / HTTP/1.1\r\nHost: {host}\r\nContent-Type: image/png\r\nContent-Length: {len(body)}\r\n"
    connection.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
    assert b"100 Continue" in connection.recv(4096)  # the handler is reading
    connection.sendall(body[: len(body) // 2])
    return connection


def test_a_full_queue_sends_clients_away_and_is_free_again(classifier):
    with served(classifier, ServingSettings(max_queue=2)) as url:
        connection = half_sent(url, IMAGE)
        assert post(url, IMAGE, "image/png")[0] == 200
        body = json.dumps({"inputs": [TEXT, TEXT]})
        status, headers, answer = post(url, body, "application/json")
        assert status == 503 and headers["retry-after"] == "1" and "try again" in answer["error"]
        connection.sendall(IMAGE[len(IMAGE) // 2 :])
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        connection.close()
        assert post(url, body, "application/json")[0] == 200
        status, _, answer = post(url, json.dumps({"inputs": [TEXT] * 3}), "application/json")
        assert status == 413 and "inputs holds 3 images, but at most 2" in answer["error"]


def test_a_client_that_leaves_takes_no_place(classifier):
    with served(classifier, ServingSettings(max_queue=1)) as url:
        half_sent(url, IMAGE).close()
        while (status := post(url, IMAGE, "image/png")[0]) == 503:
            time.sleep(0.01)
        assert status == 200


def test_an_internal_error_reveals_nothing_about_the_server(folder, capsys):
    classifier = Classifier.from_pretrained(folder, device="cpu")
    classifier._network = torch.nn.Identity()
    with served(classifier) as url:
        status, _, answer = post(url, IMAGE, "image/png")
        assert status == 500 and answer["error"] == "Internal error; see the server log."
    assert "ValueError: not enough values to unpack" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- batching


def test_what_waits_goes_together_and_each_gets_its_own():
    sizes: list[int] = []
    entered, go_on = threading.Event(), threading.Event()

    def predict(images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        entered.set()
        go_on.wait()
        return images.flatten(1)[:, :1].float()

    batcher = Batcher(predict, max_batch_size=4, max_wait_ms=0)
    images = [torch.full((3, 2, 2), number, dtype=torch.uint8) for number in range(9)]
    with batcher.running(1):
        answers = [batcher.submit(images[0])]
        entered.wait()
        answers += [batcher.submit(image) for image in images[1:]]
        assert answers[2].cancel()  # nobody waits for it
        go_on.set()
    assert sizes == [1, 4, 3]
    assert [answer.result().item() for answer in answers if not answer.cancelled()] == [0, 1, 3, 4, 5, 6, 7, 8]


def test_an_error_reaches_all_of_a_batch_and_the_next_one_is_computed():
    def predict(images: torch.Tensor) -> torch.Tensor:
        if images.any():
            raise MemoryError("too large")
        return images.flatten(1)

    batcher = Batcher(predict, max_batch_size=2, max_wait_ms=1000)
    with batcher.running(1):
        bad = [batcher.submit(torch.full((3, 2, 2), number, dtype=torch.uint8)) for number in (0, 1)]
        good = batcher.submit(torch.zeros(3, 2, 2, dtype=torch.uint8))
    assert all(isinstance(answer.exception(), MemoryError) for answer in bad)
    assert good.result().shape == (12,)


def different_images(pipeline: Any, count: int) -> list[tuple[bytes, list[Any]]]:
    """Encoded images with their scores. No two of them have the same scores."""
    images = [picture(24, 24) for _ in range(count)]
    expected = pipeline(images)
    scores = np.array([[one["score"] for one in sorted(answer, key=itemgetter("label"))] for answer in expected])
    distances = np.abs(scores[:, None] - scores[None]).max(axis=2) + np.eye(count)
    assert distances.min() > 1e-4
    return list(zip(map(encoded, images), expected, strict=True))


async def ask(url: str, images: list[tuple[bytes, list[Any]]], *, clients: int, requests: int) -> int:
    """The number of requests that got the scores of their own image."""
    numbers = iter(range(requests))

    async def one_client() -> int:
        right = 0
        async with AsyncInferenceClient(model=url) as client:
            for number in numbers:
                content, expected = images[number % len(images)]
                # Bytes as they are or base64 with a parameter, in turn; all scores, else there were no telling apart.
                answer = await client.image_classification(content, top_k=len(LABELS) if number % 2 else None)
                right += same(answer, expected)
        return right

    return sum(await asyncio.gather(*(one_client() for _ in range(clients))))


@pytest.mark.parametrize(
    ("clients", "requests"), [(16, 200), pytest.param(64, 2000, marks=pytest.mark.slow)], ids=["16x200", "64x2000"]
)
def test_many_clients_at_once_all_get_their_own(url, pipeline, clients, requests):
    images = different_images(pipeline, 50)
    assert asyncio.run(ask(url, images, clients=clients, requests=requests)) == requests


# -------------------------------------------------------------------------------------------------------------- command


def line_with(process: subprocess.Popen[str], found: Callable[[str], Any]) -> Any:
    """The first true result of `found` on a line of standard error."""
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if what := found(line):
            return what
    raise AssertionError("".join(lines))


def test_the_command_serves_and_ends_when_all_is_answered(folder, pipeline, tmp_path):
    command = [sys.executable, "-c", "from ccssl_hf.cli import app; app()", "serve", str(folder), "--port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--device", "cpu"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        url = f"http://127.0.0.1:{line_with(process, PORT_LINE.search)[1]}"
        assert post(f"{url}/?top_k=0", IMAGE, "image/png")[0] == 422
        connection = half_sent(url, IMAGE)
        process.send_signal(signal.SIGTERM)
        line_with(process, lambda line: "Waiting for connections to close" in line)
        with pytest.raises(ConnectionRefusedError):
            post(url, IMAGE, "image/png")
        connection.sendall(IMAGE[len(IMAGE) // 2 :])
        answer = connection.makefile("rb").read()
        connection.close()
        assert answer.startswith(b"HTTP/1.1 200")
        said = json.loads(answer.partition(b"\r\n\r\n")[2])
        assert same(said, pipeline(Image.open(io.BytesIO(IMAGE))))
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in errors
    first, *lines = output.splitlines()
    assert first == f"{folder}: 4 classes, on cpu."
    assert ['"POST /?top_k=0 HTTP/1.1" 422' in lines[0], '"POST / HTTP/1.1" 200' in lines[1]] == [True, True]
    assert len(lines) == 2  # one for each request


def test_the_command_says_in_a_line_what_is_wrong(tmp_path):
    result = CliRunner().invoke(app, ["serve", str(tmp_path)])
    assert result.exit_code == 2
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "config.json" in line
