"""Shared by all tests: the mark for tests that need the reference data, and a Hub on loopback.

No test reaches the real Hub. The environment variables for its address, caches and token are changed before any module
reads them: the address is on loopback, where the fixture `hub` starts a server, and the caches are temporary.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import reliability
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
    """The Hub for this process and the processes that it starts.

    A process with another cache or user gets `hub.environment(home, user)` on top of `os.environ`. Calls in this
    process pass `token=TOKENS["anna"]`. Repositories live until the tests end: use other names in each test.
    """
    server = Hub(_PORT).start()
    yield server
    server.stop()


@pytest.fixture
def fault_record(request: pytest.FixtureRequest) -> Callable[[str, str, str], None]:
    """Adds a row to docs/reliability.md: a fault, what happened, and what was lost. Call it after the assertions."""

    def record(fault: str, what_happened: str, lost: str) -> None:
        request.node.user_properties.append(("fault", (fault, what_happened, lost)))

    return record


_RECORDER = reliability.Recorder()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _RECORDER.add(report)


def pytest_sessionfinish(session: Any, exitstatus: int) -> None:
    if not hasattr(session.config, "workerinput"):  # the process that collects the reports of all workers
        reliability.finish(session, _RECORDER, exitstatus)
