"""Waiting for the end of a job, for any end, and for work. Time limits tell an event from a look by oneself."""

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest
import redis.asyncio

from engine.errors import QueueUnavailable
from engine.jobs import follower
from engine.jobs.job import JobError, JobState, QueueStats
from tests.job_queue import JobQueue
from tests.jobs.helpers import IDLE, RESULT, claim, pass_deadline, submit


@pytest.fixture
def events_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """`wait` does not look by itself, so only an event can wake it."""
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
async def test_an_end_wakes_all_who_wait_for_the_job(queue: JobQueue, state: JobState):
    job_id, other = await submit(queue), await submit(queue)
    waiters = [asyncio.create_task(queue.wait(job_id)) for _ in range(3)]
    bystander = asyncio.create_task(queue.wait(other))
    await asyncio.sleep(0.1)
    await ENDS[state](queue, job_id)
    for record in await asyncio.wait_for(asyncio.gather(*waiters), 0.5):
        assert (record.id, record.state) == (job_id, state)
    assert not bystander.done()
    await queue.cancel(other)
    await asyncio.wait_for(bystander, 0.5)


async def test_waiting_for_a_job_that_has_ended_returns_at_once(queue: JobQueue):
    job_id = await submit(queue)
    await queue.cancel(job_id)
    assert (await asyncio.wait_for(queue.wait(job_id), 0.5)).state == JobState.CANCELLED


@pytest.mark.usefixtures("events_only")
async def test_waiting_ends_at_the_deadline(queue: JobQueue):
    job_id = await submit(queue, timeout_s=0.3)
    started = time.monotonic()
    record = await asyncio.wait_for(queue.wait(job_id), 2)
    assert record.state == JobState.EXPIRED
    assert 0.25 < time.monotonic() - started < 0.6


async def test_a_lost_event_costs_a_second_at_most(queue: JobQueue, redis_client: redis.asyncio.Redis):
    job_id = await submit(queue)
    waiter = asyncio.create_task(queue.wait(job_id))
    await asyncio.sleep(0.1)
    await redis_client.hset(f"glimmer:job:{job_id}", "state", "cancelled")  # an end that nobody announced
    assert (await asyncio.wait_for(waiter, 1.5)).state == JobState.CANCELLED


async def test_waiting_for_a_job_that_is_not_there_does_not_hang(queue: JobQueue):
    with pytest.raises(QueueUnavailable, match="no record"):
        await asyncio.wait_for(queue.wait("nobody"), 1)


@pytest.mark.usefixtures("events_only")
async def test_a_broken_subscription_is_made_again(queue: JobQueue, redis_client: redis.asyncio.Redis):
    job_id = await submit(queue)
    waiter = asyncio.create_task(queue.wait(job_id))
    for _ in range(2):
        await asyncio.sleep(0.1)
        assert await redis_client.execute_command("CLIENT", "KILL", "TYPE", "pubsub") == 1
    await asyncio.sleep(0.3)
    await queue.cancel(job_id)
    await asyncio.wait_for(waiter, 0.5)


@pytest.mark.usefixtures("events_only")
async def test_an_end_during_the_break_is_noticed_after_it(queue: JobQueue, redis_client: redis.asyncio.Redis):
    job_id = await submit(queue)
    waiter = asyncio.create_task(queue.wait(job_id))
    await asyncio.sleep(0.1)
    async with redis_client.pipeline() as pipe:
        pipe.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        pipe.hset(f"glimmer:job:{job_id}", "state", "cancelled")
        await pipe.execute()
    await asyncio.wait_for(waiter, 2)


async def test_a_thousand_waiters_share_a_connection(queue: JobQueue, redis_client: redis.asyncio.Redis):
    jobs = [await submit(queue, max_queue=1000) for _ in range(1000)]
    waiters = [asyncio.create_task(queue.wait(job_id)) for job_id in jobs]
    async with asyncio.timeout(5):
        while not (subscribers := await redis_client.client_list("pubsub")):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    await asyncio.sleep(0.1)
    assert len(await redis_client.client_list("pubsub")) == len(subscribers) == 1
    for job_id in jobs:
        await queue.cancel(job_id)
    records = await asyncio.wait_for(asyncio.gather(*waiters), 5)
    assert [record.id for record in records] == jobs


async def test_ended_follows_every_end_until_the_queue_is_closed(redis_client: redis.asyncio.Redis):
    queue, seen = JobQueue(redis_client), list[str]()

    async def follow() -> None:
        async for job_id in queue.ended():
            seen.append(job_id)

    follower = asyncio.create_task(follow())
    await asyncio.sleep(0.1)
    done, cancelled = await submit(queue), await submit(queue)
    granted = await claim(queue)
    await queue.progress(granted, {"step": 1})
    await queue.commit(granted, RESULT)
    await queue.cancel(cancelled)
    await asyncio.sleep(0.1)
    await queue.close()
    await asyncio.wait_for(follower, 0.5)
    assert seen == [done, cancelled]


@pytest.mark.parametrize("cause", ["submit", "release", "surrender"])
async def test_work_wakes_an_engine(queue: JobQueue, cause: str):
    if cause != "submit":
        await submit(queue)
        granted = await claim(queue, "engine-2")
    await queue.wait_for_work(0.1)
    waiter = asyncio.create_task(queue.wait_for_work(10))
    await asyncio.sleep(0.05)
    assert not waiter.done()
    if cause == "submit":
        await submit(queue)
    elif cause == "release":
        assert await queue.requeue("engine-2", granted)  # pyright: ignore[reportPossiblyUnboundVariable]
    else:
        assert await queue.requeue_all("engine-2") == 1
    await asyncio.wait_for(waiter, 0.5)


async def test_work_that_comes_before_the_wait_is_not_missed(queue: JobQueue):
    await queue.wait_for_work(0.1)
    assert await queue.claim("engine-1", IDLE) is None
    await submit(queue)
    await asyncio.sleep(0.05)
    await asyncio.wait_for(queue.wait_for_work(10), 0.5)


@pytest.mark.parametrize("delay_s", [0, 0.0003, 0.001, 0.003])
async def test_closing_does_not_hang_while_the_connection_is_being_made(
    redis_client: redis.asyncio.Redis, delay_s: float
):
    queue = JobQueue(redis_client)
    engine = asyncio.create_task(queue.wait_for_work(10))
    await asyncio.sleep(delay_s)
    await asyncio.wait_for(queue.close(), 1)
    engine.cancel()


async def test_waiting_for_work_has_a_limit(queue: JobQueue):
    await queue.wait_for_work(0.1)
    started = time.monotonic()
    await queue.wait_for_work(0.2)
    assert 0.15 < time.monotonic() - started < 0.5


async def test_many_jobs_are_asked_after_at_once(queue: JobQueue):
    done, running, cancelled, late, queued = [await submit(queue) for _ in range(5)]
    await queue.commit(await claim(queue), RESULT)
    await claim(queue)
    await queue.cancel(cancelled)
    await pass_deadline(queue, late)
    assert await queue.ended_among([running, done, queued, late, cancelled, "never was"]) == {
        done: JobState.SUCCEEDED,
        late: JobState.EXPIRED,
        cancelled: JobState.CANCELLED,
        "never was": None,
    }
    assert await queue.stats() == QueueStats(waiting=1, running=1)
    assert await queue.ended_among([]) == {}
