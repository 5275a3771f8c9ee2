"""Waiting for the end of a job, for all ends, and for work."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from types import SimpleNamespace

import pytest
import redis.asyncio

from engine.errors import QueueUnavailable
from engine.jobs import follower
from engine.jobs.follower import JobFollower
from engine.jobs.job import JobError, JobState, QueueStats
from tests.job_queue import JobQueue
from tests.jobs.helpers import IDLE, RESULT, TIMEOUT_S, claim, pass_deadline, submit
from tests.waiting import until


@pytest.fixture
def events_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch polling off, so that only an event or the deadline ends a wait."""
    monkeypatch.setattr(follower, "POLL_INTERVAL_S", 3600.0)


async def _fail(queue: JobQueue, job_id: str) -> None:
    await queue.fail(await claim(queue), JobError("no"))


async def _commit(queue: JobQueue, job_id: str) -> None:
    await queue.commit(await claim(queue), RESULT)


async def _cancel(queue: JobQueue, job_id: str) -> None:
    await queue.cancel(job_id)


ENDS: dict[JobState, Callable[[JobQueue, str], Awaitable[None]]] = {
    JobState.SUCCEEDED: _commit,
    JobState.FAILED: _fail,
    JobState.CANCELLED: _cancel,
}


@pytest.mark.usefixtures("events_only")
@pytest.mark.parametrize("state", ENDS)
async def test_an_end_wakes_every_waiter_of_the_job(queue: JobQueue, state: JobState):
    job_id, other = await submit(queue), await submit(queue)
    waiters = [asyncio.create_task(queue.wait(job_id)) for _ in range(3)]
    bystander = asyncio.create_task(queue.wait(other))
    await asyncio.sleep(0.1)
    await ENDS[state](queue, job_id)
    for record in await asyncio.wait_for(asyncio.gather(*waiters), TIMEOUT_S):
        assert (record.id, record.state) == (job_id, state)
    assert not bystander.done()
    await queue.cancel(other)
    await asyncio.wait_for(bystander, TIMEOUT_S)


@pytest.mark.usefixtures("events_only")
async def test_waiting_for_an_ended_job_returns_at_once(queue: JobQueue):
    job_id = await submit(queue)
    await queue.cancel(job_id)
    assert (await asyncio.wait_for(queue.wait(job_id), TIMEOUT_S)).state == JobState.CANCELLED


@pytest.mark.usefixtures("events_only")
async def test_waiting_ends_at_the_deadline(queue: JobQueue):
    job_id = await submit(queue, timeout_s=0.3)
    started = time.monotonic()
    record = await asyncio.wait_for(queue.wait(job_id), TIMEOUT_S)
    assert record.state == JobState.EXPIRED
    assert time.monotonic() - started > 0.25


async def test_polling_finds_an_end_whose_event_was_lost(queue: JobQueue, redis_client: redis.asyncio.Redis):
    job_id = await submit(queue)
    waiter = asyncio.create_task(queue.wait(job_id))
    await asyncio.sleep(0.1)
    await redis_client.hset(f"glimmer:job:{job_id}", "state", "cancelled")  # an end without an event
    assert (await asyncio.wait_for(waiter, TIMEOUT_S)).state == JobState.CANCELLED


