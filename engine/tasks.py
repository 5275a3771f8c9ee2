import asyncio
from typing import Any


async def stop(task: asyncio.Future[Any]) -> None:
    """Cancel a task until it ends; drop its exception.

    Python 3.11's `asyncio.wait_for` can swallow a cancellation.
    """
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=0.1)
    retrieve(task)


def retrieve(task: asyncio.Future[Any]) -> None:
    """Mark the exception of an ended task as retrieved: asyncio logs one that nothing awaits."""
    if not task.cancelled():
        task.exception()
