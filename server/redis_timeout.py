"""A bound on how long a request waits for Redis."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from engine.errors import QueueUnavailable

REDIS_TIMEOUT_S = 0.8  # of a Redis that is cut off without a reset: a client hears within a second
SOURCE_BYTES_PER_S = 20e6  # that a link to Redis carries at least: large pictures get so much more time

T = TypeVar("T")


async def with_redis_timeout(asked: Awaitable[T], size: int = 0) -> T:
    """What Redis says, if it says it while a client or a probe can wait.

    Args:
        size: of what it is sent, in bytes, where that is large.

    Raises:
        QueueUnavailable: it took longer than `REDIS_TIMEOUT_S`, and what the size takes.
    """
    timeout_s = REDIS_TIMEOUT_S + size / SOURCE_BYTES_PER_S
    try:
        async with asyncio.timeout(timeout_s):
            return await asked
    except TimeoutError:
        raise QueueUnavailable(f"no answer from Redis within {timeout_s:.1f} s") from None
