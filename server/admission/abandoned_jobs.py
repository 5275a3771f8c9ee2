"""Jobs without a client: engine time is too expensive to finish them."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from engine.errors import QueueUnavailable
from engine.jobs.connection import REDIS_OUTAGE_TIMEOUT_S, retry_while_away
from engine.jobs.job import JobState
from engine.jobs.producer import JobProducer
from engine.tasks import stop
from server.metrics import Metrics

CLOSE_TIMEOUT_S = 2.0


class AbandonedJobs:
    def __init__(self, queue: JobProducer, metrics: Metrics) -> None:
        self._queue, self._metrics = queue, metrics
        self._tasks: set[asyncio.Task[None]] = set()

    def discard(self, job_id: str, then: Callable[[], Awaitable[None]] | None = None) -> None:
        """Discard the job in the background, even if its submit is in flight; then call `then`."""
        task = asyncio.create_task(self._discard(job_id, then))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Wait briefly for pending discards, then stop them."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_TIMEOUT_S)
        for task in list(self._tasks):
            await stop(task)

    async def _discard(self, job_id: str, then: Callable[[], Awaitable[None]] | None) -> None:
        async def discard() -> None:
            if await self._queue.discard(job_id):
                self._metrics.jobs.labels(JobState.CANCELLED).inc()
            if then is not None:
                await then()

        with suppress(QueueUnavailable):  # then the job's deadline ends it
            await retry_while_away(discard, REDIS_OUTAGE_TIMEOUT_S)
