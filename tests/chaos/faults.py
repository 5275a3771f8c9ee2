"""Kill and freeze processes, and record which jobs were running."""

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from redis.exceptions import RedisError

from engine.jobs.job import Stage
from tests.chaos.processes import Engine, Stack
from tests.chaos.redis_contents import PREFIX

TRIES = 200
SETTLE_S = 0.02  # for commands that a stopped process has sent
THAWED_S = 0.3  # for the stale writes of a continued engine


@dataclass(frozen=True)
class EngineFault:
    """An engine that was killed, or continued after a freeze, and the jobs it had."""

    at: float
    engine: str
    jobs: list[str]


@dataclass(frozen=True)
class Outage:
    """Redis was killed at `began` and answered again at `over`."""

    began: float
    over: float


class Faults:
    """Kills and freezes engines, and kills Redis. `killed_at_random` has the names of engines."""

    def __init__(self, stack: Stack, rng: random.Random):
        self._stack, self._rng = stack, rng
        self.killed: list[EngineFault] = []
        self.killed_at_random: list[str] = []
        self.frozen: list[EngineFault] = []
        self.outages: list[Outage] = []

    async def kill_engine(self, *, planned: bool = False) -> None:
        """Kill a busy engine; if `planned`, one with a job that has a plan."""
        engine, jobs = await self._stop_busy_engine(planned)
        engine.kill()
        self.killed.append(EngineFault(time.monotonic(), engine.id, jobs))

    async def kill_stage(self, stage: Stage) -> None:
        """Kill all engines of a stage at once."""
        engines = [engine for engine in self._stack.engines if engine.stage == stage and engine.alive]
        for engine in engines:
            engine.freeze()
        await asyncio.sleep(SETTLE_S)
        jobs = [await self._jobs(engine.id) for engine in engines]
        for engine, had in zip(engines, jobs, strict=True):
            engine.kill()
            self.killed.append(EngineFault(time.monotonic(), engine.id, sorted(had)))

    async def kill_at_random(self, count: int | None, interval_s: float) -> None:
        """Kill `count` engines (None: no end) at random moments, `interval_s` apart on average, whatever they do."""
        while count is None or len(self.killed_at_random) < count:
            await asyncio.sleep(self._rng.expovariate(1 / interval_s))
            if alive := [engine for engine in self._stack.engines if engine.alive]:
                engine = self._rng.choice(alive)
                self.killed_at_random.append(engine.id)
                engine.kill()

    @asynccontextmanager
    async def random_kills(self, interval_s: float) -> AsyncIterator[None]:
        """Kill engines at random during the block."""
        killing = asyncio.create_task(self.kill_at_random(None, interval_s))
        try:
            yield
        finally:
            killing.cancel()

    async def freeze_engine(self) -> None:
        """Freeze a busy engine until its leases have lapsed and others have its jobs."""
        engine, jobs = await self._stop_busy_engine()
        await asyncio.sleep(self._stack.settings.lease_s + 1.0)
        self.frozen.append(EngineFault(time.monotonic(), engine.id, jobs))
        engine.thaw()
        await asyncio.sleep(THAWED_S)

    async def kill_redis(self, away_s: float) -> None:
        """Kill Redis and restart it with its file after `away_s`."""
        began = time.monotonic()
        os.kill(self._stack.redis.pid, signal.SIGKILL)
        await asyncio.sleep(away_s)
        self._stack.redis.restart()
        await self._stack.redis_answers()
        self.outages.append(Outage(began, time.monotonic()))

    async def _stop_busy_engine(self, planned: bool = False) -> tuple[Engine, list[str]]:
        """Stop an engine with jobs; return both."""
        for _ in range(TRIES):
            engine = self._rng.choice([e for e in self._stack.engines if not e.managed and e.alive])
            jobs: list[str] = []
            plans = 0
            with suppress(ProcessLookupError, RedisError):  # either may have died
                engine.freeze()
                await asyncio.sleep(SETTLE_S)
                jobs = await self._jobs(engine.id)
                plans = await self._stack.client.exists(*(f"{PREFIX}:plans:{job}" for job in jobs)) if jobs else 0
            if jobs and (plans or not planned):
                return engine, sorted(jobs)
            with suppress(ProcessLookupError):
                engine.thaw()
            await asyncio.sleep(self._rng.uniform(0.02, 0.1))
        raise AssertionError("no engine was busy")

    async def _jobs(self, engine_id: str) -> list[str]:
        client: Any = self._stack.client  # redis-py's return types are too loose
        jobs = [job.decode() for job in await client.smembers(f"{PREFIX}:running")]
        owners = [await client.hget(f"{PREFIX}:job:{job}", "engine") for job in jobs]
        return [job for job, owner in zip(jobs, owners, strict=True) if owner == engine_id.encode()]
