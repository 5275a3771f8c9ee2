"""Measure how images per second grow with the number of engines, and what the queue itself can take.

    python -m benchmarks.scaling                    1, 2, 4 and 8 engines, 1 planner with 7 renderers, then the queue
    python -m benchmarks.scaling --engines 1 8 --seconds 5 --skip-queue

Engines are real processes (worker, queue, stages, schedulers) whose networks sleep, so that eight fit on two cores.
Jobs wait in the queue all the time; the rate is that of ends after the first ones.

The queue is driven by one client without engines: every job is submitted, claimed, planned, committed, and with
`hand-over` moved to the render queue in between. `ceiling` divides a second by the CPU time that Redis took for a job:
a Redis has one thread for commands.
"""

import argparse
import asyncio
import itertools
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from engine.jobs.connection import connect
from engine.jobs.embedded import EmbeddedRedis
from engine.jobs.job import Claim, FreeCapacity, JobSpec, Plan, Stage, TokenGrid
from engine.jobs.results import ImageResult, JobResult
from tests.chaos.processes import Stack, StackSettings
from tests.chaos.stub import StubSettings
from tests.job_queue import JobQueue

STUB = StubSettings(planner_step_s=0.002, renderer_tick_s=0.2, max_images=16, images_per_tick=1)  # 2 s an image
STEPS = 10
BACKLOG = 40  # jobs for each engine, waiting and running
WARM_UP_S = 3.0
ROOMY = FreeCapacity(images=10**6, kv_tokens=10**9, source_tokens=10**9, idle=False)
WORKERS = 16  # jobs at once of the queue's client
IMAGE_BYTES = (0, 1_500_000)  # the latter: a PNG of 1024x1024


@dataclass(frozen=True)
class Rate:
    """Images per second of a fleet in which `renderers` engines render."""

    label: str
    renderers: int
    images_per_second: float


@dataclass(frozen=True)
class Ceiling:
    """What jobs of one kind cost, per job: CPU seconds of Redis, and bytes it took in."""

    label: str
    image_bytes: int
    jobs_per_second: float
    redis_s: float
    bytes_in: float


# --- engines ----------------------------------------------------------------------------------------------------------


async def measure_engines(label: str, stages: Sequence[Stage], seconds: float, folder: Path) -> Rate:
    """Return the rate of a fleet that always has more jobs than it can run."""
    settings = StackSettings(stages=stages, apis=0, lease_s=10.0, stub=STUB)
    async with Stack(folder, settings) as stack, _full_queue(stack.queue, BACKLOG * len(stages)) as ends:
        await anext(ends)
        began, count, now = time.monotonic() + WARM_UP_S, 0, 0.0
        async for _ in ends:
            now = time.monotonic()
            count += now >= began
            if now >= began + seconds:
                break
        return Rate(label, sum(stage != "plan" for stage in stages), count / (now - began))


@asynccontextmanager
async def _full_queue(queue: JobQueue, jobs: int) -> AsyncIterator[AsyncIterator[str]]:
    """Submit a job for each that ends; yield the ends; cancel what is left."""
    numbers, live = itertools.count(), set[str]()

    async def submit() -> None:
        number = next(numbers)
        live.add(f"job-{number}")
        spec = JobSpec(f"image {number}", 64, 64, seed=number, num_inference_steps=STEPS)
        await queue.submit(spec, job_id=f"job-{number}", timeout_s=600, priority="interactive", max_queue=10**6)

    async def ends() -> AsyncIterator[str]:
        async with aclosing(queue.ended()) as ended:  # type: ignore[type-var]
            async for job_id in ended:
                live.discard(job_id)
                await submit()
                yield job_id

    for _ in range(jobs):
        await submit()
    async with aclosing(ends()) as all_ends:  # type: ignore[type-var]
        yield all_ends
    for job_id in live:
        await queue.cancel(job_id)


# --- the queue --------------------------------------------------------------------------------------------------------


async def measure_queue(seconds: float, image_bytes: int, *, hands_over: bool, folder: Path) -> Ceiling:
    """Return what jobs cost Redis, with every write synced to the disk."""
    with EmbeddedRedis(folder) as server:
        client = connect(server.url)
        stages: list[Stage] = ["plan", "render"] if hands_over else ["all"]
        queues = [JobQueue(client, stage=stage) for stage in stages]
        before, began, numbers, done = await client.info(), time.monotonic(), itertools.count(), 0

        async def work(worker: int) -> None:
            nonlocal done
            while time.monotonic() < began + seconds:
                await _run_job(queues, f"{worker}-{next(numbers)}", image_bytes)
                done += 1

        await asyncio.gather(*(work(worker) for worker in range(WORKERS)))
        elapsed, after = time.monotonic() - began, await client.info()
        cpu, taken = (
            sum(after[name] - before[name] for name in names)
            for names in (("used_cpu_user", "used_cpu_sys"), ("total_net_input_bytes",))
        )
        for queue in queues:
            await queue.close()
        await client.aclose()
    return Ceiling("hand-over" if hands_over else "one engine", image_bytes, done / elapsed, cpu / done, taken / done)


