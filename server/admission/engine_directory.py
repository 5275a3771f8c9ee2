"""Which engines are alive, and whether one takes work."""

import asyncio
import math
import time

from engine.jobs.job import EngineInfo
from engine.jobs.producer import JobProducer
from server.errors import ENGINE_RETRY_S, unavailable
from server.redis_timeout import with_redis_timeout

ENGINES_FRESH_S = 1.0  # how long the list of live engines may be reused


def ready_engines(engines: list[EngineInfo]) -> list[EngineInfo]:
    """The engines that take work now."""
    return [engine for engine in engines if engine.state == "ready"]


class EngineDirectory:
    """The live engines, asked for at most once a second however many requests come in.

    Requests that come while Redis is being asked share its answer, and a failure too: one after the other they would
    each wait for a Redis that hangs.
    """

    def __init__(self, queue: JobProducer) -> None:
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
        self._engines = await with_redis_timeout(self._queue.engines())
        self._read_at = time.monotonic()

    async def require_ready(self) -> EngineInfo:
        """An engine to fit a job to; all of a deployment serve one model.

        Raises:
            ApiError: 503 when no engine takes work now.
        """
        live = await self.live()
        ready = ready_engines(live)
        if not ready:
            raise unavailable(not_ready_reason(live), ENGINE_RETRY_S)
        return ready[0]


def _retrieve(task: "asyncio.Task[None]") -> None:
    """Keeps asyncio from complaining of a failure that all who waited for it have left behind."""
    if not task.cancelled():
        task.exception()


def not_ready_reason(engines: list[EngineInfo]) -> str:
    """In words, for a set of engines that `ready_engines` finds wanting."""
    if not engines:
        return "No engine is running."
    states = sorted({engine.state for engine in engines})
    if states == ["starting"]:
        return "The engine is still starting."
    return f"No engine can take work now (states: {', '.join(states)})."
