"""Redis, APIs and engines as processes: start, kill, freeze and drain them."""

import asyncio
import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote

import httpx
import redis.asyncio

from benchmarks.api_process import ApiProcess
from engine.config import EngineSettings
from engine.errors import QueueUnavailable
from engine.jobs.connection import connect
from engine.jobs.embedded import EmbeddedRedis
from engine.jobs.job import Stage
from server.processes.engine_death import OomKills, death_is_evidence
from tests.chaos.memory_cgroup import MemoryCgroup
from tests.chaos.stub import StubSettings, run_engine
from tests.failover import FailoverRedis
from tests.job_queue import JobQueue
from tests.proxy import Proxy
from tests.waiting import until

START_S, STOP_S = 120.0, 60.0
POLL_INTERVAL_S = 0.02
BALANCER_S = 0.5  # until a load balancer stops using a draining API

# Engines are forked from a server that has imported everything: so a killed one is replaced in milliseconds, not after
# five seconds of imports. In all else they are like `glimmer engine`.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["__main__", "tests.chaos.campaign"])


@dataclass(frozen=True)
class StackSettings:
    """Numbers and limits of the processes.

    Args:
        requeue_on_death: requeue the jobs of a dead engine at once, as the supervisor of `glimmer serve` does; else
            they wait for the end of the lease, as with an orchestrator of containers.
        redis: starts the Redis in a new folder.
        through_link: APIs and engines reach Redis through `Stack.link`.
        cgroup: of the engines, and `oom_root` a root folder in which `OomKills` finds its counter.
        api_options: further options of APIs; `key` is that of the clients.
        stages: of the engines, one each, in place of `engines` that have all. APIs take requests while one is missing.
    """

    engines: int = 3
    apis: int = 1
    lease_s: float = 2.0
    max_queue: int = 256
    grace_s: float = 30.0
    requeue_on_death: bool = False
    redis: Callable[[Path], EmbeddedRedis | FailoverRedis] = EmbeddedRedis
    through_link: bool = False
    cgroup: MemoryCgroup | None = None
    oom_root: Path = Path("/")
    api_options: Mapping[str, object] = field(default_factory=dict)
    key: str | None = None
    stages: Sequence[Stage] = ()
    stub: StubSettings = field(default_factory=StubSettings)


@dataclass(frozen=True)
class Death:
    """An engine that ended without being asked to."""

    at: float
    engine: str
    exit_code: int


