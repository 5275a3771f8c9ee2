"""Processes of the release before stages and of this one share a queue, in any order of upgrades."""

import asyncio
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from engine.jobs.connection import connect
from engine.jobs.embedded import EmbeddedRedis
from engine.jobs.job import Claim, Plan, Stage
from engine.jobs.scripts import LuaScripts
from tests.job_queue import JobQueue
from tests.jobs.helpers import IDLE, RESULT, ROOMY, claim, submit

PREVIOUS = "tests.jobs.previous_release"
PLAN = Plan(1, 1, [1])
LEASE_MS = 3_600_000


def old_queue(client: Any, **options: Any) -> JobQueue:
    """Return a queue with the scripts of the previous release."""
    queue = JobQueue(client, **options)
    queue._scripts = LuaScripts(client, PREVIOUS, prefix=queue.prefix, result_ttl_ms=1000 * queue.result_ttl_s)
    return queue


class Fleet:
    """Old and new engines and APIs, and what they have claimed."""

    def __init__(self, client: Any):
        self.client = client
        self.old = old_queue(client, lease_ms=LEASE_MS)
        self.new: dict[Stage, JobQueue] = {
            stage: JobQueue(client, stage=stage, lease_ms=LEASE_MS) for stage in ("all", "plan", "render")
        }
        self.claims: list[tuple[str, JobQueue, Claim]] = []
        self.jobs: list[str] = []
        self.cancelled, self.committed = set[str](), list[str]()

    async def submit(self, api: str, priority: Any) -> None:
        queue = self.old if api == "old" else self.new["all"]
        self.jobs.append(await submit(queue, priority=priority, job_id=f"job-{len(self.jobs)}"))

    async def claim(self, engine: str) -> None:
        queue = self.old if engine == "old" else self.new[engine]  # type: ignore[index]
        if granted := await queue.claim(engine, ROOMY if len(self.claims) % 3 else IDLE):
            assert engine != "old" or granted.handed_over is None
            self.claims.append((engine, queue, granted))

    async def work(self, back: int, how: str) -> None:
        """Let the engine of a claim, maybe a lost one, end it, plan it, hand it back or die."""
        if not self.claims:
            return
        engine, queue, granted = self.claims[-1 - back % len(self.claims)]
        if how == "checkpoint":
            await queue.checkpoint_plan(granted, 0, PLAN)
        elif how == "requeue":
            await queue.requeue(engine, granted)
        elif how == "dies":
            await queue.requeue_all(engine, blame=False)
        elif how == "lapses":
            for name in ("interactive", "render:interactive", "batch", "render:batch"):
                entry = await self.client.hget(f"glimmer:job:{granted.job_id}", "entry")
                pending = await self.client.exists(f"glimmer:queue:{name}")
                if pending and entry:
                    key = f"glimmer:queue:{name}"
                    await self.client.xclaim(key, "engines", engine, 0, [entry], idle=LEASE_MS + 1, justid=True)
        elif engine == "plan":
            await queue.hand_over(engine, granted, {0: PLAN}, 3, [])
        elif await queue.commit(granted, RESULT):
            self.committed.append(granted.job_id)

    async def cancel(self, api: str, back: int) -> None:
        if self.jobs:
            job_id = self.jobs[-1 - back % len(self.jobs)]
            if await (self.old if api == "old" else self.new["all"]).cancel(job_id):
                self.cancelled.add(job_id)

    async def check(self) -> None:
        """Check that every live job is in one queue, where its record says, and that old engines see no planned one."""
        found: dict[bytes, list[tuple[str, bytes]]] = {}
        for stage in ("", "render:"):
            for priority in ("interactive", "batch"):
                for entry, fields in await self.client.xrange(f"glimmer:queue:{stage}{priority}"):
                    found.setdefault(fields[b"job"], []).append((stage, entry))
        for job_id in self.jobs:
            state, stage, entry = await self.client.hmget(f"glimmer:job:{job_id}", "state", "stage", "entry")
            if state in (b"queued", b"running"):
                assert found[job_id.encode()] == [("render:" if stage else "", entry)]

    async def drain(self) -> None:
        """Let old engines end what they can, then new ones the rest."""
        for number, queue in enumerate((self.old, self.new["all"])):
            await self.client.delete("glimmer:attempt:last")
            for engine in ("old", *self.new):
                await queue.requeue_all(engine, blame=False)
            while granted := await queue.claim(f"last-{number}", IDLE):
                assert await queue.commit(granted, RESULT)
                self.committed.append(granted.job_id)

    async def close(self) -> None:
        for queue in (self.old, *self.new.values()):
            await queue.close()


