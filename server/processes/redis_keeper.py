import asyncio
import logging

from engine.jobs.embedded import EmbeddedRedis
from engine.observability.logs import event
from server.processes.backoff import Backoff

POLL_INTERVAL_S = 0.5

logger = logging.getLogger("glimmer.serve")


async def keep_alive(redis: EmbeddedRedis, backoff: Backoff = Backoff(initial=0.5)) -> None:
    """Restart Redis whenever it dies. Do not wait until it has loaded: its data is on disk, clients reconnect."""
    clock = asyncio.get_running_loop().time
    delay, deaths, started_at, loading = 0.0, 0, clock(), False
    while True:
        await asyncio.sleep(POLL_INTERVAL_S)
        if redis.alive:
            if loading and await asyncio.to_thread(redis.answers):
                loading = False
                event(logger, "redis_started", pid=redis.pid)
            continue
        uptime = clock() - started_at
        deaths = 1 if uptime >= backoff.reset_after else deaths + 1
        delay = backoff.next_delay(delay, uptime) if deaths > 1 else 0.0
        event(logger, "redis_died", logging.ERROR, reason=redis.last_words(), restart_in_s=delay)
        await asyncio.sleep(delay)
        await asyncio.to_thread(redis.repair)
        started_at = clock()
        try:
            redis.restart()  # not in a thread: Redis ends with the thread that starts it
            loading = True
        except OSError as error:
            event(logger, "redis_not_started", logging.ERROR, reason=error)
