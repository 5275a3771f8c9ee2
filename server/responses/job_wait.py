"""Who waits for a job, and what becomes of it when they leave."""

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import Any, Self, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from engine.errors import QueueUnavailable
from engine.jobs.job import JobRecord, JobResult, JobState
from engine.jobs.producer import JobProducer
from engine.observability.logs import event
from engine.tasks import stop
from server.admission.abandoned_jobs import Withdrawals
from server.admission.admission import Admitted, Pace
from server.errors import internal_error
from server.metrics import Metrics
from server.responses.images import failure

REDIS_PATIENCE_S = 30.0  # the job is accepted, or even made; a restart of Redis takes some seconds
LOOK_EVERY_S, LOOK_AT_ONCE = 1.0, 500  # at jobs that no request waits for

logger = logging.getLogger("glimmer.images")
T = TypeVar("T")


async def with_client(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Does the work while the client is there.

    Args:
        receive: of a request whose body has been read, so that nothing but the client's leaving can come.

    Raises:
        ClientDisconnect: the client left, and the work was given up.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_client_gone(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        leaving.cancel()
        await stop(working)


async def _client_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Attendance:
    """A request that waits for a job. A job that is left alone is withdrawn, unless it is kept: then it goes on, and
    its result stays, for those who come back for it."""

    def __init__(
        self, queue: JobProducer, job: Admitted, *, kept: bool, withdrawals: Withdrawals, endings: "Endings"
    ) -> None:
        self._queue, self._withdrawals, self._endings = queue, withdrawals, endings
        self.job_id, self.kept = job.job_id, False
        self._attached = job.attached
        self._started = time.monotonic()
        self._has_ended = False
        if kept:
            self.keep()

    def __enter__(self) -> Self:
        return self

    def keep(self) -> None:
        """From now on the client knows the job, or can find it."""
        if not self.kept and not self._attached:
            self._endings.watch(self.job_id)
        self.kept = True

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        # Who leaves just as the job ends leaves its pictures behind.
        was_left = not self._has_ended or isinstance(error, ClientDisconnect)
        if was_left and not self.kept:
            self._withdrawals.start(self.job_id)

    async def end(self) -> tuple[JobRecord, JobResult]:
        """Waits for the end. Rides out a restart of Redis, whenever it comes.

        Raises:
            ApiError: it ended without a result.
            QueueUnavailable: Redis stayed away.
        """
        record = await self._queue.wait(self.job_id)
        return record, await self.result(record)

    async def result(self, ended: JobRecord) -> JobResult:
        """What the job has left. Raises as `end`."""
        error = failure(ended)
        result = None if error else await self._queue.result(self.job_id, patience_s=REDIS_PATIENCE_S)
        self._has_ended = True
        if not self.kept:
            self._endings.count(ended.state, time.monotonic() - self._started)
        if error is not None:
            raise error
        if result is None:
            event(logger, "result_missing", logging.ERROR, job=self.job_id)
            raise internal_error()
        return result


class Endings:
    """Counts how jobs end, those included that no request waits for. However many these are, they are looked after
    together: a task and a look a second for each would cost more than to admit them."""

    def __init__(self, queue: JobProducer, metrics: Metrics, pace: Pace) -> None:
        self._queue, self._metrics, self._pace = queue, metrics, pace
        self._watched: dict[str, float] = {}  # when each was submitted
        self._watching: list[asyncio.Task[None]] = []

    def count(self, state: JobState, seconds: float) -> None:
        """Takes note of a job's end, `seconds` after it was submitted."""
        self._pace.ended(seconds)
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
            await asyncio.sleep(LOOK_EVERY_S)
            watched = list(self._watched)
            for first in range(0, len(watched), LOOK_AT_ONCE):
                await self._count_ended(watched[first : first + LOOK_AT_ONCE])

    async def _count_ended(self, job_ids: Sequence[str]) -> None:
        with suppress(QueueUnavailable):
            for job_id, state in (await self._queue.ended_among(job_ids)).items():
                started = self._watched.pop(job_id, None)
                if started is not None and state is not None:
                    self.count(state, time.monotonic() - started)
