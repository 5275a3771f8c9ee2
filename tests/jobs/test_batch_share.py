"""Batch jobs get a quarter of the work while interactive jobs wait, whatever the sizes of both."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from engine.jobs.connection import connect
from engine.jobs.embedded import EmbeddedRedis
from engine.jobs.job import Claim, FreeCapacity, Priority, SourceImages
from tests.job_queue import JobQueue
from tests.jobs.helpers import IDLE, RESULT, ROOMY, claim, submit


@dataclass(frozen=True)
class Size:
    images: int
    side: int
    steps: int

    @property
    def work(self) -> int:
        return self.images * self.side**2 * self.steps


SIZES = st.builds(Size, st.integers(1, 10), st.sampled_from([64, 512, 2048]), st.sampled_from([1, 50, 200]))


async def _submit(queue: JobQueue, priority: Priority, size: Size) -> str:
    return await submit(
        queue,
        priority=priority,
        timeout_s=3600,
        n=size.images,
        width=size.side,
        height=size.side,
        num_inference_steps=size.steps,
    )


def _run(server: EmbeddedRedis, test: Callable[[JobQueue], Awaitable[None]]) -> None:
    async def run() -> None:
        client = connect(server.url)
        await client.flushdb()
        await test(JobQueue(client))
        await client.flushdb()
        await client.aclose()

    asyncio.run(run())


@settings(max_examples=30, deadline=None)
@given(interactive=st.lists(SIZES, min_size=1, max_size=3), batch=st.lists(SIZES, min_size=1, max_size=3))
def test_any_mix_of_sizes(redis_server: EmbeddedRedis, interactive: Sequence[Size], batch: Sequence[Size]):
    async def test(queue: JobQueue) -> None:
        work = {"interactive": 0, "batch": 0}
        for number in range(40):
            await _submit(queue, "interactive", interactive[number % len(interactive)])
            await _submit(queue, "batch", batch[number % len(batch)])
            granted = await claim(queue)
            work[await _priority(queue, granted)] += granted.spec.pixel_steps
            assert 3 * work["batch"] <= work["interactive"]
        if len(interactive) == len(batch) == 1:
            assert 3 * work["batch"] + 3 * batch[0].work + interactive[0].work >= work["interactive"]

    _run(redis_server, test)


async def _priority(queue: JobQueue, granted: Claim) -> str:
    return (await queue.client.hget(f"glimmer:job:{granted.job_id}", "priority")).decode()  # type: ignore


async def test_batch_jobs_get_everything_while_no_interactive_job_waits(queue: JobQueue):
    jobs = [await _submit(queue, "batch", Size(10, 2048, 200)) for _ in range(3)]
    assert [(await claim(queue)).job_id for _ in range(3)] == jobs


async def test_a_batch_job_that_does_not_fit_lets_interactive_jobs_pass(queue: JobQueue):
    await _submit(queue, "batch", Size(4, 64, 1))
    busy = replace(ROOMY, images=3)
    for _ in range(20):
        job_id = await submit(queue)
        assert (await claim(queue, free=busy)).job_id == job_id


@pytest.mark.parametrize("size", [Size(4, 64, 1), Size(10, 512, 50)])
async def test_a_batch_job_that_never_fits_gets_an_engine_in_the_end(queue: JobQueue, size: Size):
    """An engine with three places is never idle, and interactive jobs always wait."""
    large, running = await _submit(queue, "batch", size), list[Claim]()
    for _ in range(1000):
        if (await queue.stats()).waiting < 5:
            await _submit(queue, "interactive", Size(1, 512, 50))
        places = 3 - len(running)
        free = FreeCapacity(images=places, kv_tokens=10**9, source_tokens=0, idle=False) if running else IDLE
        granted = await queue.claim("engine-1", free)
        if granted is None or len(running) == 3:
            await queue.commit(running.pop(0), RESULT)
        if granted is not None and granted.job_id == large:
            break
        if granted is not None:
            running.append(granted)
    else:
        pytest.fail("starved")


async def test_no_burst_follows_a_batch_job_that_waited_for_room(queue: JobQueue):
    edit = await submit(queue, priority="batch", source_images=SourceImages([b"x"]), source_tokens=24)
    for _ in range(40):
        await submit(queue)
    for _ in range(20):
        await submit(queue, priority="batch")
    for _ in range(30):
        assert (await claim(queue, free=replace(ROOMY, source_tokens=0))).job_id != edit
    assert (await claim(queue)).job_id == edit
    assert [await _priority(queue, await claim(queue)) for _ in range(8)].count("batch") <= 3
