"""What reaches the Hub, seen by a server that speaks as much of its language as an upload needs."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForImageClassification

from tiny_runs import copy_of, different, model_of, trainer_of

TOKEN = "hf_thisIsASecretOfTheUser"
PLAIN = {"README.md", "config.json", "model.safetensors"}


class Hub(ThreadingHTTPServer):
    """Keeps the commits to any repository: message, and content by path."""

    def __init__(self) -> None:
        super().__init__(("localhost", 0), Requests)
        self.commits: list[tuple[str, dict[str, bytes]]] = []
        self.url = f"http://localhost:{self.server_port}"

    @property
    def files(self) -> dict[str, bytes]:
        return {path: content for _, files in self.commits for path, content in files.items()}


class Requests(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Authorization"] != f"Bearer {TOKEN}" and "validate-yaml" not in self.path:
            return self.answer({"error": "no such user"}, 401)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            return self.answer({"url": f"{self.server.url}/{asked.get('organization', 'anna')}/{asked['name']}"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            return self.answer(
                {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
            )
        assert "/commit/" in self.path, self.path
        lines = [json.loads(line) for line in body.splitlines()]
        message = next(line["value"]["summary"] for line in lines if line["key"] == "header")
        files = [line["value"] for line in lines if line["key"] == "file"]
        self.server.commits.append((message, {file["path"]: base64.b64decode(file["content"]) for file in files}))
        return self.answer({"commitUrl": f"{self.server.url}/anna/digits/commit/0", "commitOid": "0", "success": True})

    def answer(self, content: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # it may know another address
    yield server
    server.shutdown()
    server.server_close()


def trained(folder: Path, **changes: Any) -> Any:
    changes = {"hub_model_id": "anna/digits", "hub_token": TOKEN, "max_steps": 2, **changes}
    trainer = trainer_of(folder, model_of("test_resnet"), **changes)
    trainer.train()
    return trainer


def assert_no_secret(hub: Hub, folder: Path) -> None:
    written = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in content for content in [*written, *hub.files.values()])
    assert not any("training_args" in name for name in [*hub.files, *(path.name for path in folder.rglob("*"))])


def test_a_push_is_the_plain_folder_and_its_card(hub, tmp_path):
    trainer = trained(tmp_path / "run", save_strategy="steps", save_steps=1)
    assert hub.commits == []
    trainer.push_to_hub(commit_message="Digits", license="apache-2.0", tags=["digits"])
    [(message, files)] = hub.commits
    assert message == "Digits" and files.keys() == PLAIN
    assert_no_secret(hub, tmp_path)

    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "apache-2.0" and "digits" in card.data.tags and "anna/digits" in card.text
    # Loaded as any model is, the published weights are the averaged ones.
    state = copy_of(AutoModelForImageClassification.from_pretrained(tmp_path))
    average = {f"timm_model.{name}": tensor for name, tensor in copy_of(trainer.ema.module.backbone).items()}
    assert different(state, average) == []


def test_a_push_takes_the_heads_along_when_asked_to(hub, tmp_path):
    trained(tmp_path / "run").push_to_hub(with_head=True)
    assert hub.files.keys() == {*PLAIN, "ccssl_head.safetensors"}


def test_save_model_pushes_where_the_arguments_say_so(hub, tmp_path):
    trainer = trained(tmp_path / "run", push_to_hub=True, hub_strategy="end", save_strategy="steps", save_steps=1)
    assert hub.commits == []
    trainer.save_model()
    assert [message for message, _ in hub.commits] == ["Model save"] and hub.files.keys() == PLAIN
    assert_no_secret(hub, tmp_path)


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_checkpoints_are_pushed_while_a_run_goes_on(hub, tmp_path, strategy):
    trained(
        tmp_path / "run",
        push_to_hub=True,
        hub_strategy=strategy,
        hub_always_push=True,
        save_strategy="steps",
        save_steps=1,
    )
    plain = {"config.json", "model.safetensors"}
    folders = {"every_save": [], "checkpoint": ["last-checkpoint"], "all_checkpoints": ["checkpoint-1", "checkpoint-2"]}
    names = {path.name for path in (tmp_path / "run" / "checkpoint-1").iterdir()}
    assert hub.files.keys() == plain | {f"{folder}/{name}" for folder in folders[strategy] for name in names}
    assert {"training_state.safetensors", "optimizer.pt", "trainer_state.json"} <= names
    assert all(message.startswith("Training in progress, step") for message, _ in hub.commits)
    assert_no_secret(hub, tmp_path)


def test_our_own_backbone_brings_its_code_along(hub, tmp_path):
    trainer = trainer_of(tmp_path / "run", hub_model_id="anna/digits", hub_token=TOKEN, max_steps=1)
    trainer.push_to_hub()
    assert hub.files.keys() == {*PLAIN, "wide_resnet_cifar.py"}
