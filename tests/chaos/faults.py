"""Kill and freeze processes, and record which jobs were running.

Engines with a job in its third run are spared: three kills that meet a job by chance dead-letter it by design.
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
    """Kills and freezes engines, and kills Redis."""

    def __init__(self, stack: Stack, rng: random.Random):
        self._stack, self._rng = stack, rng
        self.killed: list[EngineFault] = []
        self.frozen: list[EngineFault] = []
        self.outages: list[Outage] = []

    async def kill_engine(self, *, planned: bool = False) -> None:
        """Kill a busy engine; if `planned`, one with a job that has a plan."""
        engine, jobs = await self._stop_busy_engine(planned)
        engine.kill()
        self.killed.append(EngineFault(time.monotonic(), engine.id, jobs))

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
        """Stop an engine with jobs, none of them in its last run; return both."""
        for _ in range(TRIES):
            engine = self._rng.choice([e for e in self._stack.engines if not e.managed and e.alive])
            runs: dict[str, int] = {}
            plans = 0
            with suppress(ProcessLookupError, RedisError):  # either may have died
                engine.freeze()
                await asyncio.sleep(SETTLE_S)
                runs = await self._runs(engine.id)
                plans = await self._stack.client.exists(*(f"{PREFIX}:plans:{job}" for job in runs)) if runs else 0
            if runs and max(runs.values()) < LAST_RUN and (plans or not planned):
                return engine, sorted(runs)
            with suppress(ProcessLookupError):
                engine.thaw()
            await asyncio.sleep(self._rng.uniform(0.02, 0.1))
        raise AssertionError("no engine was busy")

    async def _runs(self, engine_id: str) -> dict[str, int]:
        """Return the runs of each job of an engine."""
        client: Any = self._stack.client  # redis-py's return types are too loose
        runs_by_job: dict[str, int] = {}
        for job in await client.smembers(f"{PREFIX}:running"):
            owner, runs = await client.hmget(f"{PREFIX}:job:{job.decode()}", ["engine", "runs"])
            if owner is not None and owner.decode() == engine_id:
                runs_by_job[job.decode()] = int(runs)
        return runs_by_job
