"""Redis dies, loses data or refuses writes. Each test has its own server."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import redis.asyncio

from engine.errors import QueueUnavailable
from engine.jobs.connection import connect
from engine.jobs.embedded import EmbeddedRedis
from engine.jobs.job import EngineInfo, JobError, JobState, Plan, QueueStats, TokenGrid
from tests.job_queue import JobQueue
from tests.jobs.helpers import IDLE, RESULT, TIMEOUT_S, claim, kill, restart, submit


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(tmp_path) as server:
        yield server


@pytest.fixture
async def client(server: EmbeddedRedis) -> AsyncIterator[redis.asyncio.Redis]:
    client = connect(server.url)
    yield client
    await client.aclose()


@pytest.fixture
async def queue(client: redis.asyncio.Redis) -> AsyncIterator[JobQueue]:
    queue = JobQueue(client, lease_ms=60_000)
    yield queue
    await queue.close()


async def test_no_acknowledged_write_is_lost_when_redis_is_killed(server: EmbeddedRedis, queue: JobQueue):
    running, waiting, cancelled, done = [await submit(queue, timeout_s=600) for _ in range(4)]
    granted = await claim(queue)
    plan = Plan(1, 1, [3])
    await queue.checkpoint_plan(granted, 0, plan)
    await queue.cancel(cancelled)
    claims = [granted, await claim(queue), await claim(queue)]
    await queue.commit(claims[2], RESULT)
    await queue.requeue("engine-1", claims[1])
    waiters = [asyncio.create_task(queue.wait(job_id)) for job_id in (running, waiting)]
    engine_waits = asyncio.create_task(queue.wait_for_work(60))
    await asyncio.sleep(0.1)

    kill(server)
    with pytest.raises(QueueUnavailable):
        await submit(queue, job_id="refused")
    await asyncio.sleep(0.5)
    restart(server)

    assert await queue.stats() == QueueStats(waiting=1, running=1)
    assert await queue.get("refused") is None
    assert await queue.result(done) == RESULT
    record = await queue.get(cancelled)
    assert record is not None
    assert record.state == JobState.CANCELLED
    assert await queue.renew("engine-1", [granted]) == []
    assert await queue.requeue("engine-1", granted)
    again = await claim(queue, "engine-2")
    assert (again.job_id, again.plans) == (running, {0: plan})
    assert await queue.commit(again, RESULT)
    assert (await asyncio.wait_for(waiters[0], TIMEOUT_S)).state == JobState.SUCCEEDED
    await asyncio.wait_for(engine_waits, TIMEOUT_S)
    second = await claim(queue, "engine-2")
    assert (second.job_id, second.epoch) == (waiting, claims[1].epoch + 1)
    assert await queue.commit(second, RESULT)
    assert (await asyncio.wait_for(waiters[1], TIMEOUT_S)).state == JobState.SUCCEEDED
    assert await queue.claim("engine-2", IDLE) is None


async def test_lost_scripts_are_loaded_again(queue: JobQueue, client: redis.asyncio.Redis):
    await submit(queue)
    granted = await claim(queue)
    await client.script_flush()
    assert await queue.renew("engine-1", [granted]) == []
    await client.script_flush()
    assert await queue.commit(granted, RESULT)


async def test_a_lost_consumer_group_is_created_again(queue: JobQueue, client: redis.asyncio.Redis):
    """Running jobs are granted again, because the group had their leases; the epoch allows one end only."""
    _, running, waiting = [await submit(queue) for _ in range(3)]
    first, stale = [await claim(queue, "engine-1") for _ in range(2)]
    await client.xgroup_destroy("glimmer:queue:interactive", "engines")
    assert await queue.renew("engine-1", [first, stale]) == []
    assert await queue.commit(first, RESULT)
    assert [(await claim(queue, "engine-2")).job_id for _ in range(2)] == [running, waiting]
    assert not await queue.commit(stale, RESULT)
    assert await queue.claim("engine-2", IDLE) is None
    assert await client.xlen("glimmer:queue:interactive") == 2


@pytest.mark.parametrize("call", ["claim", "renew", "requeue_all"])
async def test_a_flushed_redis_can_be_used_like_a_new_one(queue: JobQueue, client: redis.asyncio.Redis, call: str):
    await submit(queue)
    granted = await claim(queue)
    await client.flushall()
    if call == "claim":
        assert await queue.claim("engine-1", IDLE) is None
    elif call == "renew":
        assert await queue.renew("engine-1", [granted]) == [granted]
    else:
        assert await queue.requeue_all("engine-1") == 0
    assert not await queue.commit(granted, RESULT)
    job_id = await submit(queue)
    assert (await claim(queue)).job_id == job_id


async def test_an_entry_deleted_by_hand_does_not_block_the_queue(queue: JobQueue, client: redis.asyncio.Redis):
    await submit(queue)
    lost = await claim(queue, "engine-1")
    await client.xtrim("glimmer:queue:interactive", maxlen=0, approximate=False)
    job_id = await submit(queue)
    without_lease = JobQueue(client, lease_ms=0)
    assert (await claim(without_lease, "engine-2")).job_id == job_id
    assert await queue.commit(lost, RESULT), "its engine can still end it"
    assert (await client.xpending("glimmer:queue:interactive", "engines"))["pending"] == 1


async def _stop(server: EmbeddedRedis, client: redis.asyncio.Redis) -> None:
    server.stop()


async def _out_of_memory(server: EmbeddedRedis, client: redis.asyncio.Redis) -> None:
    await client.config_set("maxmemory", 1)


async def _disk_error(server: EmbeddedRedis, client: redis.asyncio.Redis) -> None:
    await client.config_set("save", "900 1")
    Path(server.url.removeprefix("unix://")).with_name("dump.rdb").mkdir()
    await client.bgsave()
    for _ in range(200):
        if (await client.info("persistence"))["rdb_last_bgsave_status"] != "ok":
            return
        await asyncio.sleep(0.01)
    pytest.fail("Redis could save")


async def _read_only(server: EmbeddedRedis, client: redis.asyncio.Redis) -> None:
    await client.replicaof("127.0.0.1", "1")


FAULTS: dict[str, Callable[[EmbeddedRedis, redis.asyncio.Redis], Awaitable[None]]] = {
    "stopped": _stop,
    "out of memory": _out_of_memory,
    "disk error": _disk_error,
    "read-only": _read_only,
}
REPAIRS: dict[str, Callable[[redis.asyncio.Redis], Awaitable[object]]] = {
    "out of memory": lambda client: client.config_set("maxmemory", 0),
    "disk error": lambda client: client.config_set("save", ""),
    "read-only": lambda client: client.replicaof("NO", "ONE"),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_redis_that_refuses_writes_is_unavailable_and_no_script_stops_half_way(
    server: EmbeddedRedis, queue: JobQueue, client: redis.asyncio.Redis, fault: str
):
    job_id = await submit(queue)
    granted = await claim(queue)
    info = EngineInfo("engine-1", 1, "all", "ready", "nano", "512x512", 16384, 1024)
    await FAULTS[fault](server, client)
    calls = [
        lambda: submit(queue, job_id="refused"),
        lambda: queue.progress(granted, {"step": 1}),
        lambda: queue.checkpoint_plan(granted, 0, Plan(1, 1, [1])),
        lambda: queue.hand_over("engine-1", granted, {0: Plan(1, 1, [1])}, 1, []),
        lambda: queue.offer_preview(granted, 0, TokenGrid(1, 1, [1])),
        lambda: queue.commit(granted, RESULT),
        lambda: queue.heartbeat(info, "", 60),
    ]
    if fault != "out of memory":  # then writes that free memory succeed: see the next test
        calls += [
            lambda: queue.cancel(job_id),
            lambda: queue.fail(granted, JobError("no")),
            lambda: queue.requeue("engine-1", granted),
            lambda: queue.renew("engine-1", [granted]),
            lambda: queue.requeue_all("engine-1"),
        ]
    if fault == "stopped":
        calls += [
            lambda: queue.get(job_id),
            lambda: queue.result(job_id),
            queue.stats,
            queue.engines,
            queue.engine_metrics,
            queue.ping,
            lambda: queue.claim("engine-1", IDLE),
            lambda: queue.expire(job_id),
            lambda: queue.deregister("engine-1"),
        ]

    async def refused(call: Callable[[], Awaitable[object]]) -> None:
        with pytest.raises(QueueUnavailable, match="Redis"):
            await call()

    await asyncio.gather(*(refused(call) for call in calls))
    if fault in REPAIRS:
        await REPAIRS[fault](client)
        assert await queue.get("refused") is None
        assert await queue.stats() == QueueStats(waiting=0, running=1)
        record = await queue.get(job_id)
        assert record is not None
        assert (record.state, record.progress) == (JobState.RUNNING, {})
        assert await queue.commit(granted, RESULT)


async def test_jobs_can_be_claimed_and_ended_without_free_memory(queue: JobQueue, client: redis.asyncio.Redis):
    for _ in range(4):
        await submit(queue)
    cancelled, failed, requeued = [await claim(queue) for _ in range(3)]
    await client.config_set("maxmemory", 1)
    assert await queue.cancel(cancelled.job_id)
    assert await queue.fail(failed, JobError("no"))
    assert await queue.requeue("engine-1", requeued)
    claimed = [await claim(queue) for _ in range(2)]
    assert claimed[0].job_id == requeued.job_id
    assert await queue.renew("engine-1", claimed) == []
    assert await queue.stats() == QueueStats(waiting=0, running=2)


async def test_result_retries_while_redis_restarts(server: EmbeddedRedis, queue: JobQueue):
    job_id = await submit(queue)
    await queue.commit(await claim(queue), RESULT)
    kill(server)
    with pytest.raises(QueueUnavailable):
        await queue.result(job_id)
    reading = asyncio.create_task(queue.result(job_id, outage_timeout_s=60))
    await asyncio.sleep(1)
    assert not reading.done()
    restart(server)
    assert await asyncio.wait_for(reading, TIMEOUT_S) == RESULT


async def test_retries_end_after_the_outage_timeout(server: EmbeddedRedis, queue: JobQueue):
    kill(server)
    with pytest.raises(QueueUnavailable):
        await asyncio.wait_for(queue.result("a", outage_timeout_s=0.5), TIMEOUT_S)
