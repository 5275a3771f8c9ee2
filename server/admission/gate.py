"""Bounds on requests in progress, of /v1, each key, each job and each idempotency key; refusal while draining."""

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from server.errors import BUSY_RETRY_S, DRAINING_RETRY_S, too_many, unavailable
from server.metrics import Metrics

MIN_REQUESTS = 2_000  # each takes some 50 kB
MAX_WAITING_PER_JOB = 32
MAX_READERS_PER_JOB = 64
FEW_REQUESTS = 32  # of one key; the last quarter of all places is for keys with fewer in progress

_EVERYONE = ""


class Gate:
    """Counts of one API process.

    Args:
        max_queue: a request for each of its jobs must fit.
    """

    def __init__(self, metrics: Metrics, max_queue: int = 0) -> None:
        self.draining = False  # /health says so, requests are still served
        self.closed = False
        self.inside = 0
        self.max_requests = max(MIN_REQUESTS, 2 * max_queue)
        self._metrics = metrics
        self._requests: Counter[str] = Counter()
        self._of_owners: Counter[str] = Counter()
        self._of_jobs: Counter[str] = Counter()
        self._readers: Counter[str] = Counter()

    def close(self) -> None:
        """Refuse further jobs."""
        self.draining = self.closed = True

    def require_open(self) -> None:
        """Raise a 503 if the gate is closed."""
        if self.closed:
            raise unavailable("This server is shutting down; try again.", DRAINING_RETRY_S)

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """Count a request of any route, from its head to the end of its response."""
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count a request of /v1; raise a 503 above `max_requests`."""
        if self._requests[_EVERYONE] >= self.max_requests:
            self._metrics.refused.labels("requests").inc()
            raise unavailable("This server has too many requests in progress; try again shortly.", BUSY_RETRY_S)
        with _counted(self._requests, _EVERYONE):
            yield

    def request_of(self, owner: str) -> AbstractContextManager[None]:
        """Count a request of /v1, already counted by `request`, with this owner's key.

        Raises:
            ApiError: 429 above half of `max_requests`, or above `FEW_REQUESTS` when a quarter of all is left.
        """
        is_crowded = self._requests[_EVERYONE] > self.max_requests * 3 // 4
        maximum = min(self.max_requests // 2, FEW_REQUESTS) if is_crowded else self.max_requests // 2
        message = f"This key may have {maximum} requests in progress at once now; try again shortly."
        return self._limited(self._of_owners, owner, maximum, "requests_of_key", message)

    def waiting_for(self, job_id: str) -> AbstractContextManager[None]:
        """Count a request that waits for the job of its idempotency key; raise a 429 above `MAX_WAITING_PER_JOB`."""
        maximum = MAX_WAITING_PER_JOB
        message = f"{maximum} requests with this Idempotency-Key are waiting already; try again shortly."
        return self._limited(self._of_jobs, job_id, maximum, "idempotency_key", message, "Idempotency-Key")

    def reader_of(self, job_id: str) -> AbstractContextManager[None]:
        """Count a request for a job or its events; raise a 429 above `MAX_READERS_PER_JOB`."""
        maximum = MAX_READERS_PER_JOB
        message = f"{maximum} requests for this job are in progress already; try again shortly."
        return self._limited(self._readers, job_id, maximum, "requests_of_job", message, "job_id")

    @contextmanager
    def _limited(
        self, counts: Counter[str], name: str, maximum: int, reason: str, message: str, param: str | None = None
    ) -> Iterator[None]:
        if counts[name] >= maximum:
            self._metrics.refused.labels(reason).inc()
            raise too_many(message, BUSY_RETRY_S, param=param)
        with _counted(counts, name):
            yield


@contextmanager
def _counted(counts: Counter[str], name: str) -> Iterator[None]:
    counts[name] += 1
    try:
        yield
    finally:
        counts[name] -= 1
        if not counts[name]:
            del counts[name]
