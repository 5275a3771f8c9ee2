"""How jobs end, counted."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress

from engine.errors import QueueUnavailable
from engine.jobs.job import JobState
from engine.jobs.producer import JobProducer
from engine.tasks import stop
from server.admission.throughput import Throughput
from server.metrics import Metrics

POLL_INTERVAL_S, POLL_BATCH = 1.0, 500  # at jobs that no request waits for


class JobOutcomes:
    """Counts how jobs end, those included that no request waits for. However many these are, they are looked after
    together: a task and a look a second for each would cost more than to admit them."""

    def __init__(self, queue: JobProducer, metrics: Metrics, throughput: Throughput) -> None:
        self._queue, self._metrics, self._throughput = queue, metrics, throughput
        self._watched: dict[str, float] = {}  # when each was submitted
        self._watching: list[asyncio.Task[None]] = []

    def count(self, state: JobState, seconds: float) -> None:
        """Takes note of a job's end, `seconds` after it was submitted."""
        self._throughput.record_end(seconds)
        self._metrics.jobs.labels(state).inc()

    def watch(self, job_id: str) -> None:
        """Counts the job when it ends, and expires it when its deadline passes first."""
        self._watched[job_id] = time.monotonic()
        if not self._watching:
            self._watching = [asyncio.create_task(self._hear()), asyncio.create_task(self._look())]

    async def close(self) -> None:
        """Stops watching; the jobs go on."""
        for task in self._watching:
            await stop(task)

    async def _hear(self) -> None:
        """Counts jobs as they end."""
        async for job_id in self._queue.ended():
            if job_id in self._watched:
                await self._count_ended([job_id])

    async def _look(self) -> None:
        """Finds the ends that were not heard of."""
        while True:
            await asyncio.sleep(POLL_INTERVAL_S)
            watched = list(self._watched)
            for first in range(0, len(watched), POLL_BATCH):
                await self._count_ended(watched[first : first + POLL_BATCH])

    async def _count_ended(self, job_ids: Sequence[str]) -> None:
        with suppress(QueueUnavailable):
            for job_id, state in (await self._queue.ended_among(job_ids)).items():
                started = self._watched.pop(job_id, None)
                if started is not None and state is not None:
                    self.count(state, time.monotonic() - started)
