"""Refuse new jobs before Redis is full, so that others can end."""

from engine.jobs.job import MemoryUse
from engine.jobs.producer import JobProducer
from server.admission.queue_state import SharedRead
from server.errors import unavailable

HIGH_WATER = 0.85  # of `maxmemory`; the rest is for running jobs
KEPT_PART = 0.8  # of `maxmemory`, for source images, records, results and cached plans
CACHE_TTL_S = 0.5
RETRY_S = 5


class RedisMemory:
    """The memory of Redis, read once for many requests. Methods raise `QueueUnavailable`."""

    def __init__(self, queue: JobProducer) -> None:
        self._use = SharedRead(lambda: queue.memory_use(), CACHE_TTL_S)

    async def is_full(self) -> bool:
        """Return whether new jobs are refused."""
        return _is_full(await self._use.get())

    async def max_kept_bytes(self) -> int | None:
        """Return what jobs may keep, None without `maxmemory`; raise a 503 at the high-water mark."""
        use = await self._use.get()
        if _is_full(use):
            raise unavailable(f"The job queue is nearly out of memory; try again in {RETRY_S} s.", RETRY_S)
        return None if use.maximum is None else round(KEPT_PART * use.maximum - use.max_plan_bytes)


def _is_full(use: MemoryUse) -> bool:
    return use.maximum is not None and use.used > HIGH_WATER * use.maximum
