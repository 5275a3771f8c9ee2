"""The API's side of the queue: submit a job, see how it is, end it, fetch what came of it."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from typing import Any

import orjson

from engine.errors import GlimmerError, KeyReused, QueueFull, QueueReadOnly, QueueUnavailable, SourcesFull, TooManyJobs
from engine.jobs.base import QueueBase
from engine.jobs.codec import RECORD_FIELDS, decode_record, decode_result, encode_sources
from engine.jobs.connection import REDIS_OUTAGE_TIMEOUT_S, redis_errors, retry_while_away
from engine.jobs.job import (
    EngineInfo,
    JobRecord,
    JobResult,
    JobSpec,
    JobState,
    Origin,
    PartialImage,
    Priority,
    QueueStats,
    SourceImages,
)
from engine.jobs.scripts import Argument

_POLL_INTERVAL_S = 1.0  # how often `wait` looks by itself, should an event have been lost
_DELIVERED_TTL_S = 5.0  # leaves time to ask for a result once more, should its answer have been lost on the way

_REFUSALS: dict[bytes, tuple[type[GlimmerError], str]] = {  # by the reply of `submit.lua`
    b"full": (QueueFull, "{max_queue} jobs are waiting already"),
    b"full of sources": (SourcesFull, "the jobs in the queue have {max_source_bytes} bytes of sources, or nearly so"),
    b"too many": (TooManyJobs, "{max_owned} jobs of this owner are waiting or running already"),
    b"reused": (KeyReused, "this idempotency key came with another request before"),
}


class JobProducer(QueueBase):
    """The API's side of the queue."""

    async def submit(
        self,
        spec: JobSpec,
        *,
        job_id: str,
        timeout_s: float,
        priority: Priority,
        max_queue: int,
        source_images: SourceImages | None = None,
        notes: dict[str, Any] | None = None,
        owner: str = "",
        max_owned: int | None = None,
        max_source_bytes: int | None = None,
        idempotency_key: str = "",
        fingerprint: str = "",
        origin: Origin = Origin(),
    ) -> str:
        """Puts a job into the queue. A job id that is known already is left as it is, so a submit whose answer got
        lost can be repeated.

        Args:
            timeout_s: seconds from now to the deadline.
            max_queue: how many jobs may wait, over both priorities.
            sources: what an edit starts from, `spec.num_sources` pictures.
            notes: found again in the job's record.
            owner: whose job it is.
            max_owned: how many jobs the owner may have waiting and running.
            max_source_bytes: memory that the sources of all jobs waiting and running may take in Redis. Those of one
                job always find room where there are no others.
            idempotency_key: a repeated request with the same key gets the job of the first, unless that one has ended
                without a result. It should have the owner in it.
            fingerprint: what tells that a request is the same as the first with this key; without spaces.
            origin: found again in every claim on the job.

        Returns:
            The job's id: `job_id`, or that of the first request with the same key.

        Raises:
            QueueFull: `max_queue` jobs wait already.
            SourcesFull: the sources would be more than `max_source_bytes`.
            TooManyJobs: the owner has `max_owned` already.
            KeyReused: the key came with another fingerprint before.
        """
        arguments: dict[str, Argument] = {
            "id": job_id,
            "priority": priority,
            "images": spec.n,
            "kv_tokens": spec.plan_tokens + spec.prompt_tokens_bound,
            "source_tokens": spec.source_tokens,
            "timeout_ms": round(timeout_s * 1000),
            "owner": owner,
            "idempotency_key": idempotency_key,
            "fingerprint": fingerprint,
            "max_queue": max_queue,
            "max_owned": max_owned,
            "source_bytes": source_images.size if source_images else 0,
            "max_source_bytes": max_source_bytes,
        }
        documents = (orjson.dumps(part) for part in (spec.to_dict(), notes or {}, origin.to_dict()))
        reply = await self._scripts.run("submit", *documents, *encode_sources(source_images), **arguments)
        if reply in _REFUSALS:
            error, message = _REFUSALS[reply]
            raise error(message.format_map(arguments))
        return reply.removeprefix(b"attached ").decode() if reply.startswith(b"attached ") else job_id

    async def cancel(self, job_id: str) -> bool:
        """Ends a queued or running job as cancelled. True if this call ended it."""
        return bool(await self._scripts.run("end_job", id=job_id, state=JobState.CANCELLED.value))

    async def ended_among(self, job_ids: Sequence[str]) -> dict[str, JobState | None]:
        """Those of these jobs that have ended, and how; None where the job is not known. Ends those whose deadline has
        passed. Redis does nothing else meanwhile, so ask for hundreds at once, not for tens of thousands."""
        reply = await self._scripts.run("ended_among", ids=list(job_ids))
        pairs = zip(reply[::2], reply[1::2], strict=True)
        return {job_id.decode(): JobState(state.decode()) if state else None for job_id, state in pairs}

    async def get(self, job_id: str, *, outage_timeout_s: float = 0.0) -> JobRecord | None:
        """The job as it is now; None if it never was, or ended longer than `result_ttl_s` ago.

        Args:
            outage_timeout_s: how long to retry while Redis is away.
        """

        async def ask() -> list[Any]:
            async with self._redis.pipeline(transaction=False) as pipe:
                pipe.hmget(self._key("job", job_id), list(RECORD_FIELDS))
                pipe.zrank(self._key("waiting"), job_id)
                return await pipe.execute()

        values, position = await retry_while_away(ask, outage_timeout_s)
        return decode_record(job_id, values, position)

    async def discard(self, job_id: str) -> bool:
        """Takes back a job whose result nobody wants. True if this call ended it.

        Unlike `cancel` it is also for a submit whose answer never came: should that still be under way, it will not
        take effect. And the result of a job that has succeeded is deleted.
        """
        return bool(await self._scripts.run("discard", id=job_id))

    async def result(self, job_id: str, *, outage_timeout_s: float = 0.0) -> JobResult | None:
        """What a succeeded job left; None for any other, once it was withdrawn, and `result_ttl_s` after the end.

        Args:
            outage_timeout_s: how long to retry while Redis is away.
        """
        key = self._key("result", job_id)
        return decode_result(await retry_while_away(lambda: self._redis.hgetall(key), outage_timeout_s))

    async def shorten_ttl(self, job_id: str) -> None:
        """Says that the result of an ended job has been handed over: its record and its result, which may be megabytes,
        live for some seconds more instead of `result_ttl_s`."""
        ttl_ms = min(round(1000 * _DELIVERED_TTL_S), self._result_ttl_ms)
        await self._scripts.run("shorten_ttl", id=job_id, ttl_ms=ttl_ms)

    async def share(self, token: str, data: bytes, media_type: str) -> None:
        """Keeps a file for `result_ttl_s` seconds for whoever knows the token, unless it is there already."""
        key = self._key("file", token)
        with redis_errors():
            if await self._redis.exists(key):
                return
            async with self._redis.pipeline() as pipe:
                pipe.hset(key, mapping={"data": data, "type": media_type})
                pipe.pexpire(key, self._result_ttl_ms)
                await pipe.execute()

    async def shared(self, token: str) -> tuple[bytes, str] | None:
        """A file that was shared and its media type; None where there is none, or no longer."""
        with redis_errors():
            stored: list[Any] = await self._redis.hmget(self._key("file", token), ["data", "type"])
        data, media_type = stored
        return None if data is None else (data, media_type.decode())

    async def takes_writes(self) -> bool:
        """Whether Redis would take a job now, for all that can be told from a small write."""
        try:
            with redis_errors():
                await self._redis.set(self._key("probe"), b"", px=1000)
        except QueueReadOnly:
            return False
        return True

    async def stats(self) -> QueueStats:
        return QueueStats(*await self._scripts.run("stats"))

    async def engines(self) -> list[EngineInfo]:
        """The engines whose heartbeat has not run out, by id."""
        live = await self._heartbeats("info")
        return [EngineInfo.from_dict(orjson.loads(info)) for info in live.values()]

    async def engine_metrics(self) -> dict[str, str]:
        """Prometheus text exposition of each live engine, by engine id."""
        return {engine: text.decode() for engine, text in (await self._heartbeats("metrics")).items()}

    async def _heartbeats(self, field: str) -> dict[str, bytes]:
        reply = await self._scripts.run("engines", field=field)
        return {engine.decode(): value for engine, value in zip(reply[::2], reply[1::2], strict=True)}

    async def wait(self, job_id: str) -> JobRecord:
        """Returns the record of a job when it has ended; expires the job when its deadline passes first.

        Rides out a Redis that is away, up to half a minute past the deadline.

        Raises:
            QueueUnavailable: Redis stayed away, or has no record of the job.
        """
        give_up_at = time.monotonic() + REDIS_OUTAGE_TIMEOUT_S
        with self._events.waiter(job_id) as woken:
            while True:
                woken.clear()
                try:
                    left_s = await self._time_left(job_id)
                    record = await self.get(job_id) if left_s is None else None
                except QueueUnavailable:
                    if time.monotonic() > give_up_at:
                        raise
                    pause = _POLL_INTERVAL_S
                else:
                    if left_s is None:
                        return _known(record, job_id)
                    give_up_at = time.monotonic() + left_s + REDIS_OUTAGE_TIMEOUT_S
                    pause = min(_POLL_INTERVAL_S, left_s)
                with suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await woken.wait()

    async def follow(self, job_id: str) -> AsyncGenerator[JobRecord | PartialImage]:
        """What happens to a job, as it happens: its record, now and whenever it has changed, and each of its partial
        images once; last the record with its end, after all partial images. Expires the job at its deadline.

        Only what can be found in Redis is told, so a break of the connection loses nothing; it is ridden out as by
        `wait`, and the same errors are raised.
        """
        give_up_at = time.monotonic() + REDIS_OUTAGE_TIMEOUT_S
        told: JobRecord | None = None
        shown: set[bytes] = set()
        with self._events.waiter(job_id, every_change=True) as woken:
            while True:
                woken.clear()
                pause = _POLL_INTERVAL_S
                try:
                    left_s = await self._time_left(job_id) or 0.0
                    record = await self.get(job_id)
                    partials = await self._new_partials(job_id, shown) if record and record.spec.partial_images else []
                except QueueUnavailable:
                    if time.monotonic() > give_up_at:
                        raise
                else:
                    record = _known(record, job_id)
                    for partial in partials:
                        yield partial
                    if record != told:
                        told = record
                        yield record
                    if record.state.is_terminal:
                        return
                    give_up_at = time.monotonic() + left_s + REDIS_OUTAGE_TIMEOUT_S
                    pause = min(_POLL_INTERVAL_S, left_s)
                with suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await woken.wait()

    async def _time_left(self, job_id: str) -> float | None:
        """Seconds left to the deadline of a job that has not ended (0: it was expired just now); None if it has ended
        or is not known.

        Asks for two fields only, because every waiting request does this once a second.
        """
        with redis_errors():
            async with self._redis.pipeline(transaction=False) as pipe:
                pipe.hmget(self._key("job", job_id), ["state", "deadline"])
                pipe.time()
                (state, deadline), (seconds, microseconds) = await pipe.execute()
        if state is None or JobState(state.decode()).is_terminal:
            return None
        left_s = int(deadline) / 1000 - (seconds + microseconds / 1e6)
        if left_s <= 0:
            await self.expire(job_id)
        return max(left_s, 0.0)

    async def _new_partials(self, job_id: str, shown: set[bytes]) -> list[PartialImage]:
        """Partial images that are not among those `shown`, which takes them up, in order."""
        key = self._key("partials", job_id)
        with redis_errors():
            names: list[Any] = await self._redis.hkeys(key)
            pictures = (name for name in names if not name.endswith(b":grid") and name not in shown)
            new = sorted(pictures, key=lambda name: name.split(b":")[::-1])
            if not new:
                return []
            values: list[Any] = await self._redis.hmget(key, [part for name in new for part in (name, name + b":grid")])
        shown.update(new)
        return [
            PartialImage(*(int(part) for part in name.split(b":")), data=data, grid=orjson.loads(grid))
            for name, data, grid in zip(new, values[::2], values[1::2], strict=True)
            if data is not None
        ]


def _known(record: JobRecord | None, job_id: str) -> JobRecord:
    if record is None:
        raise QueueUnavailable(f"Redis has no record of job {job_id}: it was lost, or ended long ago")
    return record
