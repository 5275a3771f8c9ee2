"""What every part of the queue stands on: the client, the settings, the scripts, the subscriptions."""

from typing import Any

import orjson
import redis.asyncio
from redis.commands.core import AsyncScript

from engine.jobs.connection import redis_errors
from engine.jobs.events import JobEvents, WakeUps
from engine.jobs.job import JobError


class QueueBase:
    """Opened and closed here; what can be done with it is in its subclasses. The arguments are those of `JobQueue`."""

    def __init__(
        self,
        redis: redis.asyncio.Redis,
        *,
        prefix: str = "glimmer",
        lease_ms: int = 10_000,
        result_ttl_s: int = 600,
        max_runs: int = 3,
    ):
        self._redis, self._prefix = redis, prefix
        self._lease_ms, self._result_ttl_ms, self._max_runs = lease_ms, 1000 * result_ttl_s, max_runs
        self._poison_error = orjson.dumps(
            JobError(f"The job brought its engine down {max_runs} times and was given up.").to_dict()
        )
        self._scripts: dict[str, AsyncScript] = {}
        self._events = JobEvents(redis, f"{prefix}:events")
        self._wake_ups = WakeUps(redis, f"{prefix}:wake")

    @property
    def client(self) -> redis.asyncio.Redis:
        """The client, for what is kept beside the jobs."""
        return self._redis

    @property
    def result_ttl_s(self) -> int:
        return self._result_ttl_ms // 1000

    @property
    def prefix(self) -> str:
        return self._prefix

    async def ping(self) -> None:
        """Raises `QueueUnavailable` if Redis does not answer."""
        with redis_errors():
            await self._redis.ping()

    async def close(self) -> None:
        """Ends the subscriptions; the client stays open."""
        await self._events.close()
        await self._wake_ups.close()

    def _key(self, *parts: str) -> str:
        return ":".join((self._prefix, *parts))

    async def _run(self, script: str, *args: str | bytes | float) -> Any:
        if script not in self._scripts:
            self._scripts[script] = self._redis.register_script(script)
        with redis_errors():
            return await self._scripts[script](args=[self._prefix, self._result_ttl_ms, *args])
