"""Waiting for a job and following it, through losses of events and of Redis."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

import orjson

from engine.errors import QueueUnavailable
from engine.jobs.api_side import ApiSide
from engine.jobs.connection import redis_errors
from engine.jobs.job import JobRecord, JobState, PartialImage

_LOOK_EVERY_S = 1.0  # how often `wait` looks by itself, should an event have been lost
_PATIENCE_S = 30.0  # how long past the deadline `wait` hopes for Redis to come back


class Following(ApiSide):
    """See `JobQueue`."""

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
                    left_s = await self._time_left(job_id)
                    record = await self.get(job_id) if left_s is None else None
                except QueueUnavailable:
                    if time.monotonic() > give_up_at:
                        raise
                    pause = _LOOK_EVERY_S
                else:
                    if left_s is None:
                        return _known(record, job_id)
                    give_up_at = time.monotonic() + left_s + _PATIENCE_S
                    pause = min(_LOOK_EVERY_S, left_s)
                with suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await woken.wait()

    async def follow(self, job_id: str) -> AsyncGenerator[JobRecord | PartialImage]:
        """What happens to a job, as it happens: its record, now and whenever it has changed, and each of its partial
        images once; last the record with its end, after all partial images. Expires the job at its deadline.

        Only what can be found in Redis is told, so a break of the connection loses nothing; it is ridden out as by
        `wait`, and the same errors are raised.
        """
        give_up_at = time.monotonic() + _PATIENCE_S
        told: JobRecord | None = None
        shown: set[bytes] = set()
        with self._events.waiter(job_id, every_change=True) as woken:
            while True:
                woken.clear()
                pause = _LOOK_EVERY_S
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
                    give_up_at = time.monotonic() + left_s + _PATIENCE_S
                    pause = min(_LOOK_EVERY_S, left_s)
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
