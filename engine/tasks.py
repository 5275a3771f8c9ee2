"""Ending tasks for good. No torch."""

import asyncio
from typing import Any


async def stop(task: asyncio.Future[Any]) -> None:
    """Returns when the task has ended. Once may not do: on Python 3.11 `asyncio.wait_for`, which the Redis client uses,
    swallows a cancellation that comes just as it finishes."""
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=0.1)
    if not task.cancelled():
        task.exception()  # whoever stops it has left its failure behind
