"""Reads of the queue for probes and requests: at most one a second."""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from engine.jobs.job import EngineInfo
from engine.jobs.producer import JobProducer
from engine.observability.logs import event
from engine.tasks import retrieve
from server.admission.engine_directory import models_of, not_ready_reason, ready_engines, require_ready
from server.redis_timeout import with_redis_timeout

CACHE_TTL_S = 1.0
WRITE_PROBE_TTL_S = 2.0  # each is a write to the append-only file

logger = logging.getLogger("glimmer.engines")
T = TypeVar("T")


class SharedRead(Generic[T]):
    """Shares one read and its failure among concurrent requests."""

    def __init__(self, read: Callable[[], Coroutine[Any, Any, T]], ttl_s: float) -> None:
        self._read, self._ttl_s = read, ttl_s
        self._expires_at = -math.inf
        self._task: asyncio.Task[T] | None = None

    async def get(self) -> T:
        """Return the value, at most `ttl_s` old; raise `QueueUnavailable` in time."""
        if self._task is None or (self._task.done() and not self._is_fresh(self._task)):
            self._task = asyncio.create_task(self._read_once())
            self._task.add_done_callback(retrieve)  # all requests may be cancelled
        return await asyncio.shield(self._task)  # cancelling one request must not cancel the others

    def _is_fresh(self, task: "asyncio.Task[T]") -> bool:
        return not task.cancelled() and task.exception() is None and time.monotonic() < self._expires_at

    async def _read_once(self) -> T:
        value = await with_redis_timeout(self._read())
        self._expires_at = time.monotonic() + self._ttl_s
        return value


class QueueState:
    """Shared reads; `engines` are those with a fresh heartbeat, in any state."""

    def __init__(self, queue: JobProducer) -> None:
        self._queue, self._models = queue, set[str]()
        self.engines = SharedRead(self._read_engines, CACHE_TTL_S)
        self.last_engine = SharedRead(lambda: queue.last_engine(), CACHE_TTL_S)
        self.engine_metrics = SharedRead(lambda: queue.engine_metrics(), CACHE_TTL_S)
        self.stats = SharedRead(lambda: queue.stats(), CACHE_TTL_S)
        self.takes_writes = SharedRead(lambda: queue.takes_writes(), WRITE_PROBE_TTL_S)

    async def require_engine(self, *, may_be_absent: bool) -> EngineInfo:
        """Return an engine that plans; raise a 503 if a stage has none that is ready.

        Args:
            may_be_absent: the last one will do, since an autoscaler starts others.
        """
        return require_ready(await self.engines.get(), await self.last_engine.get() if may_be_absent else None)

    async def missing_stage(self, *, may_be_absent: bool) -> str | None:
        """Return for want of which engine requests are refused."""
        reason = not_ready_reason(await self.engines.get())
        return None if reason and may_be_absent and await self.last_engine.get() else reason

    async def _read_engines(self) -> list[EngineInfo]:
        """Read the engines; log if their models differ."""
        engines = await self._queue.engines()
        models = models_of(engines)
        if len(models) > 1 and models != self._models:
            by_engine = {
                engine.id: engine.fingerprint or engine.planner or engine.renderer for engine in ready_engines(engines)
            }
            event(logger, "models_differ", logging.ERROR, engines=by_engine)
        self._models = models
        return engines
