import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


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


async def gather_all(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Await all, then return the results or raise the first exception: nothing runs on behind the caller."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results  # pyright: ignore[reportReturnType]
