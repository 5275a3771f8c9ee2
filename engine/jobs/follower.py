"""Waiting for a job's end or changes."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import suppress

import orjson

from engine.errors import QueueUnavailable
from engine.jobs.codec import reading
from engine.jobs.connection import REDIS_OUTAGE_TIMEOUT_S, redis_errors
from engine.jobs.job import JobRecord, JobState
from engine.jobs.producer import JobProducer
from engine.jobs.results import StoredPartial

POLL_INTERVAL_S = 1.0  # an event may be lost


class JobFollower:
    """Follows one job, once, and expires it at its deadline.

    Events only say when to read: a broken connection loses nothing. Raises `QueueUnavailable` without a record, or
    `REDIS_OUTAGE_TIMEOUT_S` after the deadline; `UnreadableJob` if it is damaged.
    """

    def __init__(self, queue: JobProducer, job_id: str) -> None:
        self._queue, self._job_id = queue, job_id
        self._give_up_at = time.monotonic() + REDIS_OUTAGE_TIMEOUT_S
        self._known_partials: set[bytes] = set()

    async def wait(self) -> JobRecord:
        """Return the record when the job has ended."""
        with self._queue.events.waiter(self._job_id) as woken:
            while True:
                woken.clear()
                try:
                    left_s = await self._time_left()
                    record = await self._queue.get(self._job_id) if left_s is None else None
                except QueueUnavailable:
                    if time.monotonic() > self._give_up_at:
                        raise
                    await _wait_for(woken, POLL_INTERVAL_S)
                    continue
                if left_s is None:
                    return self._existing(record)
                await self._pause(woken, left_s)

    async def updates(self) -> AsyncGenerator[JobRecord | StoredPartial]:
        """Yield the record, now and after changes, and each partial image once."""
        last_record: JobRecord | None = None
        with self._queue.events.waiter(self._job_id, every_change=True) as woken:
            while True:
                woken.clear()
                try:
                    left_s = await self._time_left() or 0.0
                    record = await self._queue.get(self._job_id)
                    partials = await self._new_partials() if record and record.spec.partial_images else []
                except QueueUnavailable:
                    if time.monotonic() > self._give_up_at:
                        raise
                    await _wait_for(woken, POLL_INTERVAL_S)
                    continue
                record = self._existing(record)
                for partial in partials:
                    yield partial
                if record != last_record:
                    last_record = record
                    yield record
                if record.state.is_terminal:
                    return
                await self._pause(woken, left_s)

    async def _time_left(self) -> float | None:
        """Return the seconds to the deadline, None after the end; every request polls it: two fields."""
        with redis_errors(), reading(self._job_id):
            async with self._queue.client.pipeline(transaction=False) as pipe:
                pipe.hmget(self._queue.key("job", self._job_id), ["state", "deadline"])
                pipe.time()
                (state, deadline_ms), (seconds, microseconds) = await pipe.execute()
            if state is None or JobState(state.decode()).is_terminal:
                return None
            left_s = int(deadline_ms) / 1000 - (seconds + microseconds / 1e6)
        if left_s <= 0:
            await self._queue.expire(self._job_id)
        return max(left_s, 0.0)

    async def _new_partials(self) -> list[StoredPartial]:
        key, client = self._queue.key("partials", self._job_id), self._queue.client
        with redis_errors(), reading(self._job_id):
            names: list[bytes] = await client.hkeys(key)  # type: ignore[misc]
            images = (name for name in names if not name.endswith(b":grid") and name not in self._known_partials)
            new = sorted(images, key=lambda name: name.split(b":")[::-1])
            if not new:
                return []
            async with client.pipeline(transaction=False) as pipe:
                for name in new:
                    pipe.hstrlen(key, name.decode())
                    pipe.hget(key, f"{name.decode()}:grid")
                values = await pipe.execute()
            self._known_partials.update(new)
            return [
                StoredPartial(*(int(part) for part in name.split(b":")), size=size, grid=orjson.loads(grid))
                for name, size, grid in zip(new, values[::2], values[1::2], strict=True)
                if size
            ]

    async def _pause(self, woken: asyncio.Event, left_s: float) -> None:
        self._give_up_at = time.monotonic() + left_s + REDIS_OUTAGE_TIMEOUT_S
        await _wait_for(woken, min(POLL_INTERVAL_S, left_s))

    def _existing(self, record: JobRecord | None) -> JobRecord:
        if record is None:
            raise QueueUnavailable(f"Redis has no record of job {self._job_id}: it was lost, or ended long ago")
        return record


async def _wait_for(woken: asyncio.Event, timeout_s: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await woken.wait()
