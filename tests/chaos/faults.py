"""What is done to the processes, and what was running when it was done.

A job in its third run is spared: whatever takes three engines with it is given up, by design, and three kills that
meet the same job by chance cannot be told from that.
"""

import asyncio
import os
import random
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from redis.exceptions import RedisError

from tests.chaos.processes import Engine, Stack
from tests.chaos.redis_contents import PREFIX

LAST_RUN = 3
TRIES = 200
SETTLE_S = 0.02  # for what a stopped process had sent already
THAWED_S = 0.3  # for the stale writes of an engine that goes on


@dataclass(frozen=True)
class Struck:
    """An engine that was killed or went on after a freeze, when, and the jobs it had had."""

    at: float
    engine: str
    jobs: list[str]


@dataclass(frozen=True)
class Outage:
    """Redis killed at `began`; at `over` it answered again."""

    began: float
    over: float


class Faults:
    """Faults, one after the other."""

    def __init__(self, stack: Stack, rng: random.Random):
        self._stack, self._rng = stack, rng
        self.killed: list[Struck] = []
        self.frozen: list[Struck] = []
        self.outages: list[Outage] = []

    async def kill_engine(self, *, planned: bool = False) -> None:
        """SIGKILL, to an engine that is at work; if `planned`, on a job that has a plan already."""
        engine, jobs = await self._stopped_at_work(planned)
        engine.kill()
        self.killed.append(Struck(time.monotonic(), engine.id, jobs))

    async def freeze_engine(self) -> None:
        """SIGSTOP to an engine that is at work, SIGCONT once its leases have lapsed and others have its jobs."""
        engine, jobs = await self._stopped_at_work()
        await asyncio.sleep(self._stack.settings.lease_s + 1.0)
        self.frozen.append(Struck(time.monotonic(), engine.id, jobs))
        engine.thaw()
        await asyncio.sleep(THAWED_S)

    async def kill_redis(self, away_s: float) -> None:
        """SIGKILL, some time without, and a start with what the append-only file has."""
        began = time.monotonic()
        os.kill(self._stack.redis.pid, signal.SIGKILL)
        await asyncio.sleep(away_s)
        self._stack.redis.restart()
        await self._stack.redis_answers()
        self.outages.append(Outage(began, time.monotonic()))

    async def _stopped_at_work(self, planned: bool = False) -> tuple[Engine, list[str]]:
        """An engine with jobs none of which is in its last run, stopped, and those jobs."""
        for _ in range(TRIES):
            engine = self._rng.choice([e for e in self._stack.engines if not e.managed and e.alive])
            runs: dict[str, int] = {}
            plans = 0
            with suppress(ProcessLookupError, RedisError):  # either may have died just now
                engine.freeze()
                await asyncio.sleep(SETTLE_S)
                runs = await self._runs(engine.id)
                plans = await self._stack.client.exists(*(f"{PREFIX}:plans:{job}" for job in runs)) if runs else 0
            if runs and max(runs.values()) < LAST_RUN and (plans or not planned):
                return engine, sorted(runs)
            with suppress(ProcessLookupError):
                engine.thaw()
            await asyncio.sleep(self._rng.uniform(0.02, 0.1))
        raise AssertionError("no engine was at work")

    async def _runs(self, engine_id: str) -> dict[str, int]:
        """The jobs that an engine has, and how often each was run."""
        client: Any = self._stack.client  # redis-py types what it returns too loosely
        found: dict[str, int] = {}
        for job in await client.smembers(f"{PREFIX}:running"):
            owner, runs = await client.hmget(f"{PREFIX}:job:{job.decode()}", ["engine", "runs"])
            if owner is not None and owner.decode() == engine_id:
                found[job.decode()] = int(runs)
        return found
