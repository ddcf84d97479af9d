"""What all tests share: the mark for tests that need the reference data, and a Hub on loopback.

No test reaches the real Hub: before anything is imported that reads these variables, its address is one on loopback,
where a server listens once a test asks for the fixture `hub`; its caches and its token are a folder's that goes away.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hub_server import Hub, open_port

_PORT = open_port()
_HOME = tempfile.mkdtemp(prefix="hf-home-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
atexit.register(_PORT.close)
os.environ |= {"HF_ENDPOINT": f"http://127.0.0.1:{_PORT.getsockname()[1]}", "HF_HOME": _HOME, "HF_HUB_DISABLE_XET": "1"}
os.environ.pop("HF_TOKEN", None)

SHARED = Path(__file__).resolve().parents[2] / "shared"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="needs the reference data in ../shared, which is not part of the repository"
)


@pytest.fixture(scope="session")
def hub() -> Iterator[Hub]:
    """The Hub of this test session: this process and those it starts take it for the real one.

    A process of another cache or user gets `hub.environment(home, user)` on top of `os.environ`; calls in this process
    pass `token=TOKENS["anna"]`. Repositories stay for the session: give each test names of its own.
    """
    server = Hub(_PORT).start()
    yield server
    server.stop()
