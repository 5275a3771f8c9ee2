"""Who gets in: nobody while draining, nobody without an engine, and never more than the queue may hold."""

import asyncio
import math
import time
import uuid
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from engine.errors import QueueFull, QueueUnavailable
from engine.jobs.job import EngineInfo, JobSpec, Priority
from engine.jobs.queue import JobQueue
from server.errors import DRAINING_RETRY_S, ENGINE_RETRY_S, ApiError, unavailable
from server.withdrawals import Withdrawals

ENGINES_FRESH_S = 1.0  # how long the list of live engines may be reused
MIN_RETRY_S, MAX_RETRY_S = 1, 60
REDIS_PATIENCE_S = 1.5  # a Redis that is cut off without a reset would otherwise hold clients for many seconds

T = TypeVar("T")


async def in_time(asked: Awaitable[T]) -> T:
    """What Redis says, if it says it while a client or a probe can wait.

    Raises:
        QueueUnavailable: it took longer than `REDIS_PATIENCE_S`.
    """
    try:
        async with asyncio.timeout(REDIS_PATIENCE_S):
            return await asked
    except TimeoutError:
        raise QueueUnavailable(f"no answer from Redis within {REDIS_PATIENCE_S} s") from None


class Gate:
    """Counts the requests being served and, once closed, lets no further one in."""

    def __init__(self) -> None:
        self.closed = False
        self.inside = 0

    def close(self) -> None:
        """Start of the drain; there is no way back."""
        self.closed = True

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Holds a place while a request is served.

        Raises:
            ApiError: 503 when the gate is closed.
        """
        if self.closed:
            raise unavailable("This server is shutting down; try again.", DRAINING_RETRY_S)
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1


def ready_engines(engines: list[EngineInfo]) -> list[EngineInfo]:
    """The engines that take work now."""
    return [engine for engine in engines if engine.state == "ready"]


class EngineDirectory:
    """The live engines, asked for at most once a second however many requests come in.

    Requests that come while Redis is being asked share its answer, and a failure too: one after the other they would
    each wait for a Redis that hangs.
    """

    def __init__(self, queue: JobQueue) -> None:
        self._queue = queue
        self._engines: list[EngineInfo] = []
        self._read_at = -math.inf
        self._asking: asyncio.Task[None] | None = None

    async def live(self) -> list[EngineInfo]:
        """Engines with a fresh heartbeat, in any state.

        Raises:
            QueueUnavailable: Redis is away.
        """
        if time.monotonic() - self._read_at > ENGINES_FRESH_S:
            if self._asking is None or self._asking.done():
                self._asking = asyncio.create_task(self._ask())
                self._asking.add_done_callback(_retrieve)
            await asyncio.shield(self._asking)  # a caller that is cancelled must not take the others along
        return self._engines

    async def _ask(self) -> None:
        self._engines = await in_time(self._queue.engines())
        self._read_at = time.monotonic()

    async def one_ready(self) -> EngineInfo:
        """An engine to fit a job to; all of a deployment serve one model.

        Raises:
            ApiError: 503 when no engine takes work now.
        """
        live = await self.live()
        ready = ready_engines(live)
        if not ready:
            raise unavailable(why_not_ready(live), ENGINE_RETRY_S)
        return ready[0]


def _retrieve(task: "asyncio.Task[None]") -> None:
    """Keeps asyncio from complaining of a failure that all who waited for it have left behind."""
    if not task.cancelled():
        task.exception()


def why_not_ready(engines: list[EngineInfo]) -> str:
    """In words, for a set of engines that `ready_engines` finds wanting."""
    if not engines:
        return "No engine is running."
    states = sorted({engine.state for engine in engines})
    if states == ["starting"]:
        return "The engine is still starting."
    return f"No engine can take work now (states: {', '.join(states)})."


class Pace:
    """How often jobs end, to tell a refused client when to come back.

    An idle hour says nothing about the pace, so the time between two ends counts at most as long as a job took.
    """

    def __init__(self) -> None:
        self._interval_s: float | None = None
        self._last_end = -math.inf

    def ended(self, duration_s: float) -> None:
        now = time.monotonic()
        interval = min(now - self._last_end, duration_s)
        self._last_end = now
        self._interval_s = interval if self._interval_s is None else 0.9 * self._interval_s + 0.1 * interval

    def retry_after_s(self, queued: int) -> int:
        """Whole seconds until about a tenth of `queued` jobs, at least one, will have ended."""
        interval = self._interval_s if self._interval_s is not None else 1.0
        return min(MAX_RETRY_S, max(MIN_RETRY_S, math.ceil(interval * max(1, queued // 10))))


class Admission:
    """Puts jobs into the queue while it has room."""

    def __init__(self, queue: JobQueue, max_queue: int, withdrawals: Withdrawals) -> None:
        self._queue = queue
        self._max_queue = max_queue
        self._withdrawals = withdrawals
        self.pace = Pace()

    async def submit(self, spec: JobSpec, timeout_s: float, priority: Priority) -> str:
        """Reserves a place and queues the job in one atomic step; returns the job's id.

        Without an answer the job may be queued all the same. Nobody would wait for it, so it is withdrawn then.

        Raises:
            ApiError: 429 when the queue is at its cap.
            QueueUnavailable: Redis is away.
        """
        job_id = f"job_{uuid.uuid4().hex}"
        try:
            await in_time(
                self._queue.submit(
                    spec, job_id=job_id, timeout_s=timeout_s, priority=priority, max_queue=self._max_queue
                )
            )
        except QueueFull:
            retry = self.pace.retry_after_s(self._max_queue)
            raise ApiError(
                429,
                f"The queue is full; try again in about {retry} s.",
                type="rate_limit_error",
                code="rate_limit_exceeded",
                headers={"retry-after": str(retry)},
            ) from None
        except (QueueUnavailable, asyncio.CancelledError):
            self._withdrawals.start(job_id)
            raise
        return job_id
