import asyncio
import logging
import time
from collections.abc import Coroutine
from typing import Any, Self, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from engine.jobs.connection import REDIS_OUTAGE_TIMEOUT_S
from engine.jobs.follower import JobFollower
from engine.jobs.job import JobRecord, JobResult
from engine.jobs.producer import JobProducer
from engine.observability.logs import event
from engine.tasks import stop
from server.admission.abandoned_jobs import AbandonedJobs
from server.admission.admission import Admitted
from server.errors import internal_error
from server.responses.outcomes import JobOutcomes, job_error

logger = logging.getLogger("glimmer.images")
T = TypeVar("T")


async def cancel_on_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`; cancel it and raise `ClientDisconnect` if the client disconnects first.

    Args:
        receive: of a request whose body has been read.
    """
    work_task = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(_client_disconnected(receive))
    try:
        await asyncio.wait({work_task, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if work_task.done():
            return work_task.result()
        raise ClientDisconnect
    finally:
        disconnect.cancel()
        await stop(work_task)


async def _client_disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class JobWait:
    """A waiting request. If it ends before the job, the job is discarded; a detached job is kept."""

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
        """Keep the job: the client knows its id or idempotency key."""
        if not self.detached and not self._attached:
            self._outcomes.watch(self.job_id)
        self.detached = True

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        # If the client disconnects after completion, discard the result: nothing will fetch it.
        was_abandoned = not self._has_ended or isinstance(error, ClientDisconnect)
        if was_abandoned and not self.detached:
            self._abandoned_jobs.discard(self.job_id)

    async def end(self) -> tuple[JobRecord, JobResult]:
        """Wait until the job ends, across a restart of Redis.

        Raises:
            ApiError: it ended without a result.
            QueueUnavailable: Redis stayed away.
        """
        record = await JobFollower(self._queue, self.job_id).wait()
        return record, await self.result(record)

    async def result(self, ended: JobRecord) -> JobResult:
        """Return the result of an ended job. Raises as `end`."""
        error = job_error(ended)
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
