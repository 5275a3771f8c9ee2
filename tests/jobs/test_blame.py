"""Which deaths of engines count against a job, and which runs."""

import asyncio
from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
import redis.asyncio
from hypothesis import HealthCheck, given, settings

from engine.errors import QueueUnavailable
from engine.jobs.connection import connect
from engine.jobs.embedded import EmbeddedRedis
from engine.jobs.job import Claim, FreeCapacity, JobState, Plan
from tests.job_queue import JobQueue
from tests.jobs.helpers import IDLE, RESULT, ROOMY, claim, submit

MAX_RUNS, MAX_ABSOLVED = 10, 3


async def lapse(queue: JobQueue) -> None:
    """Let all leases lapse, as a step of Redis' clock does."""
    name: Any = f"{queue.prefix}:queue:interactive"
    for entry in await queue.client.xpending_range(name, "engines", "-", "+", 100):
        consumer: Any = entry["consumer"]
        await queue.client.xclaim(name, "engines", consumer, 0, [entry["message_id"]], idle=3_600_000, justid=True)


async def deaths(queue: JobQueue, job_id: str) -> list[bytes]:
    record: Any = await queue.client.hgetall(f"{queue.prefix}:job:{job_id}")  # type: ignore[misc]
    return sorted(name for name in record if name.startswith(b"death:"))


async def state_of(queue: JobQueue, job_id: str) -> tuple[JobState, int]:
    record = await queue.get(job_id)
    assert record is not None
    return record.state, record.runs


async def die(queue: JobQueue, free: FreeCapacity = IDLE, progress: tuple[str, int, int] | None = None) -> Claim:
    """Run a job on an engine that dies."""
    granted = await claim(queue, "dies", free)
    if progress:
        await queue.progress(granted, dict(zip(("phase", "step", "steps"), progress, strict=True)))
    await queue.requeue_all("dies")
    return granted


async def test_a_job_that_ends_engines_alone_is_given_up_and_its_neighbour_is_not(queue: JobQueue):
    poison, neighbour = await submit(queue), await submit(queue)
    for _ in range(2):
        assert not (await claim(queue, "engine-1", ROOMY)).quarantined
    await queue.requeue_all("engine-1")
    assert await queue.claim("engine-1", ROOMY) is None, "a suspect needs an idle engine, and is not overtaken"
    for run in (2, 3):
        granted = await die(queue, IDLE, ("rendering", 7, 50))
        assert (granted.job_id, granted.runs, granted.quarantined) == (poison, run, True)
    granted = await claim(queue, "engine-1", IDLE)
    assert (granted.job_id, granted.quarantined) == (neighbour, True)
    assert await queue.commit(granted, RESULT)
    record = await queue.get(poison)
    assert record is not None
    assert (record.state, record.runs) == (JobState.FAILED, 3)
    assert record.error is not None
    assert (record.error.type, "brought its engine down" in record.error.message) == ("server_error", True)
    assert (await queue.stats()).dead_lettered == 1


@pytest.mark.parametrize(
    ("first", "second", "alike"),
    [
        (None, None, True),
        (None, ("planning", 2, 260), True),
        (None, ("planning", 100, 260), False),
        (("planning", 100, 260), ("planning", 126, 260), True),
        (("planning", 100, 260), ("planning", 127, 260), False),
        (("planning", 7, 50), ("rendering", 7, 50), False),
        (("rendering", 1, 4), ("rendering", 3, 4), True),
        (("rendering", 1, 4), ("rendering", 4, 4), False),
    ],
)
async def test_two_deaths_alone_count_if_they_are_alike(queue: JobQueue, first: Any, second: Any, alike: bool):
    job_id = await submit(queue)
    await die(queue)
    for progress in (first, second):
        await die(queue, IDLE, progress)
    assert (await queue.claim("engine-1", IDLE) is None) == alike
    assert (await state_of(queue, job_id))[0] is (JobState.FAILED if alike else JobState.RUNNING)


async def test_deaths_that_only_lapsed_leases_tell_of_need_a_third(queue: JobQueue):
    """Whoever kills engines at random ends a job twice while it runs alone, now and then."""
    job_id = await submit(queue)
    await die(queue)
    for engine in ("engine-1", "engine-2", "engine-3"):
        assert (await claim(queue, engine, IDLE)).quarantined
        await lapse(queue)
    assert await queue.claim("engine-4", IDLE) is None
    assert await state_of(queue, job_id) == (JobState.FAILED, 4)


async def test_all_runs_have_a_cap(queue: JobQueue):
    job_id = await submit(queue)
    for run in range(MAX_RUNS):
        await die(queue, IDLE, ("planning", 30 * run, 260))
    assert await queue.claim("engine-1", IDLE) is None
    assert await state_of(queue, job_id) == (JobState.FAILED, MAX_RUNS)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(tmp_path_factory.mktemp("redis"), fsync="no") as server:
        yield server


