"""Load and faults together: a scenario for each row of the goals."""

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.cases import MIXED, Case, Cases
from tests.chaos.clients import PATIENCE_S
from tests.chaos.evidence import Evidence
from tests.chaos.faults import LAST_RUN
from tests.chaos.ledger import quantile
from tests.chaos.processes import StackSettings
from tests.chaos.report import Figure
from tests.chaos.scene import Scene, scene
from tests.chaos.stub import HANG, POISON
from tests.waiting import until

REDELIVERY_S = 2.0  # beyond the lease
CONSUMING_AGAIN_S = 10.0
REFUSED_S = 1.0  # while Redis is away
LIVENESS_S = 15.0
LONG = (80, 160)  # steps that take some seconds


@dataclass(frozen=True)
class Sizes:
    """How much of everything; the defaults are a full campaign.

    Args:
        jobs, kills: of the scenario of engines that are killed; the kills are spread over the jobs.
        redis_kills, freezes, leavers, poison: of theirs.
        faults: engine kills and freezes of the scenario with everything at once.
        restarts: of every API and engine, one after the other.
        overload_s: seconds of ten times the load that can be served.
        concurrency: clients at once, where a scenario does not need more.
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
    """Engines are killed at work, evenly over all jobs; nobody tells the others, so the leases have to run out."""
    async with (
        scene("engine kill -9", folder, seed, StackSettings()) as here,
        here.load(iter(Cases(seed)), sizes.concurrency, sizes.jobs),
    ):
        for number in range(1, sizes.kills + 1):
            await until(lambda n=number: here.ledger.ended >= n * sizes.jobs // (sizes.kills + 1), None)
            await here.faults.kill_engine(planned=number % 2 == 0)
        in_metrics = await here.metric("glimmer_plans_resumed_total")
    evidence = Evidence.read(folder)
    here.report.tell("engines killed", len(here.faults.killed))
    _redelivery(here, evidence)
    here.report.hold("images resumed with a kept plan", evidence.resumed(), "> 0", evidence.resumed() > 0)
    here.report.tell("of these in the metrics of engines alive", round(in_metrics))
    return here.report.figures


def _redelivery(here: Scene, evidence: Evidence) -> None:
    """From the kill to the next claim, of jobs that had one."""
    waits = []
    for struck in here.faults.killed:
        again = [evidence.next_claim(job, struck.at) for job in struck.jobs]
        waits += [claim.at - struck.at for claim in again if claim is not None]
    waits.sort()
    limit = here.stack.settings.lease_s + REDELIVERY_S
    told = f"{quantile(waits, 0.5):.2f}, {quantile(waits, 1):.2f} ({len(waits)} jobs)"
    here.report.hold("redelivery p50, max s", told, f"<= {limit:g}", bool(waits) and waits[-1] <= limit, timed=True)


async def freezes(folder: Path, seed: int, sizes: Sizes) -> list[Figure]:
    """Engines stop for longer than their leases and go on as if nothing had been, while others are at their jobs."""
    async with (
        scene("frozen engine", folder, seed, StackSettings()) as here,
        here.load(iter(Cases(seed, steps=LONG)), sizes.concurrency),
    ):
        for _ in range(sizes.freezes):
            await here.faults.freeze_engine()
    evidence = Evidence.read(folder)
    refused = evidence.stale(accepted=False)
    noticed = sum(any(w.engine == f.engine and w.began > f.at for w in refused) for f in here.faults.frozen)
    kinds = ", ".join(sorted({write.kind for write in refused}))
    here.report.tell("engines frozen", len(here.faults.frozen))
    here.report.hold("stale writes refused", f"{len(refused)} ({kinds})", "> 0", bool(refused))
    here.report.tell("freezes after which there was one", noticed)
    here.report.hold("engines that died of it", here.stack.crashes, "0", not here.stack.crashes)
    return here.report.figures


async def redis_kills(folder: Path, seed: int, sizes: Sizes) -> list[Figure]:
    """Redis is killed under load, every fifth time for longer than the leases."""
    async with (
        scene("Redis kill -9", folder, seed, StackSettings()) as here,
        here.load(iter(Cases(seed)), sizes.concurrency),
    ):
        for number in range(sizes.redis_kills):
            await asyncio.sleep(here.rng.uniform(1.0, 3.0))
            long = number % 5 == 4
            await here.faults.kill_redis(here.stack.settings.lease_s + 2.0 if long else here.rng.uniform(0.1, 1.0))
        await asyncio.sleep(2.0)
    evidence = Evidence.read(folder)
    _consuming_again(here, evidence)
    refusals = sorted(here.ledger.refusals[503])
    told = f"{quantile(refusals, 0.5):.2f}, {quantile(refusals, 1):.2f} ({len(refusals)})"
    here.report.hold("503 p50, max s", told, f"<= {REFUSED_S:g}", quantile(refusals, 1) <= REFUSED_S, timed=True)
    here.report.tell("runs beyond the first that they cost", sum(claim.runs > 1 for claim in evidence.all_claims()))
    here.report.hold("engines that died of it", here.stack.crashes, "0", not here.stack.crashes)
    return here.report.figures


def _consuming_again(here: Scene, evidence: Evidence) -> None:
    """From the moment Redis answers to the next claim."""
    outages, waits = here.faults.outages, list[float]()
    for outage in outages:
        claim = evidence.first_claim(outage.over)
        waits.append(claim.at - outage.over if claim else float("inf"))
    here.report.tell("Redis killed", f"{len(outages)} (away for {sum(o.over - o.began for o in outages):.0f} s in all)")
    worst = max(waits, default=float("inf"))
    here.report.hold(
        "consuming again, max s", worst, f"<= {CONSUMING_AGAIN_S:g}", worst <= CONSUMING_AGAIN_S, timed=True
    )


async def poison(folder: Path, seed: int, sizes: Sizes) -> list[Figure]:
    """Jobs that take their engine with them, among jobs that do not."""
    async with (
        scene("poison job", folder, seed, StackSettings()) as here,
        here.load(iter(Cases(seed)), sizes.concurrency),
    ):
        entries = await poisoned(here, sizes.poison)
    evidence = Evidence.read(folder)
    _judge_poison(here, evidence, entries)
    deaths = here.stack.crashes
    here.report.hold("engines brought down", deaths, f"{LAST_RUN} for each", deaths == LAST_RUN * sizes.poison)
    return here.report.figures


async def poisoned(here: Scene, count: int) -> dict[str, str]:
    """Posts fatal jobs one after the other. Returns what became of them, by prompt."""
    outcomes: dict[str, str] = {}
    for number in range(count):
        case = Case(-number, "job", f"{POISON} {number}", seed=number)
        entry = await here.clients.serve(case)
        here.ledger.entries.remove(entry)  # it fails, as it must
        outcomes[case.prompt] = entry.outcome
        await asyncio.sleep(here.rng.uniform(0.0, 0.5))
    return outcomes


def _judge_poison(here: Scene, evidence: Evidence, outcomes: dict[str, str]) -> None:
    told = [outcome for outcome in outcomes.values() if "brought its engine down" not in outcome]
    here.report.tell("poison jobs", len(outcomes))
    here.report.none("not given up as such", told)
    runs = {prompt: [claim.quarantined for claim in evidence.runs_of(prompt)] for prompt in outcomes}
    wrong = [f"{prompt}: {seen}" for prompt, seen in runs.items() if seen != [False] * (LAST_RUN - 1) + [True]]
    here.report.none(f"not run {LAST_RUN} times, the last time alone", wrong)


async def hang(folder: Path, seed: int, sizes: Sizes) -> list[Figure]:
    """A device step that never ends: its engine has to end instead."""
    ended: list[float] = []
    async with (
        scene("hung step", folder, seed, StackSettings()) as here,
        here.load(iter(Cases(seed)), sizes.concurrency),
    ):
        asking = asyncio.create_task(here.clients.serve(Case(0, "job", f"{HANG} 0", seed=0)))
        for number in range(LAST_RUN):
            await until(lambda n=number: here.stack.crashes > n, PATIENCE_S)
            ended.append(time.monotonic())
        entry = await asking
        here.ledger.entries.remove(entry)  # it fails, as it must
    began = sorted(Evidence.read(folder).hangs.values())
    slowest = max(end - begin for begin, end in zip(began, ended, strict=True))
    here.report.hold("until its engine ends, max s", slowest, f"<= {LIVENESS_S:g}", slowest <= LIVENESS_S, timed=True)
    given_up = "brought its engine down" in entry.outcome
    here.report.hold(f"after {LAST_RUN} runs, the job has", entry.outcome, "given up", given_up)
    return here.report.figures


async def everything(folder: Path, seed: int, sizes: Sizes) -> list[Figure]:
    """Kills, freezes, outages, poison and clients that leave, all at once, with a supervisor of engines."""
    settings = StackSettings(surrendered=True, apis=2, lease_s=3.0)
    async with (
        scene("everything at once", folder, seed, settings) as here,
        here.load(iter(Cases(seed, {**MIXED, "leaves": 20})), sizes.concurrency),
    ):
        outcomes, *_ = await asyncio.gather(
            poisoned(here, max(1, sizes.poison // 2)),
            _strike(here, sizes.faults),
            _outages(here, sizes.faults // 3),
        )
        await asyncio.sleep(1.0)
    evidence = Evidence.read(folder)
    faults = here.faults
    here.report.tell("engines killed, frozen", f"{len(faults.killed)}, {len(faults.frozen)}")
    here.report.tell("stale writes refused", len(evidence.stale(accepted=False)))
    here.report.tell("images resumed with a kept plan", evidence.resumed())
    _consuming_again(here, evidence)
    told = [outcome for outcome in outcomes.values() if "brought its engine down" not in outcome]
    here.report.none("poison jobs not given up as such", told)
    return here.report.figures


async def _strike(here: Scene, count: int) -> None:
    for number in range(count):
        await asyncio.sleep(here.rng.uniform(0.3, 1.5))
        await (here.faults.freeze_engine() if number % 3 == 2 else here.faults.kill_engine())


async def _outages(here: Scene, count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(here.rng.uniform(2.0, 4.0))
        await here.faults.kill_redis(here.rng.uniform(0.1, 0.8))
