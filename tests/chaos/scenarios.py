"""Scenarios with load and faults at the same time."""

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.cases import MIXED, Case, Cases
from tests.chaos.clients import CASE_TIMEOUT_S
from tests.chaos.evidence import Evidence
from tests.chaos.faults import LAST_RUN
from tests.chaos.ledger import quantile
from tests.chaos.processes import StackSettings
from tests.chaos.report import Figure
from tests.chaos.scene import Scene, open_scene
from tests.chaos.stub import HANG, POISON
from tests.waiting import until

REDELIVERY_S = 2.0  # beyond the lease
CONSUMING_AGAIN_S = 10.0
REFUSED_S = 1.0  # while Redis is down
LIVENESS_S = 15.0
LONG = (80, 160)  # denoising steps, some seconds


@dataclass(frozen=True)
class Sizes:
    """Sizes of the scenarios; the defaults are a full campaign.

    Args:
        jobs, kills: of `kills`; the kills are spread over the jobs.
        redis_kills, freezes, leavers, poison: of the scenario of that name.
        faults: engine kills and freezes of `everything`.
        restarts: of every API and engine, in `rolling`.
        overload_s: seconds of ten times the load that can be served.
        concurrency: clients at once, unless a scenario needs more.
    """

    jobs: int = 5000
    kills: int = 100
    redis_kills: int = 20
    freezes: int = 50
    leavers: int = 1000
    poison: int = 10
    faults: int = 40
    restarts: int = 4
    overload_s: float = 600.0
    concurrency: int = 18


SHORT = Sizes(
    jobs=100,
    kills=4,
    redis_kills=2,
    freezes=2,
    leavers=30,
    poison=1,
    faults=6,
    restarts=1,
    overload_s=5.0,
    concurrency=12,
)


