"""Scenarios with load and faults at the same time."""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.chaos.cases import MIXED, Cases
from tests.chaos.deaths import fatal_jobs, not_given_up
from tests.chaos.evidence import Evidence
from tests.chaos.ledger import quantile
from tests.chaos.processes import StackSettings
from tests.chaos.report import Figure
from tests.chaos.scene import Scene, open_scene
from tests.chaos.sizes import Sizes
from tests.chaos.stub import POISON
from tests.proxy import Proxy
from tests.waiting import until

REDELIVERY_S = 3.0  # beyond the lease
CONSUMING_AGAIN_S = 10.0
REFUSED_S = 1.0  # while Redis is down
LOST_S, BLACKHOLE_S = (0.1, 1.0), (0.1, 1.5)  # of a link that flaps
LONG = (80, 160)  # denoising steps, some seconds


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


async def flapping(folder: Path, seed: int, sizes: Sizes) -> list[Figure]:
    """Disturb the link of APIs and engines to Redis, some times for longer than the leases."""
    async with (
        open_scene("flapping link", folder, seed, StackSettings(through_link=True)) as scene,
        scene.load(iter(Cases(seed)), sizes.concurrency),
    ):
        flaps = Flaps(scene.stack.link, scene.rng, scene.stack.settings.lease_s)
        for number in range(sizes.flaps):
            await asyncio.sleep(scene.rng.uniform(0.2, 1.5))
            await flaps.disturb(number)
        await asyncio.sleep(2.0)
    crashes = scene.stack.crashes
    scene.report.note("disturbances", f"{sizes.flaps}, {flaps.lost} replies lost")
    scene.report.check("of these to a granted claim", flaps.lost_grants, "> 0", flaps.lost_grants > 0)
    scene.report.note("runs beyond the first", sum(claim.runs > 1 for claim in Evidence.read(folder).all_claims()))
    scene.report.check("engines that died", crashes, "0", not crashes)
    return scene.report.figures


@dataclass
class Flaps:
    """Disturbances of a link: lost replies to scripts or to granted claims, resets, and silence."""

    link: Proxy
    rng: Random
    lease_s: float
    lost: int = 0
    lost_grants: int = 0

    async def disturb(self, number: int) -> None:
        kind = number % 4
        if kind == 0:
            self.link.reset()
        elif kind == 1:
            self.link.stall()
            await asyncio.sleep(self.lease_s + 1.0 if number % 32 == 1 else self.rng.uniform(*BLACKHOLE_S))
            self.link.resume()
        else:
            self.link.loses = self._is_script if kind == 2 else self._is_grant
            await asyncio.sleep(self.rng.uniform(*LOST_S))
            self.link.loses = None

    def _is_script(self, command: bytes, reply: bytes) -> bool:
        is_script = b"EVALSHA" in command
        self.lost += is_script
        return is_script

    def _is_grant(self, command: bytes, reply: bytes) -> bool:
        is_grant = b'"attempt":' in command and reply.startswith(b"*")
        self.lost += is_grant
        self.lost_grants += is_grant
        return is_grant


async def everything(folder: Path, seed: int, sizes: Sizes) -> list[Figure]:
    """Combine kills, freezes, outages, poison jobs and disconnecting clients, with requeueing as under a supervisor."""
    settings = StackSettings(requeue_on_death=True, apis=2, lease_s=3.0)
    async with (
        open_scene("everything at once", folder, seed, settings) as scene,
        scene.load(iter(Cases(seed, {**MIXED, "disconnects": 20})), sizes.concurrency),
    ):
        outcomes, *_ = await asyncio.gather(
            fatal_jobs(scene, POISON, max(1, sizes.poison // 2)),
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
    scene.report.check_none("poison jobs not given up as such", not_given_up(outcomes))
    return scene.report.figures


async def _strike(scene: Scene, count: int) -> None:
    for number in range(count):
        await asyncio.sleep(scene.rng.uniform(0.3, 1.5))
        await (scene.faults.freeze_engine() if number % 3 == 2 else scene.faults.kill_engine())


async def _outages(scene: Scene, count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(scene.rng.uniform(2.0, 4.0))
        await scene.faults.kill_redis(scene.rng.uniform(0.1, 0.8))
