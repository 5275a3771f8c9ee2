"""Jobs between the stages: what the stateful test does not see."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import pytest
import redis.asyncio

from engine.jobs.job import HandedOver, Plan, PreviewOffer, Stage, TokenGrid
from engine.jobs.results import PartialImage
from tests.job_queue import JobQueue
from tests.jobs.helpers import IDLE, RESULT, ROOMY, TIMEOUT_S, claim, pass_deadline, submit

QueueOfStage = Callable[..., JobQueue]

PLAN = Plan(1, 2, [3, 4], TokenGrid(1, 1, [5]))
GRID = TokenGrid(2, 2, [1, 2, 3, 4])
CODES = [TokenGrid(1, 2, [7, 8])]


@pytest.fixture
async def of_stage(redis_client: redis.asyncio.Redis) -> AsyncIterator[QueueOfStage]:
    """Open queues of a stage, and close them after the test, passed or failed."""
    async with AsyncExitStack() as opened:

        def open_queue(stage: Stage, **options: Any) -> JobQueue:
            queue = JobQueue(redis_client, stage=stage, **options)
            opened.push_async_callback(queue.close)
            return queue

        yield open_queue


@pytest.fixture
def planner(of_stage: QueueOfStage) -> JobQueue:
    queue = of_stage("plan")
    queue.planner = "planner-1"
    return queue


@pytest.fixture
def renderer(of_stage: QueueOfStage) -> JobQueue:
    return of_stage("render")


async def hand_over(planner: JobQueue, consumer: str = "planner") -> str:
    """Claim the next job and hand it over; return its id."""
    granted = await claim(planner, consumer)
    assert await planner.hand_over(consumer, granted, {0: PLAN}, 3, CODES)
    return granted.job_id


async def test_a_renderer_gets_plan_codes_and_the_job_as_it_was(planner: JobQueue, renderer: JobQueue) -> None:
    job_id = await submit(planner, num_sources=1, source_tokens=2, owner="anna", priority="batch")
    submitted = await planner.get(job_id)
    assert submitted is not None
    assert await renderer.claim("renderer", IDLE) is None
    await hand_over(planner)
    handed_over = await planner.get(job_id)
    assert handed_over == replace(submitted, position=0)
    assert await planner.claim("planner", IDLE) is None
    granted = await claim(renderer, "renderer")
    assert (granted.job_id, granted.spec, granted.runs) == (job_id, submitted.spec, 1)
    assert (granted.plans, granted.handed_over) == ({0: PLAN}, HandedOver(3, CODES))
    assert (granted.submitted_at, granted.deadline_ms) == (submitted.submitted_at, submitted.deadline_ms)
    assert await renderer.commit(granted, RESULT)


async def test_a_job_keeps_its_place_by_its_submit(planner: JobQueue) -> None:
    first, second = await submit(planner), await submit(planner)
    await hand_over(planner)
    records = [await planner.get(job_id) for job_id in (first, second)]
    assert [record.position for record in records if record] == [0, 1]


async def test_plans_of_any_planner_are_rendered(of_stage: QueueOfStage, planner: JobQueue) -> None:
    await submit(planner)
    await hand_over(planner)
    other = of_stage("all")
    other.planner = "planner-2"
    assert (await claim(other)).plans == {0: PLAN}


async def test_an_interactive_job_to_plan_comes_before_a_planned_batch_job(planner: JobQueue, queue: JobQueue) -> None:
    batch = await submit(queue, priority="batch")
    await hand_over(planner)
    interactive, later = await submit(queue), await submit(queue)
    await hand_over(planner)
    granted = [(await claim(queue)).job_id for _ in range(3)]
    assert granted == [interactive, later, batch]


async def test_a_planned_job_needs_no_memory_of_the_planner(planner: JobQueue, queue: JobQueue) -> None:
    job_id = await submit(planner)
    assert await queue.claim("engine-1", replace(ROOMY, kv_tokens=0)) is None
    await hand_over(planner)
    assert (await claim(queue, free=replace(ROOMY, kv_tokens=0))).job_id == job_id


async def test_a_dead_renderer_s_job_is_rendered_again_with_its_plan(
    of_stage: QueueOfStage, planner: JobQueue, renderer: JobQueue
) -> None:
    """Both by the end of its lease and by a supervisor."""
    await submit(planner)
    await hand_over(planner)
    await claim(renderer, "renderer-1")
    assert await of_stage("plan", lease_ms=0).claim("planner", IDLE) is None
    again = await claim(of_stage("render", lease_ms=0), "renderer-2", IDLE)
    assert (again.plans, again.quarantined) == ({0: PLAN}, True)
    assert await renderer.requeue_all("renderer-2") == 1
    assert (await claim(renderer, "renderer-3", IDLE)).plans == {0: PLAN}


async def test_the_first_steps_of_both_stages_are_different_deaths(planner: JobQueue, renderer: JobQueue) -> None:
    """One death alone in each stage is no poison, two in one stage are."""
    job_id = await submit(planner)
    for _ in range(2):
        await planner.progress(await claim(planner, "planner", IDLE), {"phase": "planning", "step": 0, "steps": 9})
        await planner.requeue_all("planner")
    granted = await claim(planner, "planner-2", IDLE)
    assert granted.quarantined
    assert await planner.hand_over("planner-2", granted, {0: PLAN}, 3, CODES)
    granted = await claim(renderer, "renderer-1", IDLE)
    assert (granted.quarantined, granted.runs) == (True, 3)
    await renderer.requeue_all("renderer-1")
    assert (await claim(renderer, "renderer-2", IDLE)).job_id == job_id
    await renderer.requeue_all("renderer-2")
    assert await renderer.claim("renderer-3", IDLE) is None
    record = await renderer.get(job_id)
    assert record is not None
    assert record.error is not None


async def test_a_lost_claim_hands_nothing_over(of_stage: QueueOfStage, planner: JobQueue) -> None:
    """Not even one of the engine that has the job again."""
    await submit(planner)
    lost = await claim(planner, "planner")
    again = await claim(of_stage("plan", lease_ms=0), "planner", IDLE)
    assert not await planner.hand_over("planner", lost, {0: PLAN}, 3, [])
    assert await planner.hand_over("planner", again, {0: PLAN}, 3, [])
    assert not await planner.hand_over("planner", again, {0: PLAN}, 3, [])


async def test_ends_of_a_handed_over_job_leave_nothing(redis_client: Any, planner: JobQueue) -> None:
    for number, end in enumerate((planner.cancel, planner.discard, planner.expire)):
        job_id = await submit(planner, job_id=f"job{number}")
        await hand_over(planner)
        await pass_deadline(planner, job_id)
        assert await end(job_id)
        assert not await redis_client.exists(f"glimmer:plans:{job_id}")
    assert await redis_client.xlen("glimmer:queue:render:interactive") == 0
    stats = await planner.stats()
    assert (stats.to_plan, stats.to_render, stats.waiting) == (0, 0, 0)


async def test_the_consumers_of_dead_renderers_are_forgotten(
    redis_client: Any, of_stage: QueueOfStage, planner: JobQueue
) -> None:
    await submit(planner)
    await hand_over(planner)
    await redis_client.sadd("glimmer:engines", "dead")
    granted = await claim(of_stage("render"), "dead")
    await planner.engines()
    assert await redis_client.sismember("glimmer:engines", "dead"), "it may come back"
    await planner.commit(granted, RESULT)
    await planner.engines()
    assert await redis_client.xinfo_consumers("glimmer:queue:render:interactive", "engines") == []
    assert not await redis_client.sismember("glimmer:engines", "dead")


async def test_a_hand_over_is_announced_and_wakes_renderers_only(
    of_stage: QueueOfStage, planner: JobQueue, renderer: JobQueue, queue: JobQueue
) -> None:
    idle_planner = of_stage("plan")
    await submit(planner)
    for each in (idle_planner, renderer, queue):
        await each.wait_for_work(TIMEOUT_S)  # subscribed
    granted = await claim(planner, "planner")
    waits = {each: asyncio.create_task(each.wait_for_work(TIMEOUT_S)) for each in (idle_planner, renderer, queue)}
    with queue.events.waiter(granted.job_id, every_change=True) as changed:
        await asyncio.sleep(0.2)
        changed.clear()
        assert await planner.hand_over("planner", granted, {0: PLAN}, 3, [])
        await asyncio.wait_for(changed.wait(), TIMEOUT_S)
    await asyncio.wait_for(asyncio.gather(waits[renderer], waits[queue]), TIMEOUT_S / 2)
    assert not waits[idle_planner].done()
    waits[idle_planner].cancel()


async def test_a_damaged_hand_over_fails_its_job_only(redis_client: Any, planner: JobQueue, renderer: JobQueue) -> None:
    bad, worse, good = await submit(planner), await submit(planner), await submit(planner)
    for _ in range(3):
        await hand_over(planner)
    await redis_client.hset(f"glimmer:plans:{bad}", "handed_over", b'{"prompt_tokens":"3","sources":[]}')
    await redis_client.hset(f"glimmer:job:{worse}", "stage", "between")
    assert (await claim(renderer, "renderer")).job_id == good
    for job_id in (bad, worse):
        assert (await redis_client.hget(f"glimmer:job:{job_id}", "state")) == b"failed"


async def test_a_job_of_an_unknown_stage_leaves_nothing_in_a_queue(
    redis_client: Any, planner: JobQueue, renderer: JobQueue
) -> None:
    job_id = await submit(planner)
    await hand_over(planner)
    await redis_client.hset(f"glimmer:job:{job_id}", "stage", "between")
    await renderer.cancel(job_id)
    assert (await redis_client.hget(f"glimmer:job:{job_id}", "state")) == b"failed"
    assert await renderer.claim("renderer", IDLE) is None


async def test_hand_overs_keep_their_order_when_the_clock_stands_still_or_goes_back(
    redis_client: Any, planner: JobQueue, renderer: JobQueue
) -> None:
    """As after a failover to a machine whose clock is behind."""
    jobs = [await submit(planner) for _ in range(4)]
    await hand_over(planner)
    [(entry, _)] = await redis_client.xrange("glimmer:queue:render:interactive")
    time, sequence = map(int, entry.split(b"-"))
    await redis_client.execute_command("XSETID", "glimmer:queue:render:interactive", f"{time + 10**9}-{sequence}")
    for _ in range(3):
        await hand_over(planner)
    assert [(await claim(renderer, "renderer")).job_id for _ in jobs] == jobs


async def test_a_planned_job_that_is_put_back_wakes_renderers_only(
    of_stage: QueueOfStage, planner: JobQueue, renderer: JobQueue
) -> None:
    idle = {stage: of_stage(stage) for stage in ("plan", "render")}
    await submit(planner)
    await hand_over(planner)
    granted = await claim(renderer, "renderer")
    for each in idle.values():
        await each.wait_for_work(TIMEOUT_S)  # subscribed
    waits = {stage: asyncio.create_task(each.wait_for_work(TIMEOUT_S)) for stage, each in idle.items()}
    await asyncio.sleep(0.2)
    assert await renderer.requeue("renderer", granted)
    await asyncio.wait_for(waits["render"], TIMEOUT_S / 2)
    assert not waits["plan"].done()
    waits["plan"].cancel()


async def test_a_renewal_restarts_the_lease_of_a_planned_job(
    redis_client: Any, planner: JobQueue, renderer: JobQueue
) -> None:
    await submit(planner)
    await hand_over(planner)
    granted = await claim(renderer, "renderer")
    queue, group = "glimmer:queue:render:interactive", "engines"
    [pending] = await redis_client.xpending_range(queue, group, "-", "+", 1)
    await redis_client.xclaim(queue, group, "renderer", 0, [pending["message_id"]], idle=3_600_000, justid=True)
    assert await renderer.renew("renderer", [granted]) == []
    [pending] = await redis_client.xpending_range(queue, group, "-", "+", 1)
    assert pending["time_since_delivered"] < 3_600_000


async def test_turns_of_batch_jobs_are_counted_for_each_stage(
    planner: JobQueue, renderer: JobQueue, queue: JobQueue
) -> None:
    """Three interactive jobs that a planner takes earn a batch job its turn there, and none in the render queue."""
    planned_batch = await submit(queue, priority="batch")
    await hand_over(planner)
    planned = await submit(queue)
    await hand_over(planner)
    batch = await submit(queue, priority="batch")
    others = [await submit(queue) for _ in range(4)]
    assert [(await claim(planner, "planner")).job_id for _ in range(3)] == others[:3]
    assert [(await claim(renderer, "renderer")).job_id for _ in range(2)] == [planned, planned_batch]
    assert (await claim(planner, "planner")).job_id == batch


# --- previews ---------------------------------------------------------------------------------------------------------


async def test_a_preview_goes_to_one_renderer_while_its_job_is_planned(planner: JobQueue, renderer: JobQueue) -> None:
    job_id = await submit(planner, n=3, partial_images=2)
    granted = await claim(planner, "planner")
    assert await planner.offer_preview(granted, 2, GRID)
    offer = await renderer.take_preview()
    assert offer is not None
    assert offer == PreviewOffer(job_id, granted.epoch, 2, GRID, granted.spec, offer.seconds_left)
    assert 50 < offer.seconds_left <= 60
    assert await renderer.take_preview() is None
    assert await renderer.preview_image(offer, PartialImage(2, 0, b"pixels", GRID.to_dict()))
    updates = planner.follow(job_id)
    assert PartialImage(2, 0, b"pixels", GRID.to_dict()) in [await anext(updates), await anext(updates)]
    await updates.aclose()


@pytest.mark.parametrize("change", ["handed over", "cancelled", "requeued", "claimed again"])
async def test_a_preview_whose_claim_is_over_is_dropped(
    redis_client: Any, of_stage: QueueOfStage, planner: JobQueue, renderer: JobQueue, change: str
) -> None:
    """Whether it waits or is being rendered."""
    await submit(planner, partial_images=1)
    granted = await claim(planner, "planner")
    await planner.offer_preview(granted, 0, GRID)
    await planner.offer_preview(granted, 0, GRID)
    offer = await renderer.take_preview()
    assert offer is not None
    if change == "handed over":
        await planner.hand_over("planner", granted, {0: PLAN}, 3, [])
    elif change == "cancelled":
        await planner.cancel(granted.job_id)
    elif change == "requeued":
        await planner.requeue("planner", granted)
    else:
        await claim(of_stage("plan", lease_ms=0), "planner-2", IDLE)
    assert not await renderer.preview_image(offer, PartialImage(0, 0, b"late", {}))
    assert not await planner.offer_preview(granted, 0, GRID)
    assert await renderer.take_preview() is None
    assert not await redis_client.exists(f"glimmer:partials:{granted.job_id}")


async def test_previews_without_renderers_do_not_pile_up(redis_client: Any, planner: JobQueue) -> None:
    await submit(planner, partial_images=1)
    granted = await claim(planner, "planner")
    for _ in range(100):
        await planner.offer_preview(granted, 0, GRID)
    assert await redis_client.llen("glimmer:previews") == 64
    assert await redis_client.pttl("glimmer:previews") > 0


async def test_a_damaged_preview_is_passed_over(redis_client: Any, planner: JobQueue, renderer: JobQueue) -> None:
    await submit(planner, partial_images=1)
    granted = await claim(planner, "planner")
    await redis_client.rpush("glimmer:previews", b"nonsense", f"{granted.epoch} 0 {granted.job_id}\n[]".encode())
    await planner.offer_preview(granted, 0, GRID)
    offer = await renderer.take_preview()
    assert offer is not None
    assert offer.grid == GRID
