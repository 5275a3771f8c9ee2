"""Planners and renderers in engines of their own, under load."""

import asyncio
from pathlib import Path

from engine.jobs.job import Stage
from tests.chaos.cases import MIXED, Cases
from tests.chaos.evidence import Evidence
from tests.chaos.processes import StackSettings
from tests.chaos.report import Figure
from tests.chaos.scene import Scene, open_scene
from tests.chaos.sizes import Sizes

FLEET: tuple[Stage, ...] = ("plan", "plan", "render", "render", "render")
AWAY_S = 1.5  # without a stage
SCALED = 3  # engines of a stage


async def stages(folder: Path, seed: int, sizes: Sizes) -> list[Figure]:
    """Kill engines of either stage, one by one and all of a stage; scale each stage to 0 and back."""
    codes: list[int] = []
    async with (
        open_scene("stages apart", folder, seed, StackSettings(stages=FLEET, apis=2)) as scene,
        scene.load(iter(Cases(seed, MIXED)), sizes.concurrency),
    ):
        for number in range(sizes.stage_kills):
            await asyncio.sleep(scene.rng.uniform(0.3, 1.5))
            if number % 4 < 2:
                await scene.faults.kill_engine(planned=number % 2 == 0)
            else:
                await scene.faults.kill_stage(("plan", "render")[number % 2])
        for stage in ("render", "plan", "render"):
            await asyncio.sleep(1.0)
            codes += await scene.stack.scale(stage, 0)
            await asyncio.sleep(AWAY_S)
            await scene.stack.scale(stage, SCALED)
        await scene.stack.scale("all", 1)
        await asyncio.sleep(2.0)
    _judge(scene, Evidence.read(folder), codes)
    return scene.report.figures


def _judge(scene: Scene, evidence: Evidence, codes: list[int]) -> None:
    report, engines = scene.report, {claim.engine for claim in evidence.all_claims()}
    writes = [write for of_job in evidence.writes.values() for write in of_job]
    handed_over = [write.job for write in writes if write.kind == "hand_over" and write.accepted]
    report.note("engines killed", f"{len(scene.faults.killed)}, of {len(engines)} that had jobs")
    report.check("jobs handed over", len(handed_over), "> 0", bool(handed_over))
    report.check_none("jobs handed over twice", {job for job in handed_over if handed_over.count(job) > 1})
    report.check("engines drained, exit codes", f"{len(codes)}, {sorted(set(codes))}", "all 0", not any(codes))
    report.check_none("requests refused for want of an engine", [f"{s:.2f}" for s in scene.ledger.refusals[503]])
