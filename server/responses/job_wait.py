"""Who waits for a job, and what becomes of it when they leave."""

import asyncio
import logging
import time
from collections.abc import Coroutine
from typing import Any, Self, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from engine.jobs.connection import REDIS_OUTAGE_TIMEOUT_S
from engine.jobs.job import JobRecord, JobResult
from engine.jobs.producer import JobProducer
from engine.observability.logs import event
from engine.tasks import stop
from server.admission.abandoned_jobs import AbandonedJobs
from server.admission.admission import Admitted
from server.errors import internal_error
from server.responses.images import failure
from server.responses.outcomes import JobOutcomes

logger = logging.getLogger("glimmer.images")
T = TypeVar("T")


async def cancel_on_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
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


class JobWait:
    """A request that waits for a job. If it ends before the job does, the job is discarded, unless the client was told
    how to find it again (`detach`): then the job runs on and its result stays."""

    def __init__(
        self, queue: JobProducer, job: Admitted, *, detached: bool, abandoned_jobs: AbandonedJobs, outcomes: JobOutcomes
    ) -> None:
        self._queue, self._abandoned_jobs, self._outcomes = queue, abandoned_jobs, outcomes
        self.job_id, self.detached = job.job_id, False
        self._attached = job.attached
        self._started = time.monotonic()
        self._has_ended = False
        if detached:
            self.detach()

    def __enter__(self) -> Self:
        return self

    def detach(self) -> None:
        """From now on the client knows the job, or can find it."""
        if not self.detached and not self._attached:
            self._outcomes.watch(self.job_id)
        self.detached = True

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        # Who leaves just as the job ends leaves its pictures behind.
        was_left = not self._has_ended or isinstance(error, ClientDisconnect)
        if was_left and not self.detached:
            self._abandoned_jobs.discard(self.job_id)

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
        result = None if error else await self._queue.result(self.job_id, outage_timeout_s=REDIS_OUTAGE_TIMEOUT_S)
        self._has_ended = True
        if not self.detached:
            self._outcomes.count(ended.state, time.monotonic() - self._started)
        if error is not None:
            raise error
        if result is None:
            event(logger, "result_missing", logging.ERROR, job=self.job_id)
            raise internal_error()
        return result
