"""Connecting to Redis and mapping its errors."""

import asyncio
import logging
import math
import re
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar
from urllib.parse import urlsplit

import redis.asyncio
from redis.asyncio import BlockingConnectionPool, SSLConnection
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import DataError, MasterDownError, OutOfMemoryError, ReadOnlyError, RedisError, TryAgainError
from redis.exceptions import TimeoutError as RedisTimeoutError

from engine.errors import QueueReadOnly, QueueUnavailable, StartError
from engine.jobs.masters import MASTER_SCHEME, master_options
from engine.observability.logs import event

logger = logging.getLogger("glimmer.queue")
T = TypeVar("T")

RETRY_INTERVAL_S = 0.5
REDIS_OUTAGE_TIMEOUT_S = 30.0  # a restart takes some seconds

_PATHS = {"unix": r"/.+", "redis+sentinel": r"/[\w.-]+(/\d*)?", "rediss+sentinel": r"/[\w.-]+(/\d*)?"}
_DATABASE_PATH = r"/?|/\d+"

_MAX_CONNECTIONS = 64  # keeps Redis busy; further callers wait

# Refusals of writes. Redis 6 wraps those of scripts: only the text has the code.
_REFUSAL_CLASSES = (OutOfMemoryError, ReadOnlyError, MasterDownError)
_REFUSAL_CODES = ("-OOM", "MISCONF", "-READONLY", "-MASTERDOWN", "NOREPLICAS")

# Other errors (NOPERM, WRONGTYPE, an error in a script) need an operator.
_TEMPORARY_CODES = (["BUSY"], ["LOADING"], ["UNBLOCKED"])
_REPORT_AGAIN_S = 60.0


def connect(url: str) -> redis.asyncio.Redis:
    """Return a client of the Redis at a URL; it retries for half a second (a proxy's restart).

    Args:
        url: `redis[s]://`, `unix://`, `redis[s]+sentinel://` or `redis[s]+cluster://`.

    Raises:
        StartError: invalid URL; not quoted, since it may hold a password.
    """
    try:
        parts = urlsplit(url)
        if not re.fullmatch(_PATHS.get(parts.scheme, _DATABASE_PATH), parts.path):
            raise ValueError
        if MASTER_SCHEME.fullmatch(parts.scheme):
            options = master_options(parts.scheme, parts.netloc, parts.path, parts.query)
        else:
            options = dict(parse_url(url))
        pool = BlockingConnectionPool(
            **{
                "max_connections": _MAX_CONNECTIONS,
                "timeout": 5,  # seconds until a connection is free
                "retry": Retry(ExponentialWithJitterBackoff(base=0.05, cap=0.3), 3),
                "socket_timeout": 5,
                "socket_connect_timeout": 2,
                **({} if parts.scheme == "unix" else {"socket_keepalive": True}),
                **options,
            }
        )
        connection = pool.make_connection()  # checks the options after the ?
        if pool.connection_kwargs.get("decode_responses") or int(pool.connection_kwargs.get("db") or 0) < 0:
            raise ValueError
    except (ValueError, TypeError, AttributeError, OSError, RedisError):
        raise StartError(
            "GLIMMER_REDIS_URL is not valid; write it like redis://host:6379/0, rediss://:password@host:6379/0, "
            "unix:///path/redis.sock, redis+sentinel://:password@host:26379,host:26379/master/0 or "
            "redis+cluster://:password@host:6379,host:6379, special characters of a password as in %2F"
        ) from None
    if isinstance(connection, SSLConnection):
        try:
            connection.ssl_context.get()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise StartError(f"GLIMMER_REDIS_URL: its ssl_... files cannot be used ({reason})") from None
    return redis.asyncio.Redis.from_pool(pool)


@contextmanager
def redis_errors() -> Iterator[None]:
    """Raise `QueueUnavailable` if Redis is away, `QueueReadOnly` if it refuses writes."""
    try:
        yield
    except (RedisConnectionError, RedisTimeoutError, OSError) as error:
        _report(type(error).__name__, error, logging.WARNING)
        raise QueueUnavailable(f"Redis cannot be reached: {error}") from error
    except DataError:
        raise  # a value that cannot be sent
    except RedisError as error:
        if isinstance(error, _REFUSAL_CLASSES) or any(code in str(error) for code in _REFUSAL_CODES):
            _report("read-only", error, logging.WARNING)
            raise QueueReadOnly(f"Redis does not accept writes: {error}") from error
        code = str(error).split(maxsplit=1)[:1]
        is_temporary = code in _TEMPORARY_CODES or isinstance(error, TryAgainError)
        _report(f"{type(error).__name__} {code}", error, logging.WARNING if is_temporary else logging.ERROR)
        raise QueueUnavailable(f"Redis answers with an error: {error}") from error


_reported_at: dict[str, float] = {}  # monotonic seconds, by kind


def _report(kind: str, error: Exception, level: int) -> None:
    """Log an error, once while its kind goes on."""
    now = time.monotonic()
    if now - _reported_at.get(kind, -math.inf) > _REPORT_AGAIN_S:
        event(logger, "queue_unavailable", level, reason=str(error))
    _reported_at[kind] = now


async def retry_while_away(call: Callable[[], Awaitable[T]], outage_timeout_s: float) -> T:
    """Await a call; repeat it for `outage_timeout_s` while Redis is away."""
    give_up_at = time.monotonic() + outage_timeout_s
    while True:
        try:
            with redis_errors():
                return await call()
        except QueueUnavailable:
            if time.monotonic() >= give_up_at:
                raise
        await asyncio.sleep(RETRY_INTERVAL_S)
