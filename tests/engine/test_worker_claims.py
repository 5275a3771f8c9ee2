"""When an engine claims and renews, and what it writes in which order."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import redis.asyncio

from engine.config import EngineSettings
from engine.engine import Engine
from engine.errors import QueueUnavailable
from engine.jobs.job import Claim, EngineInfo, FreeCapacity, JobSpec, JobState, Plan
from engine.jobs.results import JobResult, PartialImage
from engine.worker import worker as worker_module
from engine.worker.plan_cache import PlanCache
from engine.worker.watchdog import Watchdog
from engine.worker.worker import Worker
from models.glm_image.model import GlmImage
from tests.checkpoints import small_engine
from tests.job_queue import JobQueue
from tests.jobs.helpers import IDLE
from tests.jobs.helpers import submit as submit_small
from tests.waiting import until

SPEC = JobSpec("a poster", 64, 64, seed=1, num_inference_steps=3)


class Recorded(JobQueue):
    """Notes what an engine calls; claims fail while `away`."""

    def __init__(self, client: redis.asyncio.Redis):
        super().__init__(client)
        self.calls: list[str] = []
        self.away = self.quarantines = False
        self.is_drawn: Callable[[], bool] = lambda: True
        self.committing = asyncio.Event()

    async def ping(self) -> None:
        self.calls.append("ping")
        await super().ping()

    async def claim(self, consumer: str, free: FreeCapacity) -> Claim | None:
        self.calls.append("claim")
        if self.away:
            raise QueueUnavailable("planted")
        granted = await super().claim(consumer, free)
        return replace(granted, quarantined=self.quarantines) if granted else None

    async def renew(self, consumer: str, claims: Any) -> list[Claim]:
        self.calls.append("renew")
        return await super().renew(consumer, claims)

    async def partial_image(self, claim: Claim, partial: PartialImage) -> bool:
        """Take until after the last step, so that a commit could come first."""
        await until(self.is_drawn, seconds=None)
        with suppress(TimeoutError):
            await asyncio.wait_for(self.committing.wait(), 0.3)
        self.calls.append("partial")
        return await super().partial_image(claim, partial)

    async def commit(self, claim: Claim, result: JobResult) -> bool:
        self.calls.append(f"commit {claim.job_id}")
        self.committing.set()
        return await super().commit(claim, result)


@pytest.fixture
async def recorded(redis_client: redis.asyncio.Redis) -> AsyncIterator[Recorded]:
    queue = Recorded(redis_client)
    yield queue
    await queue.close()


def make_worker(queue: JobQueue, engine: Engine, lease_s: float = 1.0) -> Worker:
    settings = EngineSettings(redis_url="", engine_id="engine", lease_s=lease_s)
    return Worker(engine, queue, EngineInfo("engine", 1, "all", "ready", "m", "64x64", 512, 2048), settings)


async def finish(queue: JobQueue, engine: Engine, *job_ids: str) -> None:
    """Run a worker until the jobs have succeeded."""
    worker = make_worker(queue, engine, lease_s=10)
    running = asyncio.ensure_future(worker.run())
    try:
        for job_id in job_ids:
            assert (await queue.wait(job_id)).state is JobState.SUCCEEDED
    finally:
        worker.drain()
        await running


@pytest.fixture
async def worker(recorded: Recorded, model: GlmImage, monkeypatch: pytest.MonkeyPatch) -> Worker:
    """Return a worker that does not run: a test calls what its loops call."""
    monkeypatch.setattr(worker_module, "REDIS_RETRY_S", 0)
    return make_worker(recorded, small_engine(model))


async def test_a_stuck_engine_neither_claims_nor_renews(
    recorded: Recorded, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its leases must lapse, so that others get its jobs even if it cannot reach Redis to hand them back."""
    await submit_small(recorded)
    worker._redis_was_away = True
    with monkeypatch.context() as patch:
        patch.setattr(Watchdog, "is_stuck", True)
        for _ in range(2):
            assert await worker._next_claim() is None
        await worker._renew_leases()
        assert recorded.calls == []
    assert await worker._next_claim() is not None


async def test_an_engine_that_gets_stuck_while_it_renews_does_not_claim(
    recorded: Recorded, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def renew(*_: Any) -> list[Claim]:
        monkeypatch.setattr(Watchdog, "is_stuck", True)
        return []

    await submit_small(recorded)
    worker._redis_was_away = True
    monkeypatch.setattr(recorded, "renew", renew)
    assert await worker._next_claim() is None
    assert "claim" not in recorded.calls


@pytest.mark.parametrize("cause", ["an outage", "a pause"])
async def test_leases_are_renewed_before_a_claim(recorded: Recorded, worker: Worker, cause: str) -> None:
    """A claim takes lapsed leases first: without a renewal an engine would take its own jobs from itself."""
    await submit_small(recorded)
    if cause == "an outage":
        recorded.away = True
        assert await worker._next_claim() is None
        recorded.away = False
    else:
        worker._renewed_at -= 100
    recorded.calls.clear()
    assert await worker._next_claim() is not None
    assert recorded.calls[:3] == ["ping", "renew", "claim"]


async def test_after_an_outage_other_engines_get_time_to_renew(recorded: Recorded, model: GlmImage) -> None:
    await submit_small(recorded)
    worker = make_worker(recorded, small_engine(model), lease_s=10_000)
    worker._redis_was_away = True
    claiming = asyncio.create_task(worker._next_claim())
    await until(lambda: "renew" in recorded.calls)
    for _ in range(20):
        await recorded.stats()
    assert "claim" not in recorded.calls
    worker.drain()
    assert await claiming is None


async def test_nothing_runs_beside_a_suspect(recorded: Recorded, model: GlmImage) -> None:
    """It may bring the engine down."""
    recorded.quarantines = True
    for job_id in ("a", "b"):
        await submit_small(recorded, job_id=job_id, num_inference_steps=3)
    await finish(recorded, small_engine(model), "a", "b")
    first, second = (recorded.calls.index(f"commit {job_id}") for job_id in ("a", "b"))
    assert "claim" in recorded.calls[first:second]
    assert recorded.calls[:first].count("claim") == 1


async def test_no_partial_image_comes_after_the_result(recorded: Recorded, model: GlmImage) -> None:
    engine = small_engine(model)
    recorded.is_drawn = lambda: engine.is_idle
    await submit_small(recorded, job_id="a", num_inference_steps=4, partial_images=2)
    await finish(recorded, engine, "a")
    assert [call for call in recorded.calls if call[:4] in ("part", "comm")] == ["partial", "partial", "commit a"]


async def test_a_plan_of_an_earlier_run_wins_over_a_cached_one(queue: JobQueue, model: GlmImage) -> None:
    """The client may have seen partial images of it."""
    engine = small_engine(model)
    planner = queue.planner = model.planning_fingerprint()
    spec = replace(SPEC, return_plan=True)
    cached, checkpointed = (Plan(2, 2, [token] * 4) for token in (1, 2))
    await queue.submit(spec, job_id="a", timeout_s=60, priority="interactive", max_queue=9)
    granted = await queue.claim("earlier", IDLE)
    assert granted is not None
    assert await queue.checkpoint_plan(granted, 0, checkpointed)
    await queue.requeue_all("earlier")
    await PlanCache(queue, planner, 60).store(spec, None, 0, cached)
    await finish(queue, engine, "a")
    result = await queue.result("a")
    assert result is not None
    assert result.images[0].plan == checkpointed.to_dict()