class Engine:
    """An engine that can be restarted, each time under a new name.

    `managed`: a fault or a restart is in progress, so that others leave it alone and do not restart it.
    """

    def __init__(self, number: int, redis_url: str, settings: StackSettings, folder: Path, stage: Stage = "all"):
        self._number, self._settings, self._folder = number, settings, folder
        self.stage: Stage = stage
        self._redis_url, self._starts = redis_url, 0
        self.managed = False
        self.start()

    def start(self) -> None:
        """Start a process under a new name."""
        self._starts += 1
        self.id = f"engine-{self._number}-{self._starts}"
        settings = EngineSettings(
            redis_url=self._redis_url,
            engine_id=self.id,
            stage=self.stage,
            lease_s=self._settings.lease_s,
            plan_cache_s=0,  # so that known plans are those kept by an earlier run of the job
            grace_s=self._settings.grace_s,
        )
        self._oom_kills = OomKills(self._settings.oom_root)
        self._process = FORKS.Process(target=run_engine, args=(settings, self._settings.stub, self._folder))
        self._process.start()
        if self._settings.cgroup is not None:
            self._settings.cgroup.add(self.pid)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """Return None while it runs."""
        return self._process.exitcode

    @property
    def alive(self) -> bool:
        return self.exit_code is None

    @property
    def death_is_evidence(self) -> bool:
        """Return whether a supervisor would suspect the jobs."""
        return death_is_evidence(self.exit_code or 0, may_be_oom=self._oom_kills.may_have_risen())

    def kill(self) -> None:
        with suppress(ProcessLookupError):  # it may have died of a job just now
            os.kill(self.pid, signal.SIGKILL)
        self.managed = False

    def freeze(self) -> None:
        """Stop the process with SIGSTOP."""
        self.managed = True
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        self.managed = False
        os.kill(self.pid, signal.SIGCONT)

    async def drain(self) -> int:
        """Send SIGTERM, thaw the process if it is frozen, and return the exit code."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)
            os.kill(self.pid, signal.SIGCONT)
        await until(lambda: not self.alive, STOP_S)
        return self.exit_code or 0


class Api(ApiProcess):
    """One `glimmer api` process."""

    def __init__(self, number: int, redis_url: str, settings: StackSettings, folder: Path):
        options = {"redis-url": redis_url, "max-queue": settings.max_queue, "grace-s": settings.grace_s}
        options |= {"drain-delay-s": 2 * BALANCER_S, **settings.api_options}
        variables = {"GLIMMER_SCALE_TO_ZERO": "true"} if settings.stages else {}
        super().__init__(options, folder / f"api-{number}-{time.monotonic_ns()}.log", variables)

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
    """A Redis, APIs and engines; dead engines are restarted. Create it in the main thread.

    `queue` and `client` are connections to the Redis, for tests. `requeues_on_death` is that of the settings and may be
    changed.
    """

    def __init__(self, folder: Path, settings: StackSettings):
        self.settings, self.folder = settings, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.redis: Any = settings.redis(folder / "redis")
        self.link = Proxy(Path(unquote(self.redis.url.removeprefix("unix://"))))
        self._url = self.link.url if settings.through_link else self.redis.url
        stages: list[Stage] = [*settings.stages] or ["all" for _ in range(settings.engines)]
        self._numbers = itertools.count(len(stages))
        self.engines = [Engine(number, self._url, settings, folder, stage) for number, stage in enumerate(stages)]
        self.apis = [Api(number, self._url, settings, folder) for number in range(settings.apis)]
        self.requeues_on_death = settings.requeue_on_death
        self.deaths: list[Death] = []
        self.exit_codes: list[int] = []
        self._restarting: asyncio.Task[None] | None = None
        self._resources = AsyncExitStack()

    async def __aenter__(self) -> Self:
        await self._resources.enter_async_context(self.link)
        self.client: redis.asyncio.Redis = connect(self.redis.url)
        self.queue = JobQueue(self.client, lease_ms=round(1000 * self.settings.lease_s))
        try:
            for api in self.apis:
                await api.ready()
            await until(self._all_ready, START_S)
        except BaseException:
            self._kill_all()
            raise
        self._restarting = asyncio.create_task(self._restart_dead_engines())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Drain engines and APIs, then stop Redis; `exit_codes` has those of the engines, then of the APIs."""
        if self._restarting is None:
            return
        self._restarting.cancel()
        self._restarting = None
        try:
            drains = [process.drain() for process in (*self.engines, *self.apis)]
            self.exit_codes = list(await asyncio.gather(*drains))
            await self.queue.close()
            await self.client.aclose()
            await self._resources.aclose()
        finally:
            self._kill_all()

    @property
    def crashes(self) -> int:
        return len(self.deaths)

    @property
    def urls(self) -> list[str]:
        return [api.url for api in self.apis]

    async def restart_engine(self, engine: Engine) -> int:
        """Drain an engine and start another in its place. Returns the exit code."""
        engine.managed = True
        code = await engine.drain()
        engine.start()
        engine.managed = False
        return code

    async def scale(self, stage: Stage, count: int) -> list[int]:
        """Start or drain engines until a stage has `count`. Returns the exit codes of those that were drained."""
        engines = [engine for engine in self.engines if engine.stage == stage]
        for _ in range(count - len(engines)):
            self.engines.append(Engine(next(self._numbers), self._url, self.settings, self.folder, stage))
        leaving = engines[count:]
        for engine in leaving:
            engine.managed = True
        codes = await asyncio.gather(*(engine.drain() for engine in leaving))
        self.engines = [engine for engine in self.engines if engine not in leaving]
        return list(codes)

    async def restart_api(self, number: int) -> int:
        """Start another API and drain the old one, which clients still use for a moment, as behind a load balancer.

        Returns the old one's exit code.
        """
        new = Api(number, self._url, self.settings, self.folder)
        await new.ready()
        old = self.apis[number]
        draining = asyncio.create_task(old.drain())
        await asyncio.sleep(BALANCER_S)
        self.apis[number] = new
        return await draining

    async def redis_answers(self) -> None:
        """Return when Redis responds."""
        await until(lambda: asyncio.to_thread(self.redis.answers), START_S)

    def _kill_all(self) -> None:
        """Kill all processes that still run."""
        for process in (*self.engines, *self.apis):
            if process.alive:
                os.kill(process.pid, signal.SIGKILL)
        self.redis.stop()
        if self.settings.cgroup is not None:
            self.settings.cgroup.remove()

    async def _all_ready(self) -> bool:
        for engine in self.engines:
            assert engine.alive, (self.folder / f"{engine.id}.log").read_text()
        return sum(engine.state == "ready" for engine in await self.queue.engines()) == len(self.engines)

    async def _restart_dead_engines(self) -> None:
        while True:
            for engine in self.engines:
                if not engine.alive and not engine.managed:
                    await self._replace(engine)
            await asyncio.sleep(POLL_INTERVAL_S)

    async def _replace(self, engine: Engine) -> None:
        dead_id, blame = engine.id, engine.death_is_evidence
        self.deaths.append(Death(time.monotonic(), dead_id, engine.exit_code or 0))
        engine.start()
        if self.requeues_on_death:
            with suppress(QueueUnavailable):
                await self.queue.requeue_all(dead_id, blame)
                await self.queue.deregister(dead_id)