EVENTS = (
    "death in company",
    "reply lost",
    "frozen",
    "clock steps",
    "killed by the operator",
    "verdict is late",
    "handed back",
)


@given(st.lists(st.sampled_from(EVENTS), min_size=1, max_size=14))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_job_fails_by_deaths_in_company_and_claims_that_are_no_deaths(server: EmbeddedRedis, events: list[str]):
    asyncio.run(_play(server, events))


async def _play(server: EmbeddedRedis, events: list[str]) -> None:
    client = connect(server.url)
    queue, observer = JobQueue(client, lease_ms=60_000), JobQueue(client, lease_ms=0)
    job_ids, absolved, died = [await submit(queue), await submit(queue)], 0, False
    for event in events:
        absolved += {"frozen": 1, "clock steps": 2}.get(event, 0)
        if absolved > MAX_ABSOLVED or (event == "death in company" and died):
            continue  # a suspect is not in company
        if event == "death in company":
            assert all([await claim(queue, "dies") for _ in job_ids])
            await queue.requeue_all("dies")
            died = True
        elif event == "reply lost":
            assert await queue.attempt_claim("engine", IDLE, "lost")
            await lapse(queue)
        elif event in ("frozen", "clock steps"):
            held = [await claim(queue, "frozen", IDLE) for _ in job_ids]
            await lapse(queue)
            taken = [await claim(queue, "other", IDLE) for _ in job_ids]
            assert await queue.renew("frozen", held) == held
            if event == "clock steps":
                await lapse(queue)
                held = [await claim(queue, "frozen", IDLE) for _ in job_ids]
                assert await queue.renew("other", taken) == taken
            await queue.requeue_all("frozen" if event == "clock steps" else "other", blame=False)
        elif event == "verdict is late":
            for _ in job_ids:
                await claim(queue, "killed", IDLE)
            await lapse(queue)
            taken = [await claim(queue, "other", IDLE) for _ in job_ids]
            assert {claim.quarantined for claim in taken} == {True}
            await queue.requeue_all("killed", blame=False)
            assert await queue.renew("other", taken) == []
            await queue.requeue_all("other", blame=False)
        elif event == "killed by the operator":
            await claim(queue, "killed", IDLE)
            await queue.requeue_all("killed", blame=False)
        else:
            await queue.requeue("engine", await claim(queue, "engine", IDLE))
        for job_id in job_ids:
            assert len(await deaths(queue, job_id)) == died
            assert await state_of(queue, job_id) in ((JobState.QUEUED, died), (JobState.RUNNING, died))
    for _ in job_ids:
        assert await observer.commit(await claim(observer, "observer", IDLE), RESULT)
    await client.flushdb()
    await client.aclose()


async def test_a_late_verdict_forgives_only_the_lapses_of_its_engine(queue: JobQueue):
    job_id = await submit(queue)
    for engine in ("killed", "crashed"):
        await claim(queue, engine, IDLE)
        await lapse(queue)
    await claim(queue, "other", IDLE)
    assert await queue.requeue_all("killed", blame=False) == 0
    assert (await deaths(queue, job_id), await state_of(queue, job_id)) == ([b"death:2"], (JobState.RUNNING, 2))
    await queue.requeue_all("crashed", blame=True)
    await queue.requeue_all("other", blame=True)
    await queue.requeue_all("other", blame=False)
    assert (await deaths(queue, job_id), await state_of(queue, job_id)) == (
        [b"death:2", b"death:3"],
        (JobState.QUEUED, 2),
    )


async def test_a_dead_engine_cannot_be_absolved_by_another(queue: JobQueue):
    job_id = await submit(queue)
    held = await claim(queue, "dead")
    await lapse(queue)
    await claim(queue, "other", IDLE)
    assert await queue.renew("third", [held]) == [held]
    assert await deaths(queue, job_id) == [b"death:1"]


async def test_a_renewal_that_arrives_late_does_not_take_a_reported_death_back(queue: JobQueue):
    """An engine that gives up, or is killed, can have sent one."""
    job_id = await submit(queue)
    for _ in range(3):
        held = await claim(queue, "stuck", IDLE)
        await queue.progress(held, {"phase": "rendering", "step": 3, "steps": 50})
        await queue.requeue_all("stuck")
        assert await queue.renew("stuck", [held]) == [held]
    assert await queue.claim("stuck", IDLE) is None
    assert await state_of(queue, job_id) == (JobState.FAILED, 3)


