"""Polling for conditions in other processes, threads and Redis."""

import asyncio
import inspect
from collections.abc import Callable


async def until(condition: Callable[[], object], seconds: float | None = 5.0) -> None:
    """Wait until the condition, which may return an awaitable, is true.

    Args:
        seconds: timeout; None waits forever.

    Raises:
        TimeoutError: it stayed false.
    """
    async with asyncio.timeout(seconds):
        while True:
            result = condition()
            if await result if inspect.isawaitable(result) else result:
                return
            await asyncio.sleep(0.01)
