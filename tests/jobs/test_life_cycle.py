"""The states of a job without faults, and what it leaves in Redis."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import orjson
import pytest
import redis.asyncio

from engine.jobs.job import Claim, EngineInfo, JobError, JobRecord, JobState, Plan, QueueStats, Submitted, TokenGrid
from engine.jobs.results import ImageResult, JobResult
from tests.job_queue import JobQueue
from tests.jobs.helpers import IDLE, RESULT, ROOMY, claim, pass_deadline, spec, submit


async def test_a_job_is_submitted_claimed_and_committed(queue: JobQueue):
    await queue.submit(spec(n=2), job_id="a", timeout_s=60, priority="batch", max_queue=1)
    queued = await queue.get("a")
    assert queued is not None
    assert queued == JobRecord(
        "a", JobState.QUEUED, spec(n=2), "batch", queued.submitted_at, queued.submitted_at + 60_000, position=0
    )
    assert await queue.stats() == QueueStats(waiting=1, running=0)

    granted = await claim(queue)
    assert (granted.job_id, granted.epoch, granted.runs, granted.spec) == ("a", 1, 1, spec(n=2))
    assert (granted.submitted_at, granted.deadline_ms) == (queued.submitted_at, queued.deadline_ms)
    assert (granted.plans, granted.quarantined) == ({}, False)
    assert await queue.stats() == QueueStats(waiting=0, running=1)
    assert await queue.claim("engine-2", ROOMY) is None

    assert await queue.progress(granted, {"phase": "planning", "step": 1})
    running = await queue.get("a")
    assert running is not None
    assert (running.state, running.runs, running.progress) == ("running", 1, {"phase": "planning", "step": 1})
    assert await queue.result("a") is None

    assert await queue.commit(granted, RESULT)
    done = await queue.get("a")
    assert done is not None
    assert (done.state, done.error) == (JobState.SUCCEEDED, None)
    assert await queue.result("a") == RESULT
    assert await queue.stats() == QueueStats(waiting=0, running=0)


async def test_a_failed_job_keeps_its_error_and_has_no_result(queue: JobQueue):
    job_id = await submit(queue)
    error = JobError("too long", type="invalid_request_error", code="invalid_value", param="prompt")
    assert await queue.fail(await claim(queue), error)
    record = await queue.get(job_id)
    assert record is not None
    assert (record.state, record.error) == (JobState.FAILED, error)
    assert await queue.result(job_id) is None


async def test_an_unknown_job_can_neither_be_read_nor_ended(queue: JobQueue):
    assert await queue.get("unknown") is None
    assert await queue.result("unknown") is None
    assert not await queue.cancel("unknown")
    assert not await queue.expire("unknown")


@pytest.mark.parametrize("ended", [False, True])
async def test_a_repeated_submit_changes_nothing(queue: JobQueue, ended: bool):
    await submit(queue, job_id="a", max_queue=1)
    if ended:
        await queue.commit(await claim(queue), RESULT)
    before = await queue.get("a"), await queue.stats()
    await submit(queue, job_id="a", max_queue=1, seed=99)
    assert (await queue.get("a"), await queue.stats()) == before


async def test_jobs_are_claimed_in_the_order_of_their_submits(queue: JobQueue):
    submitted = [await submit(queue) for _ in range(5)]
    assert [(await claim(queue)).job_id for _ in range(5)] == submitted


@pytest.mark.parametrize("state", [JobState.QUEUED, JobState.RUNNING])
async def test_cancel_ends_a_job_once(queue: JobQueue, state: JobState):
    job_id = await submit(queue)
    granted = await claim(queue) if state == JobState.RUNNING else None
    assert await queue.cancel(job_id)
    assert not await queue.cancel(job_id)
    record = await queue.get(job_id)
    assert record is not None
    assert record.state == JobState.CANCELLED
    assert await queue.stats() == QueueStats(0, 0)
    assert await queue.claim("engine-2", IDLE) is None
    if granted:
        assert await queue.renew("engine-1", [granted]) == [granted]
        assert not await queue.commit(granted, RESULT)


@pytest.mark.parametrize("state", [JobState.QUEUED, JobState.RUNNING])
async def test_a_discarded_job_is_cancelled(queue: JobQueue, state: JobState):
    job_id = await submit(queue)
    granted = await claim(queue) if state == JobState.RUNNING else None
    assert await queue.discard(job_id)
    assert not await queue.discard(job_id)
    record = await queue.get(job_id)
    assert record is not None
    assert record.state == JobState.CANCELLED
    assert await queue.claim("engine-2", IDLE) is None
    assert granted is None or not await queue.commit(granted, RESULT)


async def test_a_submit_that_arrives_after_its_discard_has_no_effect(queue: JobQueue):
    assert not await queue.discard("late")
    await submit(queue, job_id="late")
    assert await queue.get("late") is None
    assert await queue.stats() == QueueStats(0, 0)
    assert await queue.claim("engine-1", IDLE) is None


async def test_a_discarded_job_leaves_no_result(queue: JobQueue):
    job_id = await submit(queue)
    await queue.commit(await claim(queue), RESULT)
    assert not await queue.discard(job_id)
    assert await queue.result(job_id) is None
    record = await queue.get(job_id)
    assert record is not None
    assert record.state == JobState.SUCCEEDED


ENDS: dict[str, Callable[[JobQueue, str], Awaitable[object]]] = {
    "cancelled": lambda queue, job_id: queue.cancel(job_id),
    "discarded": lambda queue, job_id: queue.discard(job_id),
    "expired": lambda queue, job_id: _expire(queue, job_id),
    "succeeded": lambda queue, job_id: _end(queue, lambda granted: queue.commit(granted, RESULT)),
    "failed": lambda queue, job_id: _end(queue, lambda granted: queue.fail(granted, JobError("no"))),
}


async def _expire(queue: JobQueue, job_id: str) -> None:
    await pass_deadline(queue, job_id)
    await queue.expire(job_id)


async def _end(queue: JobQueue, end: Callable[[Claim], Awaitable[bool]]) -> None:
    granted = await claim(queue)
    await queue.checkpoint_plan(granted, 0, Plan(1, 1, [987_654_321]))
    assert await end(granted)


@pytest.mark.parametrize("end", ENDS)
async def test_an_ended_job_keeps_no_texts_and_no_plan(queue: JobQueue, redis_client: redis.asyncio.Redis, end: str):
    texts = {
        "prompt": "secret one",
        "negative_prompt": "secret two",
        "plan": {"rows": 1, "cols": 1, "tokens": [987_654_321]},
    }
    notes = {"operation": "generation", "revised_prompt": "secret three"}
    kept = spec(n=2, width=128, output_format="webp", partial_images=2)
    job_id = await submit(
        queue,
        notes=notes,
        ended_notes=notes | {"revised_prompt": None},
        **vars(kept) | texts,
    )
    await ENDS[end](queue, job_id)
    record, stored = await queue.get(job_id), await _stored(redis_client)
    assert record is not None
    assert record.spec == replace(kept, prompt="")
    revised = "secret three" if end == "succeeded" else None  # in the response
    assert record.notes == {"operation": "generation", "revised_prompt": revised}
    for secret in (b"secret one", b"secret two", b"987654321", *([] if revised else [b"secret"])):
        assert secret not in stored


async def _stored(client: redis.asyncio.Redis) -> bytes:
    """Return all strings and hashes."""
    values: list[Any] = []
    for key in await client.keys():
        kind = await client.type(key)
        if kind == b"string":
            values.append(await client.get(key) or b"")
        elif kind == b"hash":
            values += (await client.hgetall(key)).values()  # type: ignore[misc]
    return b"\n".join(values)


async def test_a_record_of_an_older_api_keeps_its_spec(queue: JobQueue, redis_client: redis.asyncio.Redis):
    job_id = await submit(queue)
    await redis_client.hdel(f"glimmer:job:{job_id}", "ended_spec", "ended_notes")  # type: ignore[misc]
    await queue.cancel(job_id)
    record = await queue.get(job_id)
    assert record is not None
    assert record.spec == spec()


async def test_shorten_ttl_keeps_a_result_for_seconds_only(queue: JobQueue, redis_client: redis.asyncio.Redis):
    job_id = await submit(queue)
    granted = await claim(queue)
    await queue.shorten_ttl(job_id)  # the record of a running job must not expire
    assert await redis_client.pttl(f"glimmer:job:{job_id}") == -1
    await queue.commit(granted, RESULT)
    await queue.shorten_ttl(job_id)
    assert await queue.result(job_id) == RESULT
    for key in ("job", "result"):
        assert 1000 < await redis_client.pttl(f"glimmer:{key}:{job_id}") <= 5000


async def test_shorten_ttl_does_not_lengthen_a_ttl(redis_client: redis.asyncio.Redis):
    queue = JobQueue(redis_client, result_ttl_s=1)
    job_id = await submit(queue)
    await queue.commit(await claim(queue), RESULT)
    await queue.shorten_ttl(job_id)
    assert await redis_client.pttl(f"glimmer:result:{job_id}") <= 1000


@pytest.mark.parametrize("state", [JobState.QUEUED, JobState.RUNNING])
async def test_expire_ends_a_job_from_its_deadline_on(queue: JobQueue, state: JobState):
    job_id = await submit(queue)
    if state == JobState.RUNNING:
        await claim(queue)
    assert not await queue.expire(job_id)
    await pass_deadline(queue, job_id)
    assert await queue.expire(job_id)
    assert not await queue.expire(job_id)
    record = await queue.get(job_id)
    assert record is not None
    assert record.state == JobState.EXPIRED
    assert await queue.stats() == QueueStats(0, 0)


async def test_claim_and_renew_expire_jobs_past_their_deadline(queue: JobQueue):
    """An asynchronous job may have no waiter, so the engine's calls end it."""
    renewed, claimed = await submit(queue), await submit(queue)
    in_time = await submit(queue)
    granted = await claim(queue)
    assert granted.job_id == renewed
    for job_id in (renewed, claimed):
        await pass_deadline(queue, job_id)
    assert await queue.renew("engine-1", [granted]) == [granted]
    assert (await claim(queue)).job_id == in_time
    for job_id in (renewed, claimed):
        record = await queue.get(job_id)
        assert record is not None
        assert record.state == JobState.EXPIRED


