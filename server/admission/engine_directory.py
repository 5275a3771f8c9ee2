"""The live engines, read from Redis at most once a second."""

import asyncio
import math
import time

from engine.jobs.job import EngineInfo
from engine.jobs.producer import JobProducer
from server.errors import ENGINE_RETRY_S, unavailable
from server.redis_timeout import with_redis_timeout

CACHE_TTL_S = 1.0


def ready_engines(engines: list[EngineInfo]) -> list[EngineInfo]:
    """Return the engines that accept work."""
    return [engine for engine in engines if engine.state == "ready"]


class EngineDirectory:
    """Lets concurrent requests share one read and its failure: in turn, each would wait for a hanging Redis."""

    def __init__(self, queue: JobProducer) -> None:
        self._queue = queue
        self._engines: list[EngineInfo] = []
        self._read_at = -math.inf
        self._reading: asyncio.Task[None] | None = None

    async def live(self) -> list[EngineInfo]:
        """Return the engines with a fresh heartbeat, in any state."""
        if time.monotonic() - self._read_at > CACHE_TTL_S:
            if self._reading is None or self._reading.done():
                self._reading = asyncio.create_task(self._read())
                self._reading.add_done_callback(_retrieve)
            await asyncio.shield(self._reading)  # cancelling one request must not cancel the others
        return self._engines

    async def _read(self) -> None:
        self._engines = await with_redis_timeout(self._queue.engines())
        self._read_at = time.monotonic()

    async def require_ready(self) -> EngineInfo:
        """Return any ready engine (all serve the same model); raise a 503 without one."""
        live = await self.live()
        ready = ready_engines(live)
        if not ready:
            raise unavailable(not_ready_reason(live), ENGINE_RETRY_S)
        return ready[0]


def _retrieve(task: "asyncio.Task[None]") -> None:
    """Retrieve the exception: asyncio would log it if all requests were cancelled."""
    if not task.cancelled():
        task.exception()


def not_ready_reason(engines: list[EngineInfo]) -> str:
    """Return why none of `engines` is ready."""
    if not engines:
        return "No engine is running."
    states = sorted({engine.state for engine in engines})
    if states == ["starting"]:
        return "The engine is still starting."
    return f"No engine is ready (states: {', '.join(states)})."
