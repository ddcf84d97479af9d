"""What one client, and all clients together, may take of a server: connections, time, memory."""

from __future__ import annotations

import asyncio
import ctypes
import io
import math
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import anyio
import h11
from PIL import Image
from uvicorn.protocols.http.h11_impl import H11Protocol

from .handler import FORMATS

HEAD_SECONDS = 10  # for the head of a request to arrive, and for the rest of a body after its answer
DECODE_SECONDS = 30  # that an image waits for memory to decode it
SMALL_PIXELS = 1 << 21  # an image below is decoded without waiting

_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Quota:
    """An amount that all requests share. One client, known by its address, gets at most `share` of it."""

    def __init__(self, total: int, share: float, *, at_least: int = 1) -> None:
        self.total, self.per_client = max(total, at_least), max(math.ceil(total * share), at_least)
        self._used: Counter[str] = Counter()

    def take(self, client: str, amount: int) -> bool:
        """Take an amount, if there is that much."""
        if self._used.total() + amount > self.total or self._used[client] + amount > self.per_client:
            return False
        self._used[client] += amount
        return True

    def give_back(self, client: str, amount: int) -> None:
        """Give back an amount that was taken."""
        self._used[client] -= amount
        if not self._used[client]:
            del self._used[client]

    @contextmanager
    def lending(self, client: str) -> Iterator[Callable[[int], bool]]:
        """A function that takes an amount, if there is that much. All of it is given back at the end."""
        held = 0

        def take(amount: int) -> bool:
            nonlocal held
            taken = self.take(client, amount)
            held += amount * taken
            return taken

        try:
            yield take
        finally:
            self.give_back(client, held)


class LimitedProtocol(H11Protocol):
    """HTTP connections of uvicorn, of which each client has a limited number, and limited time to say what it wants."""

    def __init__(self, *args: Any, connections: Quota, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._quota, self._counted = connections, False
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._address = self.client[0] if self.client else ""
        self._counted = self._quota.take(self._address, 1)
        if self._counted:
            self._watch()
        else:
            transport.write(_BUSY)
            transport.close()

    def data_received(self, data: bytes) -> None:
        if self._counted:
            super().data_received(data)
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._counted:
            self._quota.give_back(self._address, 1)
        super().connection_lost(exc)

    def _is_idle(self) -> bool:
        """Whether the head of a request is missing, or only the rest of a body that was answered."""
        return self.conn.their_state is h11.IDLE or self.conn.our_state in (h11.DONE, h11.MUST_CLOSE)

    def _watch(self) -> None:
        """Start the clock when the connection becomes idle. More bytes do not reset it, a request stops it."""
        if not self._is_idle() and self._timer is not None:
            self._timer.cancel()
            self._timer = None
        elif self._is_idle() and self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self._time_is_over)

    def _time_is_over(self) -> None:
        self._timer = None
        if self._is_idle():
            self.transport.close()


class PixelBudget:
    """Pixels that are decoded at the same time. An image waits for its share, first come, first served."""

    def __init__(self, pixels: int) -> None:
        self._all = self._free = pixels
        self._turn, self._freed = asyncio.Lock(), asyncio.Event()

    @asynccontextmanager
    async def held(self, pixels: int) -> AsyncIterator[None]:
        """Hold the pixels of an image. Raises TimeoutError if there are too few for `DECODE_SECONDS`."""
        pixels = min(pixels, self._all)
        with anyio.fail_after(DECODE_SECONDS):
            async with self._turn:
                while self._free < pixels:
                    self._freed.clear()
                    await self._freed.wait()
                self._free -= pixels
        try:
            yield
        finally:
            self._free += pixels
            self._freed.set()


def pixel_count(content: bytes) -> int:
    """The number of pixels in the header of an image; 0 if it cannot be read."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return image.width * image.height
    except Exception:  # Pillow raises nearly any type; reading the image says what is wrong
        return 0


def return_memory() -> None:
    """Return freed memory to the system. glibc keeps that of large images otherwise."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