async def kills(folder: Path, seed: int, sizes: Sizes) -> list[Figure]:
    """Kill engines while they work, evenly over all jobs; the jobs wait for the end of their leases."""
    async with (
        open_scene("engine kill -9", folder, seed, StackSettings()) as scene,
        scene.load(iter(Cases(seed)), sizes.concurrency, sizes.jobs),
    ):
        for number in range(1, sizes.kills + 1):
            await until(lambda n=number: scene.ledger.ended >= n * sizes.jobs // (sizes.kills + 1), None)
            await scene.faults.kill_engine(planned=number % 2 == 0)
        in_metrics = await scene.metric("glimmer_plans_resumed_total")
    evidence = Evidence.read(folder)
    scene.report.note("engines killed", len(scene.faults.killed))
    _redelivery(scene, evidence)
    scene.report.check("images resumed with a kept plan", evidence.resumed(), "> 0", evidence.resumed() > 0)
    scene.report.note("of these in the metrics of living engines", round(in_metrics))
    return scene.report.figures


def _redelivery(scene: Scene, evidence: Evidence) -> None:
    """Judge the time from a kill to the next claim of each job."""
    waits = []
    for struck in scene.faults.killed:
        claims = [evidence.next_claim(job, struck.at) for job in struck.jobs]
        waits += [claim.at - struck.at for claim in claims if claim is not None]
    waits.sort()
    limit = scene.stack.settings.lease_s + REDELIVERY_S
    value = f"{quantile(waits, 0.5):.2f}, {quantile(waits, 1):.2f} ({len(waits)} jobs)"
    scene.report.check("redelivery p50, max s", value, f"<= {limit:g}", bool(waits) and waits[-1] <= limit, timed=True)


async def freezes(folder: Path, seed: int, sizes: Sizes) -> list[Figure]:
    """Freeze engines for longer than their leases; they continue while others run their jobs."""
    async with (
        open_scene("frozen engine", folder, seed, StackSettings()) as scene,
        scene.load(iter(Cases(seed, steps=LONG)), sizes.concurrency),
    ):
        for _ in range(sizes.freezes):
            await scene.faults.freeze_engine()
    evidence = Evidence.read(folder)
    refused = evidence.stale(accepted=False)
    followed = sum(any(w.engine == f.engine and w.began > f.at for w in refused) for f in scene.faults.frozen)
    kinds = ", ".join(sorted({write.kind for write in refused}))
    scene.report.note("engines frozen", len(scene.faults.frozen))
    scene.report.check("stale writes refused", f"{len(refused)} ({kinds})", "> 0", bool(refused))
    scene.report.note("freezes after which there was one", followed)
    scene.report.check("engines that died", scene.stack.crashes, "0", not scene.stack.crashes)
    return scene.report.figures


async def redis_kills(folder: Path, seed: int, sizes: Sizes) -> list[Figure]:
    """Kill Redis under load, every fifth time for longer than the leases."""
    async with (
        open_scene("Redis kill -9", folder, seed, StackSettings()) as scene,
        scene.load(iter(Cases(seed)), sizes.concurrency),
    ):
        for number in range(sizes.redis_kills):
            await asyncio.sleep(scene.rng.uniform(1.0, 3.0))
            long = number % 5 == 4
            await scene.faults.kill_redis(scene.stack.settings.lease_s + 2.0 if long else scene.rng.uniform(0.1, 1.0))
        await asyncio.sleep(2.0)
    evidence = Evidence.read(folder)
    _consuming_again(scene, evidence)
    refusals = sorted(scene.ledger.refusals[503])
    value = f"{quantile(refusals, 0.5):.2f}, {quantile(refusals, 1):.2f} ({len(refusals)})"
    scene.report.check("503 p50, max s", value, f"<= {REFUSED_S:g}", quantile(refusals, 1) <= REFUSED_S, timed=True)
    scene.report.note("runs beyond the first", sum(claim.runs > 1 for claim in evidence.all_claims()))
    scene.report.check("engines that died", scene.stack.crashes, "0", not scene.stack.crashes)
    return scene.report.figures


def _consuming_again(scene: Scene, evidence: Evidence) -> None:
    """Judge the time from the first response of Redis to the next claim."""
    outages, waits = scene.faults.outages, list[float]()
    for outage in outages:
        claim = evidence.first_claim(outage.over)
        waits.append(claim.at - outage.over if claim else float("inf"))
    scene.report.note(
        "Redis killed", f"{len(outages)} (down for {sum(o.over - o.began for o in outages):.0f} s in all)"
    )
    worst = max(waits, default=float("inf"))
    scene.report.check(
        "consuming again, max s", worst, f"<= {CONSUMING_AGAIN_S:g}", worst <= CONSUMING_AGAIN_S, timed=True
    )


async def poison(folder: Path, seed: int, sizes: Sizes) -> list[Figure]:
    """Mix jobs that kill their engine with ordinary ones."""
    async with (
        open_scene("poison job", folder, seed, StackSettings()) as scene,
        scene.load(iter(Cases(seed)), sizes.concurrency),
    ):
        entries = await poisoned(scene, sizes.poison)
    evidence = Evidence.read(folder)
    _judge_poison(scene, evidence, entries)
    deaths = scene.stack.crashes
    runs = sum(len(evidence.runs_of(prompt)) for prompt in entries)
    scene.report.check("engines killed by them", deaths, "one by each run", deaths == runs)
    return scene.report.figures


async def poisoned(scene: Scene, count: int) -> dict[str, str]:
    """Submit fatal jobs one after the other. Returns their outcomes by prompt."""
    outcomes: dict[str, str] = {}
    for number in range(count):
        case = Case(-number, "job", f"{POISON} {number}", seed=number)
        entry = await scene.clients.serve(case)
        scene.ledger.entries.remove(entry)  # it has to fail
        outcomes[case.prompt] = entry.outcome
        await asyncio.sleep(scene.rng.uniform(0.0, 0.5))
    return outcomes


def _judge_poison(scene: Scene, evidence: Evidence, outcomes: dict[str, str]) -> None:
    others = [outcome for outcome in outcomes.values() if "brought its engine down" not in outcome]
    scene.report.note("poison jobs", len(outcomes))
    scene.report.check_none("not given up as such", others)
    runs = {prompt: [claim.quarantined for claim in evidence.runs_of(prompt)] for prompt in outcomes}
    wrong = [
        f"{prompt}: {alone}" for prompt, alone in runs.items() if alone[:3] != [False, True, True] or len(alone) > 4
    ]
    scene.report.check_none("not run 3 or 4 times, alone after the first", wrong)


async def hang(folder: Path, seed: int, sizes: Sizes) -> list[Figure]:
    """Run a step that never ends; its engine has to end."""
    ended: list[float] = []
    async with (
        open_scene("hung step", folder, seed, StackSettings()) as scene,
        scene.load(iter(Cases(seed)), sizes.concurrency),
    ):
        request = asyncio.create_task(scene.clients.serve(Case(0, "job", f"{HANG} 0", seed=0)))
        for number in range(LAST_RUN):
            await until(lambda n=number: scene.stack.crashes > n, CASE_TIMEOUT_S)
            ended.append(time.monotonic())
        entry = await request
        scene.ledger.entries.remove(entry)  # it has to fail
    began = sorted(Evidence.read(folder).hangs.values())
    slowest = max(end - begin for begin, end in zip(began, ended, strict=True))
    scene.report.check("until its engine ends, max s", slowest, f"<= {LIVENESS_S:g}", slowest <= LIVENESS_S, timed=True)
    given_up = "brought its engine down" in entry.outcome
    scene.report.check(f"after {LAST_RUN} runs, the job has", entry.outcome, "given up", given_up)
    return scene.report.figures


async def everything(folder: Path, seed: int, sizes: Sizes) -> list[Figure]:
    """Combine kills, freezes, outages, poison jobs and disconnecting clients, with requeueing as under a supervisor."""
    settings = StackSettings(requeue_on_death=True, apis=2, lease_s=3.0)
    async with (
        open_scene("everything at once", folder, seed, settings) as scene,
        scene.load(iter(Cases(seed, {**MIXED, "disconnects": 20})), sizes.concurrency),
    ):
        outcomes, *_ = await asyncio.gather(
            poisoned(scene, max(1, sizes.poison // 2)),
            _strike(scene, sizes.faults),
            _outages(scene, sizes.faults // 3),
        )
        await asyncio.sleep(1.0)
    evidence = Evidence.read(folder)
    faults = scene.faults
    scene.report.note("engines killed, frozen", f"{len(faults.killed)}, {len(faults.frozen)}")
    scene.report.note("stale writes refused", len(evidence.stale(accepted=False)))
    scene.report.note("images resumed with a kept plan", evidence.resumed())
    _consuming_again(scene, evidence)
    others = [outcome for outcome in outcomes.values() if "brought its engine down" not in outcome]
    scene.report.check_none("poison jobs not given up as such", others)
    return scene.report.figures


async def _strike(scene: Scene, count: int) -> None:
    for number in range(count):
        await asyncio.sleep(scene.rng.uniform(0.3, 1.5))
        await (scene.faults.freeze_engine() if number % 3 == 2 else scene.faults.kill_engine())


async def _outages(scene: Scene, count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(scene.rng.uniform(2.0, 4.0))
        await scene.faults.kill_redis(scene.rng.uniform(0.1, 0.8))
