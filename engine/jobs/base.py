"""What both sides of the job queue share."""

from collections.abc import AsyncIterator

import redis.asyncio

from engine.jobs.connection import redis_errors
from engine.jobs.events import JobEvents
from engine.jobs.job import JobState
from engine.jobs.masters import key_prefix
from engine.jobs.result_store import ResultStore
from engine.jobs.scripts import LuaScripts


class QueueBase:
    """Jobs in Redis. Methods raise `QueueUnavailable`.

    Args:
        redis: returns bytes; the caller closes it.
        prefix: of all keys; by default `glimmer`, in a cluster as a hash tag.
        orphan_ms: silence after which an API counts as dead.
        result_store: has the images of results, in place of Redis.
    """

    def __init__(
        self,
        redis: redis.asyncio.Redis,
        *,
        prefix: str | None = None,
        lease_ms: int = 10_000,
        result_ttl_s: int = 600,
        orphan_ms: int = 60_000,
        result_store: ResultStore | None = None,
    ):
        prefix = prefix or key_prefix(redis)
        self._redis, self._prefix = redis, prefix
        self.result_store = result_store
        self._lease_ms, self._result_ttl_ms, self._orphan_ms = lease_ms, 1000 * result_ttl_s, orphan_ms
        self._scripts = LuaScripts(redis, "engine.jobs", prefix=prefix, result_ttl_ms=self._result_ttl_ms)
        self.events = JobEvents(redis, f"{prefix}:events")

    @property
    def client(self) -> redis.asyncio.Redis:
        """Return the client."""
        return self._redis

    @property
    def result_ttl_s(self) -> int:
        return self._result_ttl_ms // 1000

    @property
    def prefix(self) -> str:
        return self._prefix

    def key(self, *parts: str) -> str:
        """Return a key with the prefix."""
        return ":".join((self._prefix, *parts))

    async def ping(self) -> None:
        """Raise `QueueUnavailable` if Redis does not answer."""
        with redis_errors():
            await self._redis.ping()

    async def close(self) -> None:
        """End the subscriptions; the client stays open."""
        await self.events.close()

    def ended(self) -> AsyncIterator[str]:
        """Yield the ids of jobs that end; misses some while disconnected."""
        return self.events.ended()

    async def expire(self, job_id: str) -> bool:
        """End a live job past its deadline; return whether this call did."""
        return bool(await self._scripts.run("end_job", id=job_id, state=JobState.EXPIRED.value))
