"""Scenarios without faults: clients that leave, more clients than can be served, and a new version going live."""

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.cases import MIXED, Case, Cases
from tests.chaos.clients import Clients
from tests.chaos.evidence import Evidence
from tests.chaos.ledger import Entry, Ledger, quantile
from tests.chaos.processes import StackSettings
from tests.chaos.redis_contents import RedisContents
from tests.chaos.report import Figure
from tests.chaos.scenarios import Sizes
from tests.chaos.scene import DELIVERED_S, Scene, scene
from tests.chaos.stub import StubSettings
from tests.waiting import until

FREED_S = 1.0  # beyond one step
OVERLOAD = 10
REFUSED_MS = 100.0
GOODPUT = 0.95
FILLING_S = 2.0  # until idle engines have something to show


async def leavers(folder: Path, seed: int, sizes: Sizes) -> list[Figure]:
    """Clients that close the connection at any moment of a job's life; more of them than the engines have room for."""
    settings = StackSettings()
    async with scene("client disconnect", folder, seed, settings) as here:
        slots = settings.engines * settings.stub.max_images
        async with here.load(iter(Cases(seed, {"plain": 1})), slots, slots):
            pass  # so that it is known how long a picture takes
        cases = iter(Cases(seed + 1, {"leaves": 3, "plain": 1}, steps=(10, 40)))
        async with here.load(cases, max(sizes.concurrency, slots * 3 // 2)):
            await until(lambda: here.ledger.count("left") >= sizes.leavers, None)
        await asyncio.sleep(DELIVERED_S)
        blobs = (await RedisContents.read(here.stack.client)).results
    _judge_leavers(here, Evidence.read(folder))
    here.report.none("pictures that stay though nobody will ask for them", blobs)
    return here.report.figures


def _judge_leavers(here: Scene, evidence: Evidence) -> None:
    phases: Counter[str] = Counter()
    waits: list[float] = []
    kept: list[str] = []
    for entry in here.ledger.entries:
        if entry.outcome != "left":
            continue
        phase, wait = _freed(entry, evidence)
        phases[phase] += 1
        if wait is None:
            kept.append(entry.case.prompt)
        else:
            waits.append(wait)
    waits.sort()
    limit = here.stack.settings.stub.renderer_tick_s + FREED_S
    here.report.tell("clients that left", ", ".join(f"{count} {phase}" for phase, count in phases.items()))
    here.report.none("slots that were never freed", kept)
    told = f"{quantile(waits, 0.5):.3f}, {quantile(waits, 1):.3f}"
    here.report.hold(
        "slot free again p50, max s", told, f"<= {limit:g}", bool(waits) and waits[-1] <= limit, timed=True
    )


def _freed(entry: Entry, evidence: Evidence) -> tuple[str, float | None]:
    """What the job was at when its client left, and seconds until its engine held nothing of it; None if it still does.

    An engine that draws the job later has not noticed yet: that counts, too.
    """
    assert entry.left_at is not None
    runs = evidence.runs_of(entry.case.prompt)
    if not runs:
        return "waiting", 0.0
    freed = max(evidence.freed.get((run.job, run.epoch), float("inf")) for run in runs)
    wait = max(0.0, freed - entry.left_at) if freed != float("inf") else None
    if runs[0].at > entry.left_at:
        return "waiting", wait
    if freed < entry.left_at:
        return "done", wait
    writes = evidence.writes[runs[0].job]
    planned = any(write.kind == "checkpoint" and write.began < entry.left_at for write in writes)
    return "rendering" if planned else "planning", wait


# --- overload ---------------------------------------------------------------------------------------------------------


@dataclass
class Depth:
    """How many jobs waited, looked at many times a second."""

    most: int = 0

    async def watch(self, here: Scene) -> None:
        while True:
            self.most = max(self.most, (await here.stack.queue.stats()).waiting)
            await asyncio.sleep(0.02)


async def overload(folder: Path, seed: int, sizes: Sizes) -> list[Figure]:
    """First as many clients as can be served, to learn the best goodput; then ten times as many requests."""
    # Slow engines: what is measured is the door, and ten times their pace must be easy for the clients.
    stub = StubSettings(planner_step_s=0.003, renderer_tick_s=0.03, max_images=4, images_per_tick=4)
    settings = StackSettings(max_queue=24, stub=stub)
    slots = settings.engines * stub.max_images
    async with scene("overload", folder, seed, settings) as here:
        cases = (_plain(number) for number in itertools.count())
        best = await _best(here, cases, slots + settings.max_queue // 2, max(4.0, sizes.overload_s / 10))
        ledger, depth = Ledger(), Depth()
        watching = asyncio.create_task(depth.watch(here))
        await _flood(here, ledger, cases, OVERLOAD * best, sizes.overload_s)
        watching.cancel()
        here.ledger.entries += ledger.entries
    _judge_overload(here, ledger, depth, best, sizes.overload_s)
    return here.report.figures


def _plain(number: int) -> Case:
    """All alike, so that goodput can be compared."""
    return Case(number, "plain", f"overload {number}", seed=number, steps=8)


async def _best(here: Scene, cases: Iterator[Case], concurrency: int, seconds: float) -> float:
    """Pictures a second when there is always work and never too much."""
    async with here.load(cases, concurrency):
        await asyncio.sleep(FILLING_S)
        before, began = here.ledger.count("pictures"), time.monotonic()
        await asyncio.sleep(seconds)
        return (here.ledger.count("pictures") - before) / (time.monotonic() - began)


async def _flood(here: Scene, ledger: Ledger, cases: Iterator[Case], rate: float, seconds: float) -> None:
    """Requests come at a steady rate whatever becomes of them."""
    clients = Clients(lambda: here.stack.urls, ledger, patient=False)
    began = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for number, case in enumerate(cases):
            wait = began + number / rate - time.monotonic()
            if wait > 0:
                await asyncio.sleep(wait)
            if time.monotonic() - began > seconds:
                break
            group.create_task(clients.serve(case))
    await clients.close()


def _judge_overload(here: Scene, ledger: Ledger, depth: Depth, best: float, seconds: float) -> None:
    report, cap = here.report, here.stack.settings.max_queue
    slots = here.stack.settings.engines * here.stack.settings.stub.max_images
    began = min(entry.started for entry in ledger.entries)
    with_redis_timeout = (began + FILLING_S, began + seconds)
    served = sum(
        e.outcome == "pictures" and with_redis_timeout[0] < e.ended <= with_redis_timeout[1] for e in ledger.entries
    )
    goodput, refusals, latencies = served / (seconds - FILLING_S), sorted(ledger.refusals[429]), ledger.latencies()
    bound = 1.5 * (cap + slots) / best + 1.0
    report.tell("requests a second, for seconds", f"{len(ledger.entries) / seconds:.0f}, {seconds:.0f}")
    report.tell("answered 429", f"{len(refusals)} of {len(ledger.entries)}")
    report.hold("waiting jobs, most", depth.most, f"<= {cap}", depth.most <= cap)
    told = f"{goodput:.1f} of {best:.1f} a second"
    report.hold("goodput", told, f">= {GOODPUT:.0%} of the best", goodput >= GOODPUT * best, timed=True)
    p50, p99 = (1e3 * quantile(refusals, share) for share in (0.5, 0.99))
    report.hold("429 p50, p99 ms", f"{p50:.0f}, {p99:.0f}", f"p99 <= {REFUSED_MS:g}", 0 < p99 <= REFUSED_MS, timed=True)
    p50, worst = quantile(latencies, 0.5), quantile(latencies, 1)
    told = f"{p50:.2f}, {worst:.2f}"
    report.hold("accepted work p50, max s", told, f"<= {bound:.1f}", worst <= bound, timed=True)


# --- a new version ----------------------------------------------------------------------------------------------------


async def rolling(folder: Path, seed: int, sizes: Sizes) -> list[Figure]:
    """Every API and every engine is drained and replaced under load, one after the other."""
    codes: list[int] = []
    async with (
        scene("rolling restart", folder, seed, StackSettings(apis=2)) as here,
        here.load(iter(Cases(seed, MIXED)), sizes.concurrency),
    ):
        here.servers_go = True
        for _ in range(sizes.restarts):
            for engine in here.stack.engines:
                await asyncio.sleep(0.5)
                codes.append(await here.stack.restart_engine(engine))
            for number in range(len(here.stack.apis)):
                await asyncio.sleep(0.5)
                codes.append(await here.stack.restart_api(number))
    here.report.hold("processes restarted, exit codes", f"{len(codes)}, {sorted(set(codes))}", "all 0", not any(codes))
    return here.report.figures
