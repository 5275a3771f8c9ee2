"""The job queue: the only thing the API and the engines both know.

A job is submitted once, claimed by engines until one of them ends it, and ends once. A claim is a lease: the engine
renews it while it works, and any engine may take a job whose lease has lapsed. Every claim has a new epoch, and what
an engine writes counts only while its epoch is the job's. So a job may run more than once, but has one visible end.
The states and their changes are in `lua/prelude.lua`.
"""

from collections.abc import AsyncIterator

import orjson
import redis.asyncio

from engine.jobs.connection import redis_errors
from engine.jobs.events import JobEvents, WakeUps
from engine.jobs.job import JobError, JobState
from engine.jobs.scripts import LuaScripts


class QueueBase:
    """Jobs in Redis. Any number of processes may hold one; all must agree on the settings.

    Every method raises `QueueUnavailable` when Redis is away or refuses writes, unless its docstring says otherwise;
    it may be called again then. Scripts, consumer groups and subscriptions that a restarted or flushed Redis has lost
    are made again on the way.

    Args:
        redis: a client that returns bytes (see `engine.jobs.connection.connect`); stays the caller's to close.
        prefix: put before every key and channel.
        lease_ms: a claim that is not renewed for this long is open to others.
        result_ttl_s: how long the record and the result outlive the end of the job, in seconds.
        max_runs: a job that has cost this many engines their lease fails instead of being claimed again.
    """

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
        self._dead_letter_error = orjson.dumps(
            JobError(f"The job brought its engine down {max_runs} times and was given up.").to_dict()
        )
        self._scripts = LuaScripts(redis, "engine.jobs", prefix=prefix, result_ttl_ms=self._result_ttl_ms)
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

    def ended(self) -> AsyncIterator[str]:
        """Ids of jobs that end while this is iterated, until `close`. Best effort: what happens while the connection
        is broken is not told later, and a broken connection raises nothing."""
        return self._events.ended()

    async def expire(self, job_id: str) -> bool:
        """Ends a queued or running job as expired if its deadline has passed. True if this call ended it."""
        return bool(await self._scripts.run("end_job", id=job_id, state=JobState.EXPIRED.value))

    def _key(self, *parts: str) -> str:
        return ":".join((self._prefix, *parts))