@pytest.mark.parametrize("how", ["wait", "follow"])
async def test_patience_with_redis_begins_anew_after_each_answer(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch, how: str
):
    """Many outages, each shorter than the job's deadline and the patience after it; the last one is too long."""
    job_id, now, reads = await submit(queue, timeout_s=1000), 0.0, 0
    real = JobFollower._time_left

    async def away_most_of_the_time(following: JobFollower) -> float | None:
        nonlocal now, reads
        now, reads = now + 300.0, reads + 1
        if reads % 4 == 1 and reads <= 20:
            return await real(following)
        raise QueueUnavailable("planted")

    monkeypatch.setattr(follower, "POLL_INTERVAL_S", 0.001)
    monkeypatch.setattr(follower, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(JobFollower, "_time_left", away_most_of_the_time)
    with pytest.raises(QueueUnavailable):
        await (queue.wait(job_id) if how == "wait" else _last_update(queue, job_id))
    assert reads == 17 + 4


async def _last_update(queue: JobQueue, job_id: str) -> None:
    async for _ in queue.follow(job_id):
        pass


async def test_waiting_for_an_unknown_job_does_not_hang(queue: JobQueue):
    with pytest.raises(QueueUnavailable, match="no record"):
        await asyncio.wait_for(queue.wait("unknown"), TIMEOUT_S)


@pytest.mark.usefixtures("events_only")
async def test_a_broken_subscription_is_restored(queue: JobQueue, redis_client: redis.asyncio.Redis):
    async def broken() -> bool:
        return await redis_client.execute_command("CLIENT", "KILL", "TYPE", "pubsub") == 1

    job_id = await submit(queue)
    waiter = asyncio.create_task(queue.wait(job_id))
    for _ in range(2):
        await until(broken, TIMEOUT_S)
    await asyncio.sleep(0.3)
    await queue.cancel(job_id)
    await asyncio.wait_for(waiter, TIMEOUT_S)


@pytest.mark.usefixtures("events_only")
async def test_an_end_during_the_break_is_found_after_it(queue: JobQueue, redis_client: redis.asyncio.Redis):
    job_id = await submit(queue)
    waiter = asyncio.create_task(queue.wait(job_id))
    await asyncio.sleep(0.1)
    async with redis_client.pipeline() as pipe:
        pipe.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        pipe.hset(f"glimmer:job:{job_id}", "state", "cancelled")
        await pipe.execute()
    await asyncio.wait_for(waiter, TIMEOUT_S)


async def test_a_thousand_waiters_share_one_connection(queue: JobQueue, redis_client: redis.asyncio.Redis):
    jobs = [await submit(queue, max_queue=1000) for _ in range(1000)]
    waiters = [asyncio.create_task(queue.wait(job_id)) for job_id in jobs]
    async with asyncio.timeout(TIMEOUT_S):
        while not (subscribers := await redis_client.client_list("pubsub")):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    await asyncio.sleep(0.1)
    assert len(await redis_client.client_list("pubsub")) == len(subscribers) == 1
    for job_id in jobs:
        await queue.cancel(job_id)
    records = await asyncio.wait_for(asyncio.gather(*waiters), TIMEOUT_S)
    assert [record.id for record in records] == jobs


async def test_ended_yields_every_end_until_the_queue_is_closed(redis_client: redis.asyncio.Redis):
    queue, seen = JobQueue(redis_client), list[str]()

    async def listen() -> None:
        async for job_id in queue.ended():
            seen.append(job_id)

    listener = asyncio.create_task(listen())
    await asyncio.sleep(0.1)
    done, cancelled = await submit(queue), await submit(queue)
    granted = await claim(queue)
    await queue.progress(granted, {"step": 1})
    await queue.commit(granted, RESULT)
    await queue.cancel(cancelled)
    await asyncio.sleep(0.1)
    await queue.close()
    await asyncio.wait_for(listener, TIMEOUT_S)
    assert seen == [done, cancelled]


@pytest.mark.parametrize("cause", ["submit", "requeue", "requeue_all"])
async def test_work_wakes_an_engine(queue: JobQueue, cause: str):
    if cause != "submit":
        await submit(queue)
        granted = await claim(queue, "engine-2")
    await queue.wait_for_work(0.1)
    waiter = asyncio.create_task(queue.wait_for_work(60))
    await asyncio.sleep(0.05)
    assert not waiter.done()
    if cause == "submit":
        await submit(queue)
    elif cause == "requeue":
        assert await queue.requeue("engine-2", granted)  # pyright: ignore[reportPossiblyUnboundVariable]
    else:
        assert await queue.requeue_all("engine-2") == 1
    await asyncio.wait_for(waiter, TIMEOUT_S)


async def test_work_that_comes_before_the_wait_is_not_missed(queue: JobQueue):
    await queue.wait_for_work(0.1)
    assert await queue.claim("engine-1", IDLE) is None
    await submit(queue)
    await asyncio.sleep(0.05)
    await asyncio.wait_for(queue.wait_for_work(60), TIMEOUT_S)


@pytest.mark.parametrize("delay_s", [0, 0.0003, 0.001, 0.003])
async def test_close_does_not_hang_while_the_connection_is_being_made(
    redis_client: redis.asyncio.Redis, delay_s: float
):
    queue = JobQueue(redis_client)
    engine = asyncio.create_task(queue.wait_for_work(10))
    await asyncio.sleep(delay_s)
    await asyncio.wait_for(queue.close(), TIMEOUT_S)
    engine.cancel()


async def test_waiting_for_work_ends_after_the_timeout(queue: JobQueue):
    await queue.wait_for_work(0.1)
    started = time.monotonic()
    await asyncio.wait_for(queue.wait_for_work(0.2), TIMEOUT_S)
    assert time.monotonic() - started > 0.15


async def test_many_jobs_are_looked_up_at_once(queue: JobQueue):
    done, running, cancelled, late, queued = [await submit(queue) for _ in range(5)]
    await queue.commit(await claim(queue), RESULT)
    await claim(queue)
    await queue.cancel(cancelled)
    await pass_deadline(queue, late)
    assert await queue.ended_among([running, done, queued, late, cancelled, "unknown"]) == {
        done: JobState.SUCCEEDED,
        late: JobState.EXPIRED,
        cancelled: JobState.CANCELLED,
        "unknown": None,
    }
    assert await queue.stats() == QueueStats(waiting=1, running=1)
    assert await queue.ended_among([]) == {}