async def test_a_job_that_freezes_its_engines_ends(queue: JobQueue):
    job_id, neighbour = await submit(queue), await submit(queue)
    engines = ["engine-1", "engine-2"]
    held = [await claim(queue, engines[0], IDLE) for _ in range(2)]
    while held[0].job_id == job_id:
        engines.reverse()
        await lapse(queue)
        taken = [await claim(queue, engines[0], IDLE)]
        if not taken[0].quarantined:
            taken.append(await claim(queue, engines[0], IDLE))
        await queue.renew(engines[1], held)
        held = taken
    assert held[0].job_id == neighbour
    assert await queue.commit(held[0], RESULT)
    assert (await state_of(queue, job_id))[0] is JobState.FAILED


@pytest.mark.parametrize("lost", ["claim", "renew"])
async def test_after_a_lost_reply_the_next_call_gets_the_same_job(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch, lost: str
):
    jobs = [await submit(queue), await submit(queue)]
    real = queue._scripts.run

    async def lose(script: str, /, *blobs: Any, **arguments: Any) -> Any:
        reply = await real(script, *blobs, **arguments)
        if script == lost:
            raise QueueUnavailable("planted")
        return reply

    for _ in range(4):
        with monkeypatch.context() as patch:
            patch.setattr(queue._scripts, "run", lose)
            with pytest.raises(QueueUnavailable):
                await queue.claim("engine-1", ROOMY)
    assert (await queue.stats()).running == 1
    granted = [await claim(queue, "engine-1", ROOMY) for _ in jobs]
    assert [(c.job_id, c.epoch, c.runs) for c in granted] == [(job_id, 1, 1) for job_id in jobs]
    assert [await state_of(queue, job_id) for job_id in jobs] == [(JobState.RUNNING, 1)] * 2


async def test_a_repeated_attempt_restarts_the_lease(queue: JobQueue):
    await submit(queue)
    first = await queue.attempt_claim("engine-1", ROOMY, "attempt")
    await lapse(queue)
    again = await queue.attempt_claim("engine-1", ROOMY, "attempt")
    assert first is not None
    assert again is not None
    assert (again.job_id, again.epoch) == (first.job_id, first.epoch)
    assert await queue.claim("engine-2", IDLE) is None


async def test_a_claim_that_is_lost_at_once_is_not_returned(queue: JobQueue, monkeypatch: pytest.MonkeyPatch):
    cancelled, job_id = await submit(queue), await submit(queue)
    real = queue.attempt_claim

    async def too_late(*arguments: Any) -> Claim | None:
        granted = await real(*arguments)
        await queue.cancel(cancelled)
        return granted

    monkeypatch.setattr(queue, "attempt_claim", too_late)
    assert (await claim(queue, "engine-1")).job_id == job_id


async def test_plans_of_another_planner_are_not_resumed(queue: JobQueue):
    await submit(queue, n=3)
    queue.planner = "old"
    granted = await claim(queue)
    await queue.checkpoint_plan(granted, 0, Plan(1, 1, [1]))
    queue.planner = ""  # an engine of an earlier version
    await queue.checkpoint_plan(granted, 1, Plan(1, 1, [2]))
    queue.planner = "new"
    await queue.checkpoint_plan(granted, 2, Plan(1, 1, [3]))
    await queue.requeue("engine-1", granted)
    assert (await claim(queue)).plans == {1: Plan(1, 1, [2]), 2: Plan(1, 1, [3])}


async def test_the_jobs_of_a_killed_api_are_cancelled(redis_client: redis.asyncio.Redis):
    queue = JobQueue(redis_client, orphan_ms=1000)
    running = await submit(queue, api_id="killed")
    granted = await claim(queue)
    waiting, detached = await submit(queue, api_id="killed"), await submit(queue)
    attached = await submit(queue, api_id="lives")
    for _ in range(11):
        await queue.api_heartbeat("lives")
        await asyncio.sleep(0.1)
    assert await queue.renew("engine-1", [granted]) == [granted]
    assert [(await claim(queue)).job_id for _ in range(2)] == [detached, attached]
    assert {(await state_of(queue, job_id))[0] for job_id in (running, waiting)} == {JobState.CANCELLED}


async def test_no_job_is_an_orphan_just_after_an_outage(redis_client: redis.asyncio.Redis):
    """Every API may look silent then; the first heartbeat of any process begins the wait anew."""
    queue = JobQueue(redis_client, orphan_ms=200)
    job_id = await submit(queue, api_id="api")
    await redis_client.zadd("glimmer:apis", {"api": 0})
    await redis_client.hset(f"glimmer:job:{job_id}", "submitted_at", 0)  # type: ignore[misc]
    assert await queue.requeue("engine-1", await claim(queue)), "without any heartbeat"
    await redis_client.hset("glimmer:heard", mapping={"at": 1, "since": 1})  # type: ignore[misc]
    assert await queue.requeue("engine-1", await claim(queue)), "the last heartbeat is old"
    await queue.api_heartbeat("another")
    assert (await claim(queue)).job_id == job_id, "heartbeats have begun again"
