"""How jobs end: errors and metrics."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress

from engine.errors import QueueUnavailable
from engine.jobs.job import STORE_UNAVAILABLE, JobRecord, JobState
from engine.jobs.producer import JobProducer
from engine.tasks import stop
from server.admission.throughput import Throughput
from server.errors import ApiError, internal_error
from server.metrics import Metrics

POLL_INTERVAL_S = 1.0
POLL_BATCH = 500  # jobs per call to Redis


def job_error(record: JobRecord) -> ApiError | None:
    """Return the error of a job that has ended without a result."""
    if record.state is JobState.EXPIRED:
        # The client's own limit: a retry by the SDK would only add load.
        return ApiError(
            504,
            "The request did not finish within its timeout.",
            type="server_error",
            code="deadline_exceeded",
            headers={"x-should-retry": "false"},
        )
    if record.state is JobState.CANCELLED:
        return ApiError(409, "The job was cancelled.", code="job_cancelled", headers={"x-should-retry": "false"})
    if record.state is not JobState.FAILED:
        return None
    error = record.error
    if error is None:
        return internal_error()
    status = 400 if error.type == "invalid_request_error" else 503 if error.code == STORE_UNAVAILABLE else 500
    return ApiError(status, error.message, type=error.type, code=error.code, param=error.param)


class JobOutcomes:
    """Counts how jobs end. Those that no request waits for share two tasks and one poll per second: their own
    would cost more than admitting them."""

    def __init__(self, queue: JobProducer, metrics: Metrics, throughput: Throughput) -> None:
        self._queue, self._metrics, self._throughput = queue, metrics, throughput
        self._watched: dict[str, float] = {}  # time of submission by job id
        self._tasks: list[asyncio.Task[None]] = []

    def count(self, state: JobState, seconds: float) -> None:
        """Count a job that ended `seconds` after its submission."""
        self._throughput.record_end(seconds)
        self._metrics.jobs.labels(state).inc()

    def watch(self, job_id: str) -> None:
        """Count the job when it ends; expire it when its deadline passes."""
        self._watched[job_id] = time.monotonic()
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._count_announced()), asyncio.create_task(self._poll())]

    async def close(self) -> None:
        """Stop watching; the jobs go on."""
        for task in self._tasks:
            await stop(task)

    async def _count_announced(self) -> None:
        async for job_id in self._queue.ended():
            if job_id in self._watched:
                await self._count_ended([job_id])

    async def _poll(self) -> None:
        """Count ends whose event was lost."""
        while True:
            await asyncio.sleep(POLL_INTERVAL_S)
            watched = list(self._watched)
            for start in range(0, len(watched), POLL_BATCH):
                await self._count_ended(watched[start : start + POLL_BATCH])

    async def _count_ended(self, job_ids: Sequence[str]) -> None:
        with suppress(QueueUnavailable):
            for job_id, state in (await self._queue.ended_among(job_ids)).items():
                submitted = self._watched.pop(job_id, None)
                if submitted is not None and state is not None:
                    self.count(state, time.monotonic() - submitted)
