"""Waiting for what has no event: other processes and threads, and what ends up in Redis."""

import asyncio
import inspect
from collections.abc import Callable


async def until(condition: Callable[[], object], seconds: float | None = 5.0) -> None:
    """Returns when the condition, which may have to be awaited, is true.

    Raises:
        TimeoutError: it did not within so many seconds; None waits for ever.
    """
    async with asyncio.timeout(seconds):
        while True:
            held = condition()
            if await held if inspect.isawaitable(held) else held:
                return
            await asyncio.sleep(0.01)