async def test_results_are_returned_byte_for_byte(queue: JobQueue):
    plan = Plan(2, 2, [1, 2, 3, 4], TokenGrid(1, 1, [5])).to_dict()
    images = [bytes(range(256)) * 4096, b"", b"\r\n\0$-1\r\n"]
    result = JobResult(
        [ImageResult(data, seed, plan) for seed, data in enumerate(images)],
        prompt_tokens=12,
        plan_tokens=34,
        source_tokens=5,
    )
    job_id = await submit(queue, n=3)
    assert await queue.commit(await claim(queue), result)
    assert await queue.result(job_id) == result


async def test_every_field_of_the_spec_is_returned(queue: JobQueue):
    rich = spec(
        prompt='Ein Schild: "Öffnungszeiten" 🕰\n', seed=2**63 - 1, temperature=0.0, top_p=0.5, plan={"tokens": [1]}
    )
    await queue.submit(rich, job_id="ü:1", timeout_s=9, priority="interactive", max_queue=1)
    assert (await claim(queue)).spec == rich


async def test_a_submit_returns_the_record(queue: JobQueue):
    await submit(queue)
    rich = spec(prompt='"Öffnungszeiten" 🕰', plan={"tokens": [1]}, temperature=0.5)
    options: dict[str, Any] = {"timeout_s": 9.5, "priority": "batch", "max_queue": 9, "owner": "o", "notes": {"a": [1]}}
    key: dict[str, Any] = {"idempotency_key": "k", "fingerprint": "f"}
    submitted = await queue.submit(rich, job_id="first", **options, **key)
    assert submitted.record is not None
    assert submitted.record.position == 1
    assert submitted.record == await queue.get("first")
    assert await queue.submit(rich, job_id="second", **options, **key) == Submitted("first")
    assert await queue.submit(rich, job_id="first", **options) == Submitted("first")
    assert await queue.submit(rich, job_id="third", dry_run=True, **options) == Submitted("third")


