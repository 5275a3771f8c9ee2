"""The part of the job queue that the API and the engines share.

A job is submitted once and ends once. Engines claim it until one of them ends it. A claim is a lease: the engine renews
it while it works, and any engine may claim a job whose lease has lapsed. Each claim has a new epoch, and writes of an
engine take effect only while its epoch is the job's. So a job may run more than once, but ends once. `lua/prelude.lua`
has the states and the changes of state.
"""

from collections.abc import AsyncIterator

import orjson
import redis.asyncio

from engine.jobs.connection import redis_errors
from engine.jobs.events import JobEvents, WakeUps
from engine.jobs.job import JobError, JobState
from engine.jobs.scripts import LuaScripts


class QueueBase:
    """Jobs in Redis. Any number of processes may have one; all must use the same settings.

    Methods raise `QueueUnavailable` when Redis is away or refuses writes, and may be called again then. Scripts,
    consumer groups and subscriptions that a restarted or flushed Redis has lost are created again.

    Args:
        redis: a client that returns bytes (see `engine.jobs.connection.connect`); the caller closes it.
        prefix: put before every key and channel.
        lease_ms: after so long without renewal a claimed job may be claimed by others.
        result_ttl_s: how long the record and the result are kept after the end of the job, in seconds.
        max_runs: a job that has cost so many engines their lease fails instead of being claimed again.
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
        self.events = JobEvents(redis, f"{prefix}:events")
        self._wake_ups = WakeUps(redis, f"{prefix}:wake")

    @property
    def client(self) -> redis.asyncio.Redis:
        """Return the client, for what is kept beside the jobs."""
        return self._redis

    @property
    def result_ttl_s(self) -> int:
        return self._result_ttl_ms // 1000

    @property
    def prefix(self) -> str:
        return self._prefix

    def key(self, *parts: str) -> str:
        """Return the key of these parts behind the prefix."""
        return ":".join((self._prefix, *parts))

    async def ping(self) -> None:
        """Raise `QueueUnavailable` if Redis does not answer."""
        with redis_errors():
            await self._redis.ping()

    async def close(self) -> None:
        """End the subscriptions; the client stays open."""
        await self.events.close()
        await self._wake_ups.close()

    def ended(self) -> AsyncIterator[str]:
        """Yield the ids of jobs that end from now on, until `close`.

        Best effort: ends are lost while the connection is broken, and nothing is raised then.
        """
        return self.events.ended()

    async def expire(self, job_id: str) -> bool:
        """End a queued or running job as expired if its deadline has passed. Returns whether this call ended it."""
        return bool(await self._scripts.run("end_job", id=job_id, state=JobState.EXPIRED.value))