async def _run_job(queues: Sequence[JobQueue], name: str, image_bytes: int) -> None:
    """Take a job of 1024x1024 through the queue, as API and engines do; images leave Redis when they are delivered."""
    planner, renderer = queues[0], queues[-1]
    spec = JobSpec("an image of a lighthouse in a storm", 1024, 1024, seed=1)
    plan, preview = (TokenGrid(grid.rows, grid.cols, [12345] * grid.tokens) for grid in (spec.grids[1], spec.grids[0]))
    await planner.submit(spec, job_id=name, timeout_s=600, priority="interactive", max_queue=10**6)
    granted, written = await _claim(planner, f"planner-{name}"), Plan(plan.rows, plan.cols, plan.tokens, preview)
    if planner is renderer:
        await planner.checkpoint_plan(granted, 0, written)
    else:
        await planner.hand_over(f"planner-{name}", granted, {0: written}, 20, [])
        granted = await _claim(renderer, f"renderer-{name}")
    for step in range(4):
        await renderer.progress(granted, {"phase": "rendering", "step": step, "steps": 50})
    await renderer.commit(granted, JobResult([ImageResult(secrets.token_bytes(image_bytes), 1)], 20, spec.plan_tokens))
    await renderer.discard(granted.job_id)


async def _claim(queue: JobQueue, consumer: str) -> Claim:
    while (granted := await queue.claim(consumer, ROOMY)) is None:
        await queue.wait_for_work(0.05)
    return granted


# --- the command ------------------------------------------------------------------------------------------------------


async def run(engines: Sequence[int], seconds: float, *, with_queue: bool) -> tuple[list[Rate], list[Ceiling]]:
    """Measure fleets of `engines` and, where there are 8, one of 1 planner and 7 renderers; then the queue."""
    fleets: list[tuple[str, list[Stage]]] = [(f"{count} all", ["all"] * count) for count in engines]
    if 8 in engines:
        fleets.append(("1 plan + 7 render", ["plan", *["render"] * 7]))  # type: ignore[list-item]
    with tempfile.TemporaryDirectory(prefix="glimmer-scaling-") as name:
        folder = Path(name)
        rates = [
            await measure_engines(label, stages, seconds, folder / str(number))
            for number, (label, stages) in enumerate(fleets)
        ]
        kinds = list(itertools.product((False, True), IMAGE_BYTES)) if with_queue else []
        ceilings = [
            await measure_queue(seconds, size, hands_over=hands_over, folder=folder / f"queue-{number}")
            for number, (hands_over, size) in enumerate(kinds)
        ]
    return rates, ceilings


def print_rates(rates: Sequence[Rate], console: Console) -> None:
    """Print images per second, and their share of the first row's times the engines that render."""
    table = Table("engines", "images/s", "of linear")
    first = rates[0].images_per_second / rates[0].renderers
    for rate in rates:
        share = rate.images_per_second / (first * rate.renderers)
        table.add_row(rate.label, f"{rate.images_per_second:.2f}", f"{share:.2f}")
    console.print(table)


def print_ceilings(ceilings: Sequence[Ceiling], console: Console) -> None:
    """Print rates of jobs and bytes, and what one thread of Redis can take at most."""
    table = Table("queue", "image MB", "jobs/s", "MB/s", "Redis ms/job", "ceiling jobs/s", "ceiling MB/s")
    for ceiling in ceilings:
        at_most, megabytes = 1 / ceiling.redis_s, ceiling.bytes_in / 1e6
        rates = (ceiling.jobs_per_second, ceiling.jobs_per_second * megabytes, 1e3 * ceiling.redis_s)
        cells = (*(f"{value:.2f}" for value in rates), f"{at_most:.0f}", f"{at_most * megabytes:.0f}")
        table.add_row(ceiling.label, f"{ceiling.image_bytes / 1e6:g}", *cells)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--engines", type=int, nargs="+", default=[1, 2, 4, 8], help="sizes of the fleets")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--skip-queue", action="store_true", help="measure engines only")
    arguments = parser.parse_args()
    rates, ceilings = asyncio.run(run(arguments.engines, arguments.seconds, with_queue=not arguments.skip_queue))
    print_rates(rates, Console())
    if ceilings:
        print_ceilings(ceilings, Console())


if __name__ == "__main__":
    main()
