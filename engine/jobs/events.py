"""Pub/sub: who waits for what, and one connection per channel that serves them all.

Events only wake people up. Nobody may depend on one arriving: a subscriber is told whenever its subscription comes
into force (again), and looks for itself then.
"""

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
    """A pub/sub channel, read over one connection from `start` until `close`, however often that connection breaks.

    Args:
        on_message: called with each message.
        on_open: called when the subscription comes into force, at first and after every break.
    """

    def __init__(
        self,
        redis: redis.asyncio.Redis,
        channel: str,
        *,
        on_message: Callable[[bytes], None],
        on_open: Callable[[], None],
    ):
        self._redis, self._channel = redis, channel
        self._on_message, self._on_open = on_message, on_open
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Starts reading in the background, once; later calls do nothing."""
        if self._task is None:
            self._task = asyncio.create_task(self._stay_subscribed())

    async def close(self) -> None:
        """Ends the reading; `start` may follow."""
        if self._task is not None:
            await stop(self._task)
            self._task = None

    async def _stay_subscribed(self) -> None:
        pause = _FIRST_PAUSE_S
        while True:
            try:
                async with self._redis.pubsub() as pubsub:
                    await pubsub.subscribe(self._channel)
                    while True:
                        message = await pubsub.get_message(timeout=_READ_TIMEOUT_S)
                        if message is not None:
                            pause = _FIRST_PAUSE_S
                            self._dispatch(message["type"], message["data"])
            except (RedisError, OSError) as error:
                log.warning("subscription lost channel=%s retry_s=%.2f error=%s", self._channel, pause, error)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _dispatch(self, kind: str, data: bytes) -> None:
        if kind == "subscribe":
            self._on_open()
        elif kind == "message":
            self._on_message(data)


class JobEvents:
    """What happens to jobs, as it happens: for those who wait for one job, and for those who follow all ends."""

    def __init__(self, redis: redis.asyncio.Redis, channel: str):
        self._waiters: dict[str, set[asyncio.Event]] = {}
        self._watchers: dict[str, set[asyncio.Event]] = {}
        self._followers: set[asyncio.Queue[str | None]] = set()
        self._subscription = Subscription(redis, channel, on_message=self._read, on_open=self._wake_all)

    @contextmanager
    def waiter(self, job_id: str, *, every_change: bool = False) -> Iterator[asyncio.Event]:
        """An event that is set when the job may have ended, or with `every_change` when anything may have happened to
        it: go and look."""
        self._subscription.start()
        woken = asyncio.Event()
        waiters = self._watchers if every_change else self._waiters
        waiters.setdefault(job_id, set()).add(woken)
        try:
            yield woken
        finally:
            waiters[job_id].discard(woken)
            if not waiters[job_id]:
                del waiters[job_id]

    async def ended(self) -> AsyncIterator[str]:
        """Ids of jobs that end from now on, until `close`."""
        self._subscription.start()
        feed: asyncio.Queue[str | None] = asyncio.Queue()
        self._followers.add(feed)
        try:
            while (job_id := await feed.get()) is not None:
                yield job_id
        finally:
            self._followers.discard(feed)

    async def close(self) -> None:
        await self._subscription.close()
        for feed in self._followers:
            feed.put_nowait(None)

    def _read(self, message: bytes) -> None:
        event = orjson.loads(message)
        for woken in self._watchers.get(event["job"], ()):
            woken.set()
        if event.get("state") not in TERMINAL_STATES:
            return
        for woken in self._waiters.get(event["job"], ()):
            woken.set()
        for feed in self._followers:
            feed.put_nowait(event["job"])

    def _wake_all(self) -> None:
        for waiters in (*self._waiters.values(), *self._watchers.values()):
            for woken in waiters:
                woken.set()


class WakeUps:
    """Says that there may be work. A wake-up that comes while nobody waits is kept for the next who does, so none is
    lost between an empty-handed claim and the wait that follows it."""

    def __init__(self, redis: redis.asyncio.Redis, channel: str):
        self._work = asyncio.Event()
        self._subscription = Subscription(redis, channel, on_message=lambda _: self._work.set(), on_open=self._work.set)

    async def wait(self, timeout_s: float) -> None:
        self._subscription.start()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._work.wait()
        self._work.clear()

    async def close(self) -> None:
        await self._subscription.close()
