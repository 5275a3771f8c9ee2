"""Takes back, in the background, jobs that nobody waits for: an engine's time is too dear to finish them."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from engine.errors import QueueUnavailable
from engine.jobs.connection import REDIS_OUTAGE_TIMEOUT_S, retry_while_away
from engine.jobs.job import JobState
from engine.jobs.producer import JobProducer
from server.metrics import Metrics

CLOSE_TIMEOUT_S = 2.0  # what the shutdown of the server leaves for those under way


class AbandonedJobs:
    """The abandoned jobs of one API process."""

    def __init__(self, queue: JobProducer, metrics: Metrics) -> None:
        self._queue, self._metrics = queue, metrics
        self._under_way: set[asyncio.Task[None]] = set()

    def discard(self, job_id: str, then: Callable[[], Awaitable[None]] | None = None) -> None:
        """Has the job withdrawn as soon as Redis allows, whether its submit has arrived there or not; never raises.

        Args:
            then: done after that, when it is certain that nothing comes of the job.
        """
        task = asyncio.create_task(self._discard(job_id, then))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def close(self) -> None:
        """Gives those under way a last chance; needs the queue."""
        if not self._under_way:
            return
        _, late = await asyncio.wait(self._under_way, timeout=CLOSE_TIMEOUT_S)
        for task in late:
            task.cancel()

    async def _discard(self, job_id: str, then: Callable[[], Awaitable[None]] | None) -> None:
        async def discard() -> None:
            if await self._queue.discard(job_id):
                self._metrics.jobs.labels(JobState.CANCELLED).inc()
            if then is not None:
                await then()

        with suppress(QueueUnavailable):  # then the job's deadline ends it
            await retry_while_away(discard, REDIS_OUTAGE_TIMEOUT_S)
