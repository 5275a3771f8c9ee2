"""A timeout for Redis calls."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from engine.errors import QueueUnavailable

REDIS_TIMEOUT_S = 0.8  # even if the connection hangs, a client gets a 503 within a second
SOURCE_BYTES_PER_S = 20e6  # minimum bandwidth to Redis, for large images

T = TypeVar("T")


async def with_redis_timeout(call: Awaitable[T], size: int = 0) -> T:
    """Await a call that sends `size` bytes, if many; raise `QueueUnavailable` after the timeout."""
    timeout_s = REDIS_TIMEOUT_S + size / SOURCE_BYTES_PER_S
    try:
        async with asyncio.timeout(timeout_s):
            return await call
    except TimeoutError:
        raise QueueUnavailable(f"no response from Redis within {timeout_s:.1f} s") from None
