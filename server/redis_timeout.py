import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from engine.errors import QueueUnavailable
from engine.tasks import retrieve

REDIS_TIMEOUT_S = 0.8  # a client gets a 503 within a second
SOURCE_BYTES_PER_S = 20e6  # minimum bandwidth to Redis, for large images
MAX_ABANDONED = 64  # bounds the memory and connections of calls that hang

T = TypeVar("T")

_abandoned: "set[asyncio.Task[Any]]" = set()


async def with_redis_timeout(call: Coroutine[Any, Any, T], size: int = 0) -> T:
    """Await a call that sends `size` bytes; raise `QueueUnavailable` after the timeout.

    The call is cancelled but not awaited: Python 3.11 and the client can swallow a cancellation and read on for 20 s.
    While `MAX_ABANDONED` are left, further calls fail at once.
    """
    if len(_abandoned) >= MAX_ABANDONED and len(_still_running()) >= MAX_ABANDONED:
        call.close()
        raise QueueUnavailable(f"{MAX_ABANDONED} calls wait for a response from Redis")
    timeout_s = REDIS_TIMEOUT_S + size / SOURCE_BYTES_PER_S
    task = asyncio.create_task(call)
    try:
        await asyncio.wait((task,), timeout=timeout_s)
    finally:
        if not task.done():
            _abandon(task)
    if not task.done():
        raise QueueUnavailable(f"no response from Redis within {timeout_s:.1f} s")
    return task.result()


def _abandon(task: "asyncio.Task[Any]") -> None:
    task.cancel()
    _abandoned.add(task)
    task.add_done_callback(_forget)


def _forget(task: "asyncio.Task[Any]") -> None:
    _abandoned.discard(task)
    retrieve(task)


def _still_running() -> "set[asyncio.Task[Any]]":
    """Return the abandoned calls, without those of event loops that have ended."""
    for task in [task for task in _abandoned if task.get_loop().is_closed()]:
        _abandoned.discard(task)
    return _abandoned
