"""The scenario in which Redis' master dies and a replica takes its place."""

import asyncio
import time
from pathlib import Path

from tests.chaos.cases import Cases
from tests.chaos.evidence import Evidence
from tests.chaos.processes import StackSettings
from tests.chaos.report import Figure
from tests.chaos.scenarios import CONSUMING_AGAIN_S
from tests.chaos.scene import Scene, open_scene
from tests.chaos.sizes import Sizes
from tests.failover import ClusterRedis, FailoverRedis, SentinelRedis
from tests.waiting import until

KINDS: dict[str, type[FailoverRedis]] = {"Sentinels": SentinelRedis, "cluster": ClusterRedis}
RECONFIGURED_S = 1.5  # until all Sentinels name the new master
REPLACED_S = 300.0  # Sentinels pause for 30 s when the machine was too busy for them


async def failover(folder: Path, seed: int, sizes: Sizes) -> list[Figure]:
    """Kill the master under load, behind Sentinels and in a cluster.

    It comes back when another has its place. One that comes back while another is elected takes writes that the other
    lacks: no number of replicas short of all of them covers that.
    """
    figures = []
    for name, kind in KINDS.items():
        settings = StackSettings(apis=2, redis=kind, api_options={"redis-min-replicas": 1})
        kills: list[float] = []
        async with open_scene(f"failover, {name}", folder / name, seed, settings) as scene:
            scene.forgets = True
            async with scene.load(iter(Cases(seed)), sizes.concurrency):
                for _ in range(sizes.failovers):
                    await asyncio.sleep(scene.rng.uniform(1.0, 3.0))
                    await _kill_master(scene, kills)
        evidence = Evidence.read(folder / name)
        claims = [evidence.first_claim(killed + 0.5) for killed in kills]  # those before were on their way
        waits = [claim.at - killed if claim else float("inf") for claim, killed in zip(claims, kills, strict=True)]
        worst = max(waits, default=float("inf"))
        scene.report.note("masters killed", len(kills))
        scene.report.check(
            "consuming again, max s", worst, f"<= {CONSUMING_AGAIN_S:g}", worst <= CONSUMING_AGAIN_S, timed=True
        )
        scene.report.check("engines that died", scene.stack.crashes, "0", not scene.stack.crashes)
        figures += scene.report.figures
    return figures


async def _kill_master(scene: Scene, kills: list[float]) -> None:
    servers: FailoverRedis = scene.stack.redis
    count = len(await asyncio.to_thread(servers.replicas_of_queue))
    killed = await asyncio.to_thread(servers.kill_master)
    kills.append(time.monotonic())
    await until(lambda: asyncio.to_thread(lambda: servers.master() and servers.replicas() == count - 1), REPLACED_S)
    await asyncio.sleep(RECONFIGURED_S)
    killed.start()
    await until(lambda: asyncio.to_thread(lambda: servers.replicas() == count), REPLACED_S)