SIDES = st.sampled_from(["old", "new"])
BACK = st.integers(0, 3)
CALLS = st.one_of(
    st.tuples(st.just("submit"), SIDES, st.sampled_from(["interactive", "batch"])),
    st.tuples(st.just("claim"), st.sampled_from(["old", "all", "plan", "plan", "render"])),
    st.tuples(st.just("work"), BACK, st.sampled_from(["ends", "ends", "checkpoint", "requeue", "dies", "lapses"])),
    st.tuples(st.just("cancel"), SIDES, BACK),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls=st.lists(CALLS, min_size=10, max_size=40))
def test_no_order_of_processes_loses_a_job(redis_server: EmbeddedRedis, calls: list[tuple[Any, ...]]) -> None:
    asyncio.run(_run(redis_server, calls))


async def _run(server: EmbeddedRedis, calls: list[tuple[Any, ...]]) -> None:
    client = connect(server.url)
    await client.flushdb()
    fleet = Fleet(client)
    try:
        for name, *arguments in calls:
            await getattr(fleet, name)(*arguments)
            await fleet.check()
        await fleet.drain()
        assert sorted(fleet.committed) == sorted(set(fleet.jobs) - fleet.cancelled)
        stats = await fleet.new["all"].stats()
        assert (stats.waiting, stats.running, stats.to_plan, stats.to_render) == (0, 0, 0, 0)
    finally:
        await fleet.close()
        await client.flushdb()
        await client.aclose()


async def test_an_old_api_ends_a_handed_over_job_and_no_other(redis_client: Any) -> None:
    """An old end deletes by id in the queue it knows: no entry there may have that of a handed over job."""
    old, planner = old_queue(redis_client), JobQueue(redis_client, stage="plan")
    jobs = [await submit(old) for _ in range(20)]
    for _ in range(10):
        await planner.hand_over("planner", await claim(planner, "planner"), {0: PLAN}, 3, [])
    handed_over = {entry for entry, _ in await redis_client.xrange("glimmer:queue:render:interactive")}
    waiting = {entry for entry, _ in await redis_client.xrange("glimmer:queue:interactive")}
    assert all(int(entry.split(b"-")[1]) >= 10**12 for entry in handed_over)
    assert all(int(entry.split(b"-")[1]) < 10**6 for entry in waiting)
    for job_id in jobs[:10]:
        assert await old.cancel(job_id)
    renderer = JobQueue(redis_client, stage="render")
    assert await renderer.claim("renderer", IDLE) is None
    assert await redis_client.xlen("glimmer:queue:render:interactive") == 0, "what is left is cleared"
    assert [(await claim(old)).job_id for _ in range(10)] == jobs[10:]


async def test_a_dead_renderer_s_jobs_that_an_old_api_ended_stay_ended(redis_client: Any) -> None:
    """An old end leaves the entry in the render queue, and with it the job's place there."""
    old, planner = old_queue(redis_client), JobQueue(redis_client, stage="plan")
    renderer = JobQueue(redis_client, stage="render")
    job_id = await submit(old)
    await planner.hand_over("planner", await claim(planner, "planner"), {0: PLAN}, 3, [])
    await claim(renderer, "renderer")
    assert await old.cancel(job_id)
    assert await renderer.requeue_all("renderer") == 0
    assert await renderer.claim("renderer-2", IDLE) is None
    assert (await redis_client.hget(f"glimmer:job:{job_id}", "state")) == b"cancelled"


@pytest.mark.parametrize("first", ["old", "new"])
async def test_either_release_resumes_the_plans_of_the_other(redis_client: Any, first: str) -> None:
    old, new = old_queue(redis_client), JobQueue(redis_client)
    planner, renderer = (old, new) if first == "old" else (new, old)
    await submit(new if first == "old" else old)
    granted = await claim(planner, "first")
    await planner.checkpoint_plan(granted, 0, PLAN)
    await planner.requeue("first", granted)
    again = await claim(renderer, "second")
    assert again.plans == {0: PLAN}
    assert await renderer.commit(again, RESULT)
