"""Heartbeat of this API process: without it, engines cancel the jobs of its clients."""

import asyncio
import secrets
from contextlib import suppress

from engine.errors import QueueUnavailable
from engine.jobs.producer import JobProducer
from engine.tasks import stop
from server.redis_timeout import with_redis_timeout

HEARTBEAT_S = 1.0


class ApiHeartbeat:
    def __init__(self, queue: JobProducer) -> None:
        self.api_id = f"api-{secrets.token_hex(8)}"
        self._queue = queue
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._beat())

    async def close(self) -> None:
        if self._task is not None:
            await stop(self._task)

    async def _beat(self) -> None:
        while True:
            with suppress(QueueUnavailable):
                await with_redis_timeout(self._queue.api_heartbeat(self.api_id))
            await asyncio.sleep(HEARTBEAT_S)
