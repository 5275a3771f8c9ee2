"""How Redis is reached, and how its ways of being away become one error."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import redis.asyncio
from redis.asyncio import BlockingConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import MasterDownError, OutOfMemoryError, ReadOnlyError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from engine.errors import QueueReadOnly, QueueUnavailable

T = TypeVar("T")

RETRY_INTERVAL_S = 0.5
REDIS_OUTAGE_TIMEOUT_S = 30.0  # for accepted jobs: a restart of Redis takes seconds

# Enough to keep Redis busy from one process. More callers than that take turns instead of failing.
_MAX_CONNECTIONS = 64

# Refusals that pass by themselves. Redis 7 sends them as errors of their own, some of which redis-py has classes for;
# out of a script Redis 6 sends them wrapped in "Error running script", where only the text tells.
_REFUSAL_CLASSES = (OutOfMemoryError, ReadOnlyError, MasterDownError)
_REFUSAL_CODES = ("-OOM", "MISCONF", "-READONLY", "-MASTERDOWN", "NOREPLICAS")


def connect(url: str) -> redis.asyncio.Redis:
    """A client for the queue. Its owner closes it (`aclose`), after the queue.

    A dropped connection is retried for about half a second, which bridges a restart of a proxy; after that the caller
    gets `QueueUnavailable` and decides for itself (the API answers 503, an engine tries again).

    Args:
        url: `redis://`, `rediss://` or `unix://`.
    """
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=_MAX_CONNECTIONS,
        timeout=5,  # seconds to wait for a free connection
        retry=Retry(ExponentialWithJitterBackoff(base=0.05, cap=0.3), 3),
        socket_timeout=5,
        socket_connect_timeout=2,
        **({} if url.startswith("unix:") else {"socket_keepalive": True}),
    )
    return redis.asyncio.Redis.from_pool(pool)


@contextmanager
def redis_errors() -> Iterator[None]:
    """Raises `QueueUnavailable` for every way in which Redis can be away, `QueueReadOnly` where it refuses writes."""
    try:
        yield
    except (RedisConnectionError, RedisTimeoutError, OSError) as error:
        raise QueueUnavailable(f"Redis cannot be reached: {error}") from error
    except ResponseError as error:
        if isinstance(error, _REFUSAL_CLASSES) or any(code in str(error) for code in _REFUSAL_CODES):
            raise QueueReadOnly(f"Redis does not accept writes: {error}") from error
        raise


async def retry_while_away(call: Callable[[], Awaitable[T]], outage_timeout_s: float) -> T:
    """Await a Redis call, again every `RETRY_INTERVAL_S` seconds while Redis is away.

    Raises:
        QueueUnavailable: Redis was still away after `outage_timeout_s` seconds.
    """
    give_up_at = time.monotonic() + outage_timeout_s
    while True:
        try:
            with redis_errors():
                return await call()
        except QueueUnavailable:
            if time.monotonic() >= give_up_at:
                raise
        await asyncio.sleep(RETRY_INTERVAL_S)
