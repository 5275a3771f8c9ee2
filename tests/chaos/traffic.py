"""Scenarios without faults: disconnecting clients, overload, and rolling restarts."""

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
from tests.chaos.scene import DELIVERED_S, Scene, open_scene
from tests.chaos.sizes import Sizes
from tests.chaos.stub import StubSettings
from tests.waiting import until

FREED_S = 1.0  # beyond one step
OVERLOAD = 10
REFUSED_MS = 100.0
GOODPUT = 0.95
FILLING_S = 2.0  # until idle engines return their first images


async def leavers(folder: Path, seed: int, sizes: Sizes) -> list[Figure]:
    """Let more clients than the engines have room for disconnect at any moment of a job's life."""
    settings = StackSettings()
    async with open_scene("client disconnect", folder, seed, settings) as scene:
        places = settings.engines * settings.stub.max_images
        async with scene.load(iter(Cases(seed, {"plain": 1})), places, places):
            pass  # to learn how long an image takes
        cases = iter(Cases(seed + 1, {"disconnects": 3, "plain": 1}, steps=(10, 40)))
        async with scene.load(cases, max(sizes.concurrency, places * 3 // 2)):
            await until(lambda: scene.ledger.count("disconnected") >= sizes.leavers, None)
        await asyncio.sleep(DELIVERED_S)
        blobs = (await RedisContents.read(scene.stack.client)).results
    _judge_leavers(scene, Evidence.read(folder))
    scene.report.check_none("images kept after a disconnect", blobs)
    return scene.report.figures


def _judge_leavers(scene: Scene, evidence: Evidence) -> None:
    phases: Counter[str] = Counter()
    waits: list[float] = []
    kept: list[str] = []
    for entry in scene.ledger.entries:
        if entry.outcome != "disconnected":
            continue
        phase, wait = _freed(entry, evidence)
        phases[phase] += 1
        if wait is None:
            kept.append(entry.case.prompt)
        else:
            waits.append(wait)
    waits.sort()
    limit = scene.stack.settings.stub.renderer_tick_s + FREED_S
    scene.report.note("clients disconnected", ", ".join(f"{count} {phase}" for phase, count in phases.items()))
    scene.report.check_none("places never freed", kept)
    value = f"{quantile(waits, 0.5):.3f}, {quantile(waits, 1):.3f}"
    scene.report.check(
        "place free again p50, max s", value, f"<= {limit:g}", bool(waits) and waits[-1] <= limit, timed=True
    )


def _freed(entry: Entry, evidence: Evidence) -> tuple[str, float | None]:
    """Return the job's phase at the disconnect, and the seconds until its engine held nothing of it; None if it does.

    This includes an engine that claims the job later, because the disconnect has not reached it.
    """
    assert entry.disconnected_at is not None
    runs = evidence.runs_of(entry.case.prompt)
    if not runs:
        return "waiting", 0.0
    freed = max(evidence.freed.get((run.job, run.epoch), float("inf")) for run in runs)
    wait = max(0.0, freed - entry.disconnected_at) if freed != float("inf") else None
    if runs[0].at > entry.disconnected_at:
        return "waiting", wait
    if freed < entry.disconnected_at:
        return "done", wait
    writes = evidence.writes[runs[0].job]
    planned = any(write.kind == "checkpoint" and write.began < entry.disconnected_at for write in writes)
    return "rendering" if planned else "planning", wait


# --- overload ---------------------------------------------------------------------------------------------------------


@dataclass
class Depth:
    """The maximum number of waiting jobs, sampled many times a second."""

    maximum: int = 0

    async def sample(self, scene: Scene) -> None:
        while True:
            self.maximum = max(self.maximum, (await scene.stack.queue.stats()).waiting)
            await asyncio.sleep(0.02)


async def overload(folder: Path, seed: int, sizes: Sizes) -> list[Figure]:
    """Find the best goodput, with as many clients as can be served; then send ten times as many requests."""
    # Slow engines, so that clients can easily send ten times their rate: admission is measured.
    stub = StubSettings(planner_step_s=0.003, renderer_tick_s=0.03, max_images=4, images_per_tick=4)
    settings = StackSettings(max_queue=24, stub=stub)
    places = settings.engines * stub.max_images
    async with open_scene("overload", folder, seed, settings) as scene:
        cases = (_plain(number) for number in itertools.count())
        best = await _best(scene, cases, places + settings.max_queue // 2, max(4.0, sizes.overload_s / 10))
        ledger, depth = Ledger(), Depth()
        sampling = asyncio.create_task(depth.sample(scene))
        await _flood(scene, ledger, cases, OVERLOAD * best, sizes.overload_s)
        sampling.cancel()
        scene.ledger.entries += ledger.entries
    _judge_overload(scene, ledger, depth, best, sizes.overload_s)
    return scene.report.figures


def _plain(number: int) -> Case:
    """Return a plain case; all have the same cost, so that goodput can be compared."""
    return Case(number, "plain", f"overload {number}", seed=number, steps=8)


async def _best(scene: Scene, cases: Iterator[Case], concurrency: int, seconds: float) -> float:
    """Return images per second with enough clients, but no refusals."""
    async with scene.load(cases, concurrency):
        await asyncio.sleep(FILLING_S)
        before, began = scene.ledger.count("images"), time.monotonic()
        await asyncio.sleep(seconds)
        return (scene.ledger.count("images") - before) / (time.monotonic() - began)


async def _flood(scene: Scene, ledger: Ledger, cases: Iterator[Case], rate: float, seconds: float) -> None:
    """Send requests at a fixed rate."""
    clients = Clients(lambda: scene.stack.urls, ledger, retry_refused=False)
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


def _judge_overload(scene: Scene, ledger: Ledger, depth: Depth, best: float, seconds: float) -> None:
    report, cap = scene.report, scene.stack.settings.max_queue
    places = scene.stack.settings.engines * scene.stack.settings.stub.max_images
    began = min(entry.started for entry in ledger.entries)
    measured_from, measured_until = began + FILLING_S, began + seconds
    served = sum(e.outcome == "images" and measured_from < e.ended <= measured_until for e in ledger.entries)
    goodput, refusals, latencies = served / (seconds - FILLING_S), sorted(ledger.refusals[429]), ledger.latencies()
    bound = 1.5 * (cap + places) / best + 1.0
    report.note("requests per second, for seconds", f"{len(ledger.entries) / seconds:.0f}, {seconds:.0f}")
    report.note("refused with 429", f"{len(refusals)} of {len(ledger.entries)}")
    report.check("waiting jobs, maximum", depth.maximum, f"<= {cap}", depth.maximum <= cap)
    value = f"{goodput:.1f} of {best:.1f} per second"
    report.check("goodput", value, f">= {GOODPUT:.0%} of the best", goodput >= GOODPUT * best, timed=True)
    p50, p99 = (1e3 * quantile(refusals, share) for share in (0.5, 0.99))
    report.check(
        "429 p50, p99 ms", f"{p50:.0f}, {p99:.0f}", f"p99 <= {REFUSED_MS:g}", 0 < p99 <= REFUSED_MS, timed=True
    )
    p50, worst = quantile(latencies, 0.5), quantile(latencies, 1)
    value = f"{p50:.2f}, {worst:.2f}"
    report.check("accepted work p50, max s", value, f"<= {bound:.1f}", worst <= bound, timed=True)


# --- a new version ----------------------------------------------------------------------------------------------------


async def rolling(folder: Path, seed: int, sizes: Sizes) -> list[Figure]:
    """Drain and replace every API and every engine under load, one after the other."""
    codes: list[int] = []
    async with (
        open_scene("rolling restart", folder, seed, StackSettings(apis=2)) as scene,
        scene.load(iter(Cases(seed, MIXED)), sizes.concurrency),
    ):
        scene.restarts_apis = True
        for _ in range(sizes.restarts):
            for engine in scene.stack.engines:
                await asyncio.sleep(0.5)
                codes.append(await scene.stack.restart_engine(engine))
            for number in range(len(scene.stack.apis)):
                await asyncio.sleep(0.5)
                codes.append(await scene.stack.restart_api(number))
    scene.report.check(
        "processes restarted, exit codes", f"{len(codes)}, {sorted(set(codes))}", "all 0", not any(codes)
    )
    return scene.report.figures