async def test_checkpointed_plans_are_in_the_next_claim(queue: JobQueue):
    first, second = Plan(2, 1, [1, 2], TokenGrid(1, 1, [3])), Plan(1, 1, [4])
    job_id = await submit(queue, n=3)
    granted = await claim(queue)
    assert await queue.checkpoint_plan(granted, 0, first)
    assert await queue.checkpoint_plan(granted, 2, second)
    assert await queue.requeue_all("engine-1") == 1
    again = await claim(queue, "engine-2", IDLE)
    assert (again.job_id, again.plans) == (job_id, {0: first, 2: second})


async def test_ended_jobs_leave_no_keys_behind(redis_client: redis.asyncio.Redis):
    """However they end. The keys that stay do not grow with the number of jobs."""
    queue = JobQueue(redis_client, lease_ms=1, result_ttl_s=1)
    for end in ("commit", "fail", "cancel", "cancel queued", "discard", "discard unknown", "expire", "dead letter"):
        if end == "discard unknown":
            assert not await queue.discard("unknown")
            continue
        job_id = await submit(queue)
        if end == "cancel queued":
            assert await queue.cancel(job_id)
            continue
        granted = await claim(queue)
        await queue.checkpoint_plan(granted, 0, Plan(1, 1, [1]))
        await queue.progress(granted, {"step": 1})
        if end == "commit":
            assert await queue.commit(granted, RESULT)
        elif end == "fail":
            assert await queue.fail(granted, JobError("no"))
        elif end == "cancel":
            assert await queue.cancel(job_id)
        elif end == "discard":
            assert await queue.discard(job_id)
        else:
            if end == "expire":
                await pass_deadline(queue, job_id)
            for _ in range(4):
                await asyncio.sleep(0.005)  # the lease has lapsed
                await queue.claim("engine-1", IDLE)
        record = await queue.get(job_id)
        assert record is not None
        assert record.state.is_terminal
    assert await queue.claim("engine-1", IDLE) is None
    assert await _stream_lengths(redis_client) == (0, 0)
    await asyncio.sleep(1.05)
    left = {key.decode() async for key in redis_client.scan_iter()}
    assert left == {"glimmer:queue:interactive", "glimmer:queue:batch", "glimmer:counters"}


