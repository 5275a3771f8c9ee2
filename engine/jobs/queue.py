"""The job queue: the only thing the API and the engines both know.

A job is submitted once, claimed by engines until one of them ends it, and ends once. A claim is a lease: the engine
renews it while it works, and any engine may take a job whose lease has lapsed. Every claim has a new epoch, and what
an engine writes counts only while its epoch is the job's. So a job may run more than once, but has one visible end.
The states and their changes are in `scripts.py`.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from typing import Any

import orjson
import redis.asyncio
from redis.commands.core import AsyncScript

from engine.errors import QueueFull, QueueUnavailable
from engine.jobs import scripts
from engine.jobs.codec import RECORD_FIELDS, decode_claim, decode_record, decode_result, encode_result
from engine.jobs.connection import redis_errors
from engine.jobs.events import JobEvents, WakeUps
from engine.jobs.job import (
    Budget,
    Claim,
    EngineInfo,
    JobError,
    JobRecord,
    JobResult,
    JobSpec,
    JobState,
    Plan,
    Priority,
    QueueStats,
)

_LOOK_EVERY_S = 1.0  # how often `wait` looks by itself, should an event have been lost
_PATIENCE_S = 30.0  # how long past the deadline `wait` hopes for Redis to come back
_TRY_EVERY_S = 0.5  # how often `result` tries to reach a Redis that is away
_DELIVERED_TTL_S = 5.0  # leaves time to ask for a result once more, should its answer have been lost on the way


class JobQueue:
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
        self._poison_error = orjson.dumps(
            JobError(f"The job brought its engine down {max_runs} times and was given up.").to_dict()
        )
        self._scripts: dict[str, AsyncScript] = {}
        self._events = JobEvents(redis, f"{prefix}:events")
        self._wake_ups = WakeUps(redis, f"{prefix}:wake")

    # --- API side -----------------------------------------------------------------------------------------------

    async def submit(self, spec: JobSpec, *, job_id: str, timeout_s: float, priority: Priority, max_queue: int) -> None:
        """Puts a job into the queue. A job id that is known already is left as it is, so a submit whose answer got
        lost can be repeated.

        Args:
            timeout_s: seconds from now to the deadline.
            max_queue: how many jobs may wait, over both priorities.

        Raises:
            QueueFull: that many wait already.
        """
        cost = (spec.n, spec.plan_tokens + spec.prompt_tokens_bound)
        reply = await self._run(
            scripts.SUBMIT,
            job_id,
            priority,
            orjson.dumps(spec.to_dict()),
            *cost,
            round(timeout_s * 1000),
            max_queue,
        )
        if reply == b"full":
            raise QueueFull(f"{max_queue} jobs are waiting already")

    async def cancel(self, job_id: str) -> bool:
        """Ends a queued or running job as cancelled. True if this call ended it."""
        return bool(await self._run(scripts.END, job_id, JobState.CANCELLED.value))

    async def expire(self, job_id: str) -> bool:
        """Ends a queued or running job as expired if its deadline has passed. True if this call ended it."""
        return bool(await self._run(scripts.END, job_id, JobState.EXPIRED.value))

    async def get(self, job_id: str) -> JobRecord | None:
        """The job as it is now; None if it never was, or ended longer than `result_ttl_s` ago."""
        with redis_errors():
            values = await self._redis.hmget(self._key("job", job_id), list(RECORD_FIELDS))
        return decode_record(job_id, values)

    async def withdraw(self, job_id: str) -> bool:
        """Takes back a job whose result nobody wants. True if this call ended it.

        Unlike `cancel` it is also for a submit whose answer never came: should that still be under way, it will not
        take effect. And the result of a job that has succeeded is deleted.
        """
        return bool(await self._run(scripts.WITHDRAW, job_id))

    async def result(self, job_id: str, *, patience_s: float = 0.0) -> JobResult | None:
        """What a succeeded job left; None for any other, once it was withdrawn, and `result_ttl_s` after the end.

        Args:
            patience_s: for so long, in seconds, it rides out a Redis that is away.
        """
        give_up_at = time.monotonic() + patience_s
        while True:
            try:
                with redis_errors():
                    return decode_result(await self._redis.hgetall(self._key("result", job_id)))
            except QueueUnavailable:
                if time.monotonic() >= give_up_at:
                    raise
            await asyncio.sleep(_TRY_EVERY_S)

    async def delivered(self, job_id: str) -> None:
        """Says that the result of an ended job has been handed over: its record and its result, which may be megabytes,
        live for some seconds more instead of `result_ttl_s`."""
        left_ms = min(round(1000 * _DELIVERED_TTL_S), self._result_ttl_ms)
        await self._run(scripts.DELIVERED, job_id, left_ms)

    async def wait(self, job_id: str) -> JobRecord:
        """Returns the record of a job when it has ended; expires the job when its deadline passes first.

        Rides out a Redis that is away, up to half a minute past the deadline.

        Raises:
            QueueUnavailable: Redis stayed away, or has no record of the job.
        """
        give_up_at = time.monotonic() + _PATIENCE_S
        with self._events.waiter(job_id) as woken:
            while True:
                woken.clear()
                try:
                    found = await self._ended_or_left(job_id)
                except QueueUnavailable:
                    if time.monotonic() > give_up_at:
                        raise
                    pause = _LOOK_EVERY_S
                else:
                    if found is None:
                        raise QueueUnavailable(f"Redis has no record of job {job_id}: it was lost, or ended long ago")
                    if isinstance(found, JobRecord):
                        return found
                    give_up_at = time.monotonic() + found + _PATIENCE_S
                    pause = min(_LOOK_EVERY_S, found)
                with suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await woken.wait()

    async def stats(self) -> QueueStats:
        waiting, running = await self._run(scripts.STATS)
        return QueueStats(waiting, running)

    async def engines(self) -> list[EngineInfo]:
        """The engines whose heartbeat has not run out, by id."""
        live = await self._heartbeats("info")
        return [EngineInfo.from_dict(orjson.loads(info)) for info in live.values()]

    async def engine_metrics(self) -> dict[str, str]:
        """Prometheus text exposition of each live engine, by engine id."""
        return {engine: text.decode() for engine, text in (await self._heartbeats("metrics")).items()}

    async def ping(self) -> None:
        """Raises `QueueUnavailable` if Redis does not answer."""
        with redis_errors():
            await self._redis.ping()

    # --- engine side --------------------------------------------------------------------------------------------

    async def claim(self, consumer: str, budget: Budget) -> Claim | None:
        """Takes the next job, if there is one and it fits the budget. Jobs whose lease has lapsed come first.

        A job that does not fit is not passed over: nothing is granted until it fits here or another engine takes it.
        So large jobs do not starve, nor do jobs that must run alone (`Claim.exclusive`), for which an engine has to
        run dry. The engine's own lapsed leases count too: renew before claiming.

        Args:
            consumer: the engine's name in the queue, unique among the living.
        """
        while True:
            reply = await self._run(
                scripts.CLAIM,
                consumer,
                budget.images,
                budget.kv_tokens,
                int(budget.idle),
                self._lease_ms,
                self._max_runs,
                self._poison_error,
            )
            if reply is None:
                return None
            if isinstance(reply, list):
                return decode_claim(reply)

    async def renew(self, consumer: str, claims: Iterable[Claim]) -> list[Claim]:
        """Starts the leases of these claims anew; several times per `lease_ms`, or others take the jobs.

        Returns the claims that are lost: cancelled, taken over, or past their deadline (which ends them here). The
        engine drops those; nothing it writes for them would count.
        """
        claims = list(claims)
        if not claims:
            return []
        pairs = [part for claim in claims for part in (claim.job_id, claim.epoch)]
        return [claims[index] for index in await self._run(scripts.RENEW, consumer, *pairs)]

    async def progress(self, claim: Claim, progress: dict[str, Any]) -> bool:
        """Tells how far the job is. False: the claim is lost, nothing was written (as for all writes below)."""
        return bool(await self._run(scripts.PROGRESS, claim.job_id, claim.epoch, orjson.dumps(progress)))

    async def checkpoint_plan(self, claim: Claim, index: int, plan: Plan) -> bool:
        """Keeps the finished plan of image `index`, so that a later run of the job starts from it."""
        return bool(
            await self._run(scripts.CHECKPOINT_PLAN, claim.job_id, claim.epoch, index, orjson.dumps(plan.to_dict()))
        )

    async def commit(self, claim: Claim, result: JobResult) -> bool:
        """Stores the result and ends the job as succeeded, in one step."""
        return bool(await self._run(scripts.COMMIT, claim.job_id, claim.epoch, *encode_result(result)))

    async def fail(self, claim: Claim, error: JobError) -> bool:
        """Ends the job as failed."""
        return bool(await self._run(scripts.FAIL, claim.job_id, claim.epoch, orjson.dumps(error.to_dict())))

    async def release(self, consumer: str, claim: Claim) -> bool:
        """Hands the job back to its old place in the queue; this run does not count against it."""
        return bool(await self._run(scripts.RELEASE, consumer, claim.job_id, claim.epoch))

    async def surrender(self, consumer: str) -> int:
        """Hands back every job of a consumer that is known to be dead, instead of waiting for its leases to lapse,
        and removes the consumer. The runs count. Returns how many jobs it held."""
        return await self._run(scripts.SURRENDER, consumer)

    async def heartbeat(self, info: EngineInfo, metrics: str, ttl_s: float) -> None:
        """Says that the engine lives, for the next `ttl_s` seconds.

        Args:
            metrics: Prometheus text exposition.
        """
        await self._run(scripts.HEARTBEAT, info.id, round(ttl_s * 1000), orjson.dumps(info.to_dict()), metrics)

    async def retire(self, engine_id: str) -> None:
        """Takes the heartbeat back; the index forgets the engine with the next look at it."""
        with redis_errors():
            await self._redis.delete(self._key("engine", engine_id))

    def ended(self) -> AsyncIterator[str]:
        """Ids of jobs that end while this is iterated, until `close`. Best effort: what happens while the connection
        is broken is not told later, and a broken connection raises nothing."""
        return self._events.ended()

    async def wait_for_work(self, timeout_s: float) -> None:
        """Returns when a job was submitted or handed back since the last call returned, or after `timeout_s`.
        Raises nothing while Redis is away."""
        await self._wake_ups.wait(timeout_s)

    async def close(self) -> None:
        """Ends the subscriptions; the client stays open."""
        await self._events.close()
        await self._wake_ups.close()

    # --- inside -------------------------------------------------------------------------------------------------

    def _key(self, *parts: str) -> str:
        return ":".join((self._prefix, *parts))

    async def _run(self, script: str, *args: str | bytes | float) -> Any:
        if script not in self._scripts:
            self._scripts[script] = self._redis.register_script(script)
        with redis_errors():
            return await self._scripts[script](args=[self._prefix, self._result_ttl_ms, *args])

    async def _heartbeats(self, field: str) -> dict[str, bytes]:
        reply = await self._run(scripts.ENGINES, field)
        return {engine.decode(): value for engine, value in zip(reply[::2], reply[1::2], strict=True)}

    async def _ended_or_left(self, job_id: str) -> JobRecord | float | None:
        """The record if the job has ended, else the seconds left to its deadline (0: expired just now).

        Asks for two fields only, because every waiting request does this once a second.
        """
        with redis_errors():
            async with self._redis.pipeline(transaction=False) as pipe:
                pipe.hmget(self._key("job", job_id), ["state", "deadline"])
                pipe.time()
                (state, deadline), (seconds, microseconds) = await pipe.execute()
        if state is None:
            return None
        if JobState(state.decode()).is_terminal:
            return await self.get(job_id)
        left_s = int(deadline) / 1000 - (seconds + microseconds / 1e6)
        if left_s <= 0:
            await self.expire(job_id)
        return max(left_s, 0.0)
