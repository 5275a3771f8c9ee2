"""Image data that is held only while the client reads it."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from engine.errors import GlimmerError
from engine.jobs.connection import REDIS_OUTAGE_TIMEOUT_S, retry_while_away
from server.admission.memory_budget import Hold
from server.errors import ApiError
from server.redis_timeout import with_redis_timeout

PIECE_BYTES = 96 * 1024  # a multiple of 3, for base64
UNREAD_S = 0.1
ROOM_TIMEOUT_S, ROOM_POLL_S = 30.0, 0.1


T = TypeVar("T")


class ResultLost(GlimmerError):
    """The data is no longer in Redis."""


async def call_redis(call: Callable[[], Coroutine[Any, Any, T]], size: int = 0, *, patient: bool) -> T:
    """Await a call that transfers `size` bytes; if `patient`, wait for Redis to come back."""
    if patient:
        return await retry_while_away(call, REDIS_OUTAGE_TIMEOUT_S)
    return await with_redis_timeout(call(), size)


async def reserve(held: Hold, size: int, *, patient: bool) -> None:
    """Count `size` bytes; if `patient`, wait for room. Raise the `ApiError` of the memory budget without it."""
    give_up_at = time.monotonic() + ROOM_TIMEOUT_S
    while True:
        try:
            return held.resize(size)
        except ApiError:
            if not patient or time.monotonic() > give_up_at:
                raise
        await asyncio.sleep(ROOM_POLL_S)


class HeldImage:
    """An image in Redis, counted in the memory budget while it is here.

    It is dropped when the client takes no piece for `UNREAD_S`, and read again when it does. The time doubles, so that
    a client that reads slowly costs Redis few reads.

    Args:
        read: returns None if the data is gone.
        held: of one response, for its images in turn.
    """

    def __init__(self, read: Callable[[], Coroutine[Any, Any, bytes | None]], size: int, held: Hold) -> None:
        self._read, self._held = read, held
        self.size = size
        self._data: bytes | None = None
        self._unread_s = UNREAD_S

    async def load(self, *, patient: bool) -> bytes:
        """Return the data. If `patient`, wait for room and for Redis.

        Raises:
            ApiError: no room in the memory budget.
            QueueUnavailable: Redis is away.
            ResultLost: it has other data, or none.
        """
        if self._data is None:
            await reserve(self._held, self.size, patient=patient)
            try:
                self._data = data = await self._read_checked(patient=patient)
            finally:
                if self._data is None:
                    self._held.resize(0)
            return data
        return self._data

    async def _read_checked(self, *, patient: bool) -> bytes:
        data = await call_redis(self._read, self.size, patient=patient)
        if data is None or len(data) != self.size:
            raise ResultLost("the data of an image is no longer in Redis")
        return data

    def drop(self) -> None:
        """Free the data; `load` reads it again."""
        if self._data is not None:
            self._data = None
            self._unread_s *= 2
            self._held.resize(0)

    async def pieces(self, encode: Callable[[memoryview], bytes] = bytes) -> AsyncGenerator[bytes]:
        """Yield the data in pieces of `PIECE_BYTES`, encoded; then drop it. Raises as a patient `load`."""
        loop = asyncio.get_running_loop()
        try:
            for start in range(0, self.size, PIECE_BYTES):
                data = await self.load(patient=True)
                piece = encode(memoryview(data)[start : start + PIECE_BYTES])
                del data
                timer = loop.call_later(self._unread_s, self.drop)
                try:
                    yield piece
                finally:
                    timer.cancel()
                await asyncio.sleep(0)  # encoding a piece takes 0.1 ms: let others run
        finally:
            self.drop()