async def test_engines_are_listed_until_their_heartbeat_expires(queue: JobQueue, redis_client: redis.asyncio.Redis):
    first, second = (
        EngineInfo(name, 1, "all", "ready", "nano", "512x512", 16384, 1024, images_running=3) for name in ("e1", "e2")
    )
    await queue.heartbeat(second, "glimmer_x 2\n", ttl_s=60)
    await queue.heartbeat(first, "glimmer_x 1\n", ttl_s=0.05)
    assert await queue.engines() == [first, second]
    assert await queue.engine_metrics() == {"e1": "glimmer_x 1\n", "e2": "glimmer_x 2\n"}
    await asyncio.sleep(0.06)
    assert await queue.engines() == [second]
    assert await redis_client.smembers("glimmer:engines") == {b"e2"}
    await queue.deregister("e2")
    assert await queue.engines() == []
    assert {key async for key in redis_client.scan_iter()} == {b"glimmer:heard", b"glimmer:last_engine"}
    assert await redis_client.pttl("glimmer:heard") > 0


async def test_the_consumer_of_a_dead_engine_is_removed_after_its_jobs(
    queue: JobQueue, redis_client: redis.asyncio.Redis
):
    """Without a supervisor there is no `requeue_all`; consumers must not pile up."""

    async def names() -> set[bytes]:
        queues = [f"glimmer:queue:{priority}" for priority in ("interactive", "batch")]
        return {c["name"] for queue in queues for c in await redis_client.xinfo_consumers(queue, "engines")}

    await queue.heartbeat(EngineInfo("dead", 1, "all", "ready", "nano", "512x512", 16384, 1024), "", ttl_s=0.05)
    job_id = await submit(queue)
    await claim(queue, "dead")
    await asyncio.sleep(0.06)
    assert await queue.engines() == []
    assert await names() == {b"dead"}
    without_lease = JobQueue(redis_client, lease_ms=0)
    again = await claim(without_lease, "another", IDLE)
    assert again.job_id == job_id
    assert await queue.engines() == []
    assert await names() == {b"another"}
    assert await queue.commit(again, RESULT)


async def test_heartbeats_of_other_versions_can_be_read(queue: JobQueue, redis_client: redis.asyncio.Redis):
    """An older one without the defaults, and a newer one with an unknown field."""
    info = EngineInfo("e", 1, "all", "ready", "nano", "512x512", 16384, 1024, default_steps=12, default_guidance=3.0)
    await queue.heartbeat(info, "", ttl_s=60)
    fields = info.to_dict()
    await redis_client.hset("glimmer:engine:e", "info", orjson.dumps({**fields, "added_later": 1}))
    assert await queue.engines() == [info]
    older = {name: value for name, value in fields.items() if name not in ("default_steps", "default_guidance")}
    await redis_client.hset("glimmer:engine:e", "info", orjson.dumps(older))
    assert await queue.engines() == [replace(info, default_steps=50, default_guidance=1.5)]


async def _stream_lengths(client: redis.asyncio.Redis) -> tuple[int, int]:
    return await client.xlen("glimmer:queue:interactive"), await client.xlen("glimmer:queue:batch")
