"""Redis, APIs and engines as processes of their own, and what is done to them."""

import asyncio
import multiprocessing
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import httpx
import redis.asyncio

from benchmarks.api_process import ApiProcess
from engine.config import EngineSettings
from engine.errors import QueueUnavailable
from engine.jobs.connection import connect
from engine.jobs.embedded import EmbeddedRedis
from tests.chaos.stub import StubSettings, run_engine
from tests.job_queue import JobQueue
from tests.waiting import until

START_S, STOP_S = 120.0, 60.0
LOOK_S = 0.02
BALANCER_S = 0.5  # until a balancer has taken a draining API out

# A killed engine is to be replaced in milliseconds, not after five seconds of imports: a server that has imported
# everything forks the engines. They are processes like any other, in nothing else unlike `glimmer engine`.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["__main__", "tests.chaos.campaign"])


@dataclass(frozen=True)
class StackSettings:
    """
    Args:
        lease_s: of the engines.
        max_queue: jobs that may wait.
        surrendered: whether whoever starts a dead engine again gives its jobs to the others at once, as the supervisor
            of `glimmer serve` does, or leaves that to the lease, as an orchestrator of containers does.
    """

    engines: int = 3
    apis: int = 1
    lease_s: float = 2.0
    max_queue: int = 256
    grace_s: float = 30.0
    surrendered: bool = False
    stub: StubSettings = field(default_factory=StubSettings)


class Engine:
    """One place for an engine, and the process that fills it now.

    `in_hand`: somebody does something to it; it is to be left alone, and not to be started again if it ends.
    """

    def __init__(self, slot: int, redis_url: str, settings: StackSettings, folder: Path):
        self._slot, self._settings, self._folder = slot, settings, folder
        self._redis_url, self._starts = redis_url, 0
        self.in_hand = False
        self.start()

    def start(self) -> None:
        """Starts a process under a new name."""
        self._starts += 1
        self.id = f"engine-{self._slot}-{self._starts}"
        settings = EngineSettings(
            redis_url=self._redis_url,
            engine_id=self.id,
            lease_s=self._settings.lease_s,
            plan_cache_s=0,  # so that a plan that is known is one that an earlier run of the job has kept
            grace_s=self._settings.grace_s,
        )
        self._process = _FORKS.Process(target=run_engine, args=(settings, self._settings.stub, self._folder))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.exitcode

    @property
    def alive(self) -> bool:
        return self.exit_code is None

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.in_hand = False

    def freeze(self) -> None:
        """Stops the process where it is; it does not notice."""
        self.in_hand = True
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        self.in_hand = False
        os.kill(self.pid, signal.SIGCONT)

    async def drain(self) -> int:
        """SIGTERM, and the exit code; a process that was left frozen goes on first."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)
            os.kill(self.pid, signal.SIGCONT)
        await until(lambda: not self.alive, STOP_S)
        return self.exit_code or 0


class Api(ApiProcess):
    """One `glimmer api` process."""

    def __init__(self, number: int, redis_url: str, settings: StackSettings, folder: Path):
        options = {"redis-url": redis_url, "max-queue": settings.max_queue, "grace-s": settings.grace_s}
        super().__init__(options, folder / f"api-{number}-{time.monotonic_ns()}.log")

    async def ready(self) -> None:
        """Return when it answers."""
        await until(self.listens, START_S)
        async with httpx.AsyncClient(base_url=self.url, trust_env=False) as client:
            await client.get("/live", timeout=START_S)  # its socket listens already

    async def drain(self) -> int:
        """Send SIGTERM and return the exit code."""
        self.terminate()
        await until(lambda: not self.alive, STOP_S)
        return self.exit_code or 0


class Stack:
    """A Redis of its own, APIs and engines; dead engines are started again. Make it in the main thread.

    `queue` and `client` look at the Redis from outside.
    """

    def __init__(self, folder: Path, settings: StackSettings):
        self.settings, self.folder = settings, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.redis = EmbeddedRedis(folder / "redis")
        self.engines = [Engine(slot, self.redis.url, settings, folder) for slot in range(settings.engines)]
        self.apis = [Api(number, self.redis.url, settings, folder) for number in range(settings.apis)]
        self.crashes = 0
        self.exit_codes: list[int] = []
        self._keeping: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self.client: redis.asyncio.Redis = connect(self.redis.url)
        self.queue = JobQueue(self.client, lease_ms=round(1000 * self.settings.lease_s))
        try:
            for api in self.apis:
                await api.ready()
            await until(self._all_there, START_S)
        except BaseException:
            self._abandon()
            raise
        self._keeping = asyncio.create_task(self._keep_engines())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Drains what runs, then ends Redis; `exit_codes` has what the engines and then the APIs said."""
        if self._keeping is None:
            return
        self._keeping.cancel()
        self._keeping = None
        try:
            ends = [part.drain() for part in (*self.engines, *self.apis)]
            self.exit_codes = list(await asyncio.gather(*ends))
            await self.queue.close()
            await self.client.aclose()
        finally:
            self._abandon()

    @property
    def urls(self) -> list[str]:
        return [api.url for api in self.apis]

    async def restart_engine(self, engine: Engine) -> int:
        """Drains an engine and starts another in its place. Returns the exit code."""
        engine.in_hand = True
        code = await engine.drain()
        engine.start()
        engine.in_hand = False
        return code

    async def restart_api(self, number: int) -> int:
        """Starts another API and drains the old one, which clients still find for a moment, as they would behind a
        balancer. Returns the old one's exit code."""
        new = Api(number, self.redis.url, self.settings, self.folder)
        await new.ready()
        old = self.apis[number]
        draining = asyncio.create_task(old.drain())
        await asyncio.sleep(BALANCER_S)
        self.apis[number] = new
        return await draining

    async def redis_answers(self) -> None:
        """Returns when Redis takes commands."""
        await until(lambda: asyncio.to_thread(self.redis.answers), START_S)

    def _abandon(self) -> None:
        """Ends whatever still runs."""
        for part in (*self.engines, *self.apis):
            if part.alive:
                os.kill(part.pid, signal.SIGKILL)
        self.redis.stop()

    async def _all_there(self) -> bool:
        for engine in self.engines:
            assert engine.alive, (self.folder / f"{engine.id}.log").read_text()
        return sum(engine.state == "ready" for engine in await self.queue.engines()) == len(self.engines)

    async def _keep_engines(self) -> None:
        while True:
            for engine in self.engines:
                if not engine.alive and not engine.in_hand:
                    self.crashes += 1
                    dead = engine.id
                    engine.start()
                    if self.settings.surrendered:
                        with suppress(QueueUnavailable):
                            await self.queue.requeue_all(dead)
                            await self.queue.deregister(dead)
            await asyncio.sleep(LOOK_S)
