import logging
import time
from typing import Self

from starlette.requests import ClientDisconnect

from engine.jobs.connection import REDIS_OUTAGE_TIMEOUT_S, retry_while_away
from engine.jobs.follower import JobFollower
from engine.jobs.job import JobRecord
from engine.jobs.producer import JobProducer
from engine.observability.logs import event
from server.admission.abandoned_jobs import AbandonedJobs
from server.admission.admission import Admitted
from server.admission.memory_budget import Hold
from server.errors import internal_error
from server.responses.images import ResultImages, read_result
from server.responses.outcomes import JobOutcomes, job_error

logger = logging.getLogger("glimmer.images")


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

    async def end(self, held: Hold) -> tuple[JobRecord, ResultImages]:
        """Wait until the job ends, across a restart of Redis.

        Args:
            held: counts the images.

        Raises:
            ApiError: it ended without a result.
            QueueUnavailable: Redis stayed away.
        """
        record = await JobFollower(self._queue, self.job_id).wait()
        return record, await self.result(record, held)

    async def result(self, ended: JobRecord, held: Hold) -> ResultImages:
        """Return the result of an ended job. Raises as `end`."""

        async def read() -> ResultImages | None:
            return await read_result(self._queue, self.job_id, held)

        error = job_error(ended)
        result = None if error else await retry_while_away(read, REDIS_OUTAGE_TIMEOUT_S)
        self._has_ended = True
        if not self.detached:
            self._outcomes.count(ended.state, time.monotonic() - self._started)
        if error is not None:
            raise error
        if result is None:
            event(logger, "result_missing", logging.ERROR, job=self.job_id)
            raise internal_error()
        return result
