"""A Hugging Face Hub on loopback: the HTTP API as far as huggingface_hub, transformers, timm and datasets call it.

Repositories are held in memory. What the Hub keeps with LFS comes from another host name (localhost for 127.0.0.1), as
it comes from a CDN there: the client looks at such a redirect, and sends no token along. `python -m hub_server PORT`
in `tests/` serves one by itself.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from .api import TOKENS, answer_error, routes
from .store import HubError, Repo

__all__ = ["TOKENS", "Hub", "Repo", "open_port"]


@dataclass(frozen=True)
class Failure:
    """Requests whose `METHOD /path` a pattern finds are refused, but for the first few."""

    pattern: re.Pattern[str]
    allowed: list[None]
    status: int


class Hub:
    """The state of the server, and the server in a thread of its own.

    Attributes:
        url: Where clients find it.
        requests: `METHOD /path STATUS` of all that was asked.
        repos: (kind, name) to repository.
        uploads: What was sent by LFS, by its SHA-256.
    """

    def __init__(self, port: socket.socket) -> None:
        self.url = f"http://127.0.0.1:{port.getsockname()[1]}"
        self.cdn = self.url.replace("127.0.0.1", "localhost")
        self.requests: list[str] = []
        self.repos: dict[tuple[str, str], Repo] = {}
        self.uploads: dict[str, bytes] = {}
        self.failures: list[Failure] = []
        self._port = port
        app = Starlette(routes=routes(), exception_handlers={HubError: answer_error})
        app.state.hub = self
        self._server = uvicorn.Server(uvicorn.Config(self._watched(app), log_level="warning", lifespan="off"))

    def start(self) -> Hub:
        threading.Thread(target=self.serve, daemon=True).start()
        while not self._server.started:
            time.sleep(0.01)
        return self

    def serve(self) -> None:
        self._server.run(sockets=[self._port])

    def stop(self) -> None:
        self._server.should_exit = True

    def repo(self, name: str, kind: str = "model") -> Repo:
        return self.repos[kind, name]

    def environment(self, home: Path, user: str | None = "anna") -> dict[str, str]:
        """What a process needs to take this for the Hub, with `home` for its caches; `user` is who it is there."""
        variables = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        return {**variables, "HF_TOKEN": TOKENS[user] if user else ""}

    @contextmanager
    def failing(self, pattern: str, *, after: int = 0, status: int = 400) -> Iterator[None]:
        """Within the block, requests whose `METHOD /path` the regular expression finds are refused.

        Args:
            pattern: Such as `"PUT /_lfs/"` or `"POST .*/commit/"`.
            after: How many of them pass before.
            status: With 5xx the client tries again for half a minute; with 4xx it gives up.
        """
        failure = Failure(re.compile(pattern), [None] * after, status)
        self.failures.append(failure)
        try:
            yield
        finally:
            self.failures.remove(failure)

    def _refusal(self, request: str) -> HubError | None:
        for failure in self.failures:
            if failure.pattern.search(request):
                if not failure.allowed:
                    return HubError(failure.status, None, "This request was made to fail.")
                failure.allowed.pop()
        return None

    def _watched(self, app: Starlette) -> Any:
        """The app behind the list of requests and the failures that were asked for."""

        async def watched(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                return await app(scope, receive, send)
            request = f"{scope['method']} {scope['path']}"

            async def noted(message: Message) -> None:
                if message["type"] == "http.response.start":
                    self.requests.append(f"{request} {message['status']}")
                await send(message)

            refusal = self._refusal(request)
            if refusal is None:
                return await app(scope, receive, noted)
            await Request(scope, receive).body()  # else the client may find the line cut while it sends
            await (await answer_error(Request(scope), refusal))(scope, receive, noted)

        return watched


def open_port(port: int = 0) -> socket.socket:
    """A socket on loopback, bound but not yet listening; on a free port where it is 0."""
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(("127.0.0.1", port))
    return bound
