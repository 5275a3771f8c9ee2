"""Pub/sub over one connection per channel. Events may be lost; a reconnect wakes every waiter."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress

import orjson
import redis.asyncio
from redis.exceptions import RedisError

from engine.jobs.job import TERMINAL_STATES
from engine.tasks import stop

log = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0
_READ_TIMEOUT_S = 30.0


class Subscription:
    """Channels, read across broken connections; `on_open` is called after each."""

    def __init__(
        self,
        redis: redis.asyncio.Redis,
        *channels: str,
        on_message: Callable[[bytes], None],
        on_open: Callable[[], None],
    ):
        self._redis, self._channels = redis, channels
        self._on_message, self._on_open = on_message, on_open
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Read in the background, once."""
        if self._task is None:
            self._task = asyncio.create_task(self._stay_subscribed())

    async def close(self) -> None:
        """Stop reading."""
        if self._task is not None:
            await stop(self._task)
            self._task = None

    async def _stay_subscribed(self) -> None:
        pause = _FIRST_PAUSE_S
        while True:
            try:
                async with self._redis.pubsub() as pubsub:
                    await pubsub.subscribe(*self._channels)
                    while True:
                        message = await pubsub.get_message(timeout=_READ_TIMEOUT_S)
                        if message is not None:
                            pause = _FIRST_PAUSE_S
                            self._dispatch(message["type"], message["data"])
            except (RedisError, OSError) as error:
                if pause == _FIRST_PAUSE_S:  # once per outage
                    log.warning("subscription lost channel=%s error=%s", self._channels[0], error)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _dispatch(self, kind: str, data: bytes) -> None:
        if kind == "subscribe":
            self._on_open()
        elif kind == "message":
            self._on_message(data)


class JobEvents:
    def __init__(self, redis: redis.asyncio.Redis, channel: str):
        self._channel = channel
        self._end_waiters: dict[str, set[asyncio.Event]] = {}
        self._change_waiters: dict[str, set[asyncio.Event]] = {}
        self._listeners: set[asyncio.Queue[str | None]] = set()
        self._subscription = Subscription(redis, channel, on_message=self._read, on_open=self._wake_all)

    @contextmanager
    def waiter(self, job_id: str, *, every_change: bool = False) -> Iterator[asyncio.Event]:
        """Yield an event, set when the job may have changed."""
        self._subscription.start()
        woken = asyncio.Event()
        waiters = self._change_waiters if every_change else self._end_waiters
        waiters.setdefault(job_id, set()).add(woken)
        try:
            yield woken
        finally:
            waiters[job_id].discard(woken)
            if not waiters[job_id]:
                del waiters[job_id]

    async def ended(self) -> AsyncIterator[str]:
        """Yield the ids of ending jobs."""
        self._subscription.start()
        ids: asyncio.Queue[str | None] = asyncio.Queue()
        self._listeners.add(ids)
        try:
            while (job_id := await ids.get()) is not None:
                yield job_id
        finally:
            self._listeners.discard(ids)

    async def close(self) -> None:
        await self._subscription.close()
        for ids in self._listeners:
            ids.put_nowait(None)

    def _read(self, message: bytes) -> None:
        try:
            event = orjson.loads(message)
            job_id, state = str(event["job"]), str(event.get("state"))
        except (ValueError, TypeError, LookupError, AttributeError):
            log.error("an event on %s cannot be read", self._channel)
            return
        for woken in self._change_waiters.get(job_id, ()):
            woken.set()
        if state not in TERMINAL_STATES:
            return
        for woken in self._end_waiters.get(job_id, ()):
            woken.set()
        for ids in self._listeners:
            ids.put_nowait(job_id)

    def _wake_all(self) -> None:
        for waiters in (*self._end_waiters.values(), *self._change_waiters.values()):
            for woken in waiters:
                woken.set()


class WakeUps:
    """Events of new work; one before `wait` ends it."""

    def __init__(self, redis: redis.asyncio.Redis, *channels: str):
        self._work = asyncio.Event()
        self._subscription = Subscription(
            redis, *channels, on_message=lambda _: self._work.set(), on_open=self._work.set
        )

    async def wait(self, timeout_s: float | None) -> None:
        self._subscription.start()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._work.wait()
        self._work.clear()

    async def close(self) -> None:
        await self._subscription.close()
