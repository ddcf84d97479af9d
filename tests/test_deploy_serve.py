"""The server over HTTP: Hugging Face's client, invalid requests, many clients at once, and the end."""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import itertools
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
from contextlib import contextmanager, suppress
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
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
from ccssl_hf.deploy.serve import Batcher, ServingSettings, server_config
from small_models import LABELS, picture, published

PORT_LINE = re.compile(r"running on http://127\.0\.0\.1:(\d+)")
PATIENCE = 60  # seconds after which a test fails that waits for something


@contextmanager
def served(classifier: Classifier, settings: ServingSettings | None = None) -> Iterator[str]:
    """The address of a server in a thread."""
    server = uvicorn.Server(server_config(classifier, settings, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(PATIENCE)


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


@contextmanager
def holding(obj: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """A method sets the first event when it is called, and waits for the second."""
    entered, go_on, method = threading.Event(), threading.Event(), getattr(obj, name)

    def waiting(*arguments: Any) -> Any:
        entered.set()
        assert go_on.wait(PATIENCE)
        return method(*arguments)

    monkeypatch.setattr(obj, name, waiting)
    try:
        yield entered, go_on
    finally:
        go_on.set()


def in_thread(work: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[threading.Thread, list[Any]]:
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(work(*arguments, **options)))
    thread.start()
    return thread, answers


def until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_full_queue_sends_clients_away_and_is_free_again(classifier, monkeypatch):
    body = json.dumps({"inputs": [TEXT, TEXT]})
    with (
        served(classifier, ServingSettings(max_queue=2)) as url,
        holding(classifier, "predict_unchecked", monkeypatch) as (entered, go_on),
    ):
        thread, answers = in_thread(post, url, body, "application/json")
        assert entered.wait(PATIENCE)
        status, headers, answer = post(url, body, "application/json")
        assert status == 503 and headers["retry-after"] == "1" and "try again" in answer["error"]
        go_on.set()
        thread.join(PATIENCE)
        assert answers[0][0] == 200
        assert post(url, body, "application/json")[0] == 200
        status, _, answer = post(url, json.dumps({"inputs": [TEXT] * 3}), "application/json")
        assert status == 413 and "inputs holds 3 images, but at most 2" in answer["error"]


def test_a_client_that_leaves_takes_no_place(classifier):
    with served(classifier, ServingSettings(max_queue=1)) as url:
        half_sent(url, IMAGE).close()
        assert post(url, IMAGE, "image/png")[0] == 200


def test_an_internal_error_reveals_nothing_about_the_server(folder, capsys):
    classifier = Classifier.from_pretrained(folder, device="cpu")
    classifier._network = torch.nn.Identity()
    with served(classifier) as url:
        status, _, answer = post(url, IMAGE, "image/png")
        assert status == 500 and answer["error"] == "Internal error; see the server log."
    assert "ValueError: not enough values to unpack" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ hostile clients


def test_stalled_clients_take_no_place_and_are_sent_away(classifier, monkeypatch, fault_record):
    monkeypatch.setattr("ccssl_hf.deploy.serve.STALL_SECONDS", 3)
    with served(classifier, ServingSettings(max_queue=4)) as url:
        stalled = [half_sent(url, IMAGE) for _ in range(300)]
        assert post(url, IMAGE, "image/png")[0] == 200
        for connection in stalled:
            assert b"408 Request Timeout" in connection.recv(4096)
            connection.close()
        assert post(url, IMAGE, "image/png")[0] == 200
    fault_record(
        "300 clients that send half an image and stop",
        "others are answered meanwhile; status 408 for the 300",
        "nothing",
    )


def test_slow_heads_and_idle_connections_are_closed(classifier, monkeypatch, fault_record):
    monkeypatch.setattr("ccssl_hf.deploy.limits.HEAD_SECONDS", 1)
    with served(classifier) as url:
        host, port = url.removeprefix("http://").split(":")

        def trickle(head: bytes, first: bytes = b"") -> bytes:
            """What a client gets that sends `first`, and then a byte now and then, until it is sent away."""
            with socket.create_connection((host, int(port)), timeout=60) as connection:
                connection.sendall(first)
                received = b""
                connection.settimeout(0.05)
                for number in itertools.count():
                    try:
                        if not (part := connection.recv(4096)):
                            return received
                        received += part
                    except TimeoutError:
                        with suppress(BrokenPipeError, ConnectionResetError):
                            connection.sendall(head[number : number + 1])
                    except ConnectionResetError:
                        return received
                raise AssertionError

        head = b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"X-Slow: 1\r\n" * 1000
        assert trickle(head) == b""
        assert trickle(b"") == b""
        # After a complete request, and within the body of a request that was answered.
        whole = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
        assert trickle(head, whole).startswith(b"HTTP/1.1 200")
        with_body = b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
        assert trickle(b"x" * 10_000, with_body).startswith(b"HTTP/1.1 405")
        connection = http.client.HTTPConnection(host, int(port))
        for _ in range(3):  # an honest client keeps its connection
            connection.request("POST", "/", IMAGE, {"Content-Type": "image/png"})
            answer = connection.getresponse()
            assert answer.status == 200 and answer.read()
        connection.close()
    fault_record("Clients that send the head of a request byte by byte", "closed after 10 s", "nothing")


def address(url: str, source: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60, source_address=(source, 0))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have one loopback address")
def test_a_client_has_a_share_of_connections_and_places(classifier, monkeypatch):
    settings = ServingSettings(max_connections=8, max_queue=4, client_share=0.5)
    with served(classifier, settings) as url, holding(classifier, "predict_unchecked", monkeypatch) as (entered, go_on):
        idle = [address(url, "127.0.0.2") for _ in range(4)]
        idle.append(address(url, "127.0.0.2"))
        assert idle[-1].recv(4096).startswith(b"HTTP/1.1 503")
        for connection in idle:
            connection.close()
        thread, answers = in_thread(post, url, json.dumps({"inputs": [TEXT] * 2}), "application/json")
        assert entered.wait(PATIENCE)
        assert post(url, IMAGE, "image/png")[0] == 503
        with address(url, "127.0.0.3") as other:
            head = f"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {len(IMAGE)}\r\n\r\n"
            other.sendall(head.encode() + IMAGE)
            go_on.set()
            assert other.recv(4096).startswith(b"HTTP/1.1 200")
        thread.join(PATIENCE)
        assert answers[0][0] == 200


def test_bodies_have_a_memory_in_all(classifier):
    with served(classifier, ServingSettings(max_image_mb=0.1, max_memory_mb=0.1)) as url:  # room for two bodies
        body = bytes(99_000)
        stalled = [half_sent(url, body) for _ in range(4)]
        for connection in stalled:
            connection.sendall(body[: len(body) // 2 - 1000])
        until(lambda: post(url, body, "image/png")[0] == 503)
        for connection in stalled:
            connection.close()
        until(lambda: post(url, IMAGE, "image/png")[0] == 200)


def test_large_images_are_decoded_one_after_the_other(classifier, monkeypatch):
    inside, most, pixels = [0], [0], classifier.pixels

    def counted(image: Image.Image) -> torch.Tensor:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.02)
        inside[0] -= 1
        return pixels(image)

    monkeypatch.setattr(classifier, "pixels", counted)
    monkeypatch.setattr("ccssl_hf.deploy.serve.os.cpu_count", lambda: 8)  # threads that decode
    with served(classifier, ServingSettings(max_decoding_mpx=5)) as url:
        for thread, answers in [in_thread(post, url, bomb(2_000), "image/png") for _ in range(8)]:
            thread.join(PATIENCE)
            assert answers[0][0] == 200
        assert most == [1]
        monkeypatch.setattr("ccssl_hf.deploy.limits.DECODE_SECONDS", 0.01)
        with holding(classifier, "pixels", monkeypatch) as (entered, go_on):
            thread, answers = in_thread(post, url, bomb(2_000), "image/png")
            assert entered.wait(PATIENCE)
            status, _, answer = post(url, bomb(2_000), "image/png")
            assert status == 503 and "too many large images" in answer["error"]
            go_on.set()
            thread.join(PATIENCE)
        assert answers[0][0] == 200
        assert post(url, bomb(2_000), "image/png")[0] == 200


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measures the memory of glibc")
def test_the_memory_of_large_images_is_bounded_and_returned(folder, fault_record):
    image = encoded(Image.new("RGB", (9400, 9500), (9, 200, 30)))
    assert len(image) < 350_000
    with command(folder) as (process, url):
        post(url, IMAGE, "image/png")
        memory = psutil.Process(process.pid).memory_info
        before, most = memory().rss, 0
        threads = [in_thread(post, url, image, "image/png") for _ in range(4)]
        while any(thread.is_alive() for thread, _ in threads):
            most = max(most, memory().rss)
            time.sleep(0.01)
        assert [answers[0][0] for _, answers in threads] == [200] * 4
        assert most - before < 600e6 and memory().rss - before < 150e6
    fault_record(
        "Four PNG files of 283 kB with 89 megapixels each, at once",
        "all are answered; the server decodes one at a time and returns the memory",
        "nothing",
    )


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP"])
def test_of_many_frames_the_first_is_classified(url, pipeline, kind):
    file, (first, *more) = io.BytesIO(), [picture(20, 20) for _ in range(40)]
    first.save(file, kind, save_all=True, append_images=more)
    status, answer = post_json(url, {"inputs": base64.b64encode(file.getvalue()).decode()})
    assert status == 200 and same(answer, pipeline(Image.open(file).convert("RGB")))


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n", b"200"),
        (b"DELETE / HTTP/1.1\r\nHost: x\r\n\r\n", b"405"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", b"400"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n", b"400"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", b"400"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\n" + bytes(200_000), b"413"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"400"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nBM\0\0POST / HTTP/1.1\r\n\r\n", b"400"),
        (b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + bytes(99_000) + b"\r\n\r\n", b"4"),
        (b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n\r\n", b"400"),
    ],
)
def test_requests_that_are_not_http_get_a_status_and_the_server_goes_on(url, request_, status):
    with address(url, "127.0.0.1") as connection:
        connection.sendall(request_)
        assert connection.recv(4096).startswith(b"HTTP/1.1 " + status)
    assert post(url, IMAGE, "image/png")[0] == 200


def test_deep_and_long_json_gets_a_sentence(url):
    for body, status in (
        (b'{"inputs": ' + b"[" * 60_000 + b"]" * 60_000 + b"}", 400),
        (b'{"inputs": [' + b"1," * 60_000 + b"1]}", 413),
        (b'{"inputs": ' + b"1" * 100_000 + b"}", 400),
        (b'{"inputs": "\xc3\x28"}', 400),
        (b'{"inputs": {"a": {}}}', 400),
        (b'{"inputs": "' + TEXT.encode() + b'", "parameters": {"top_k": 1e400}}', 422),
    ):
        answer = post(url, body, "application/json")
        assert answer[0] == status and list(answer[2]) == ["error"], answer


def test_five_hundred_clients_at_once(classifier):
    with served(classifier) as url:
        host = {"Host": "x", "Content-Type": "image/png"}
        clients = [http.client.HTTPConnection(url.removeprefix("http://"), timeout=60) for _ in range(500)]
        for client in clients:
            client.request("POST", "/", IMAGE, host)
        assert {client.getresponse().status for client in clients} == {200}
        for client in clients:
            client.close()


# ------------------------------------------------------------------------------------------------------------- batching


def test_what_waits_goes_together_and_each_gets_its_own():
    sizes: list[int] = []
    entered, go_on = threading.Event(), threading.Event()

    def predict(images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        entered.set()
        assert go_on.wait(PATIENCE)
        return images.flatten(1)[:, :1].float()

    batcher = Batcher(predict, max_batch_size=4, max_wait_ms=0)
    images = [torch.full((3, 2, 2), number, dtype=torch.uint8) for number in range(9)]
    with batcher.running(1):
        answers = [batcher.submit(images[0])]
        assert entered.wait(PATIENCE)
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
    ("clients", "requests"), [(16, 80), pytest.param(64, 2000, marks=pytest.mark.slow)], ids=["16x80", "64x2000"]
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


@contextmanager
def command(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process of `ccssl-hf serve`, and its address."""
    line = [sys.executable, "-c", "from ccssl_hf.cli import app; app()", "serve", str(folder), "--port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*line, "--device", "cpu"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    ends = threading.Timer(2 * PATIENCE, process.kill)
    ends.start()
    try:
        yield process, f"http://127.0.0.1:{line_with(process, PORT_LINE.search)[1]}"
    finally:
        ends.cancel()
        process.kill()
        process.wait(PATIENCE)


def test_the_command_serves_and_ends_when_all_is_answered(folder, pipeline, tmp_path):
    with command(folder) as (process, url):
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
