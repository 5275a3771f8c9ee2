"""`python -m tests.chaos.soak`: a long constant load, to find quantities that grow.

Every quantity is sampled. A line is fitted through the later part of the load, where everything with an expiry has
reached its level; at the end, without clients, each has to be back at its level after a short load at the beginning.
Unread results and records expire after ten minutes, so clients that disconnect, cancel or come back pause at the end.
Idempotency keys expire later, after their jobs' timeout, and are left out: every scenario checks that they expire.
"""

import argparse
import asyncio
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.console import Console

from server.processes.serving import KEEP_ALIVE_S
from tests.chaos import usage
from tests.chaos.campaign import stoppable
from tests.chaos.cases import MIXED, Cases, Kind
from tests.chaos.processes import StackSettings
from tests.chaos.redis_contents import RedisContents
from tests.chaos.report import Figure, print_table
from tests.chaos.scene import DELIVERED_S, Scene, open_scene
from tests.chaos.usage import MIB
from tests.waiting import until

KEPT_S = 620.0  # expiry of records and results, and a margin
WARM_UP_S = 60.0
FITTED_FROM = 0.4  # of the load: after this share of half an hour, what expires in ten minutes has its level
READ_AT_ONCE: Mapping[Kind, int] = {"plain": 40, "stream": 20, "edit": 5}


@dataclass(frozen=True)
class Slack:
    """How much a quantity may be above its level: a share of it, and at least `least`."""

    share: float
    least: float

    def allows(self, value: float, level: float) -> bool:
        return value <= level + max(self.share * level, self.least)


SLACK = {
    "Redis keys": Slack(0.1, 5),
    "stream entries": Slack(0, 0),
    "pending entries": Slack(0, 0),
    "consumers": Slack(0, 0),
    "blobs, bytes": Slack(0.1, 0),
    "Redis memory, MiB": Slack(0.1, 2),
    "metrics series": Slack(0.02, 20),
    "KV blocks in use": Slack(0, 0),
    "API memory, MiB": Slack(0.05, 8),
    "API file descriptors": Slack(0, 8),
    "engine memory, MiB": Slack(0.05, 8),
    "engine file descriptors": Slack(0, 8),
}
Sample = dict[str, float]


async def take_sample(scene: Scene) -> Sample:
    """Return all current quantities, summed over the processes of a kind."""
    contents, stack = await RedisContents.read(scene.stack.client), scene.stack
    async with httpx.AsyncClient(trust_env=False) as http:
        lines = (await http.get(f"{stack.urls[0]}/metrics")).text.splitlines()
    memory = await stack.client.info("memory")
    apis, engines = [api.pid for api in stack.apis], [engine.pid for engine in stack.engines]
    return {
        "Redis keys": sum(number for kind, number in contents.kinds.items() if kind != "idempotency"),
        "stream entries": contents.entries,
        "pending entries": contents.pending,
        "consumers": len(contents.consumers),
        "blobs, bytes": contents.blob_bytes,
        "Redis memory, MiB": memory["used_memory"] / MIB,
        "metrics series": sum(not line.startswith("#") for line in lines),
        "KV blocks in use": await scene.metric("glimmer_kv_blocks_used"),
        "API memory, MiB": sum(map(usage.memory, apis)) / MIB,
        "API file descriptors": sum(map(usage.descriptors, apis)),
        "engine memory, MiB": sum(map(usage.memory, engines)) / MIB,
        "engine file descriptors": sum(map(usage.descriptors, engines)),
    }


async def soak(folder: Path, seed: int, minutes: float, concurrency: int) -> list[Figure]:
    """Run the load for `minutes`; return the figures of what always has to hold and of what must not grow."""
    seconds = 60 * minutes
    mixed_s = max(0.0, seconds - KEPT_S)
    async with open_scene("soak", folder, seed, StackSettings()) as scene:
        await _work(scene, seed, READ_AT_ONCE, min(WARM_UP_S, seconds / 4), concurrency)
        baseline = await _at_rest(scene)
        samples: list[tuple[float, Sample]] = []
        sampling = asyncio.create_task(_sample_often(scene, samples, max(1.0, seconds / 300)))
        await _work(scene, seed + 1, MIXED, mixed_s, concurrency)
        await _work(scene, seed + 2, READ_AT_ONCE, seconds - mixed_s, concurrency)
        sampling.cancel()
        end = await _at_rest(scene)
    later = samples[int(FITTED_FROM * len(samples)) :]
    for name, slack in SLACK.items():
        _judge(scene, name, slack, [(at, sample[name]) for at, sample in later], baseline[name], end[name])
    return scene.report.figures


async def _work(scene: Scene, seed: int, weights: Mapping[Kind, int], seconds: float, concurrency: int) -> None:
    if seconds > 0:
        async with scene.load(iter(Cases(seed, weights)), concurrency):
            await asyncio.sleep(seconds)


async def _at_rest(scene: Scene) -> Sample:
    """Return the quantities without clients, after delivered results have expired and idle connections are closed."""
    await asyncio.sleep(DELIVERED_S + KEEP_ALIVE_S)

    async def is_idle() -> bool:
        return (await RedisContents.read(scene.stack.client)).is_idle

    with suppress(TimeoutError):  # the figures show it
        await until(is_idle, 30.0)
    await asyncio.sleep(2.0)
    return await take_sample(scene)


async def _sample_often(scene: Scene, samples: list[tuple[float, Sample]], every_s: float) -> None:
    while True:
        samples.append((time.monotonic(), await take_sample(scene)))
        await asyncio.sleep(every_s)


def _judge(
    scene: Scene, name: str, slack: Slack, series: list[tuple[float, float]], baseline: float, end: float
) -> None:
    times, values = [at for at, _ in series], [value for _, value in series]
    slope, start = statistics.linear_regression(times, values)
    first = start + slope * times[0]
    growth = (slope - 2 * _slope_error(times, values, slope, start)) * (times[-1] - times[0])  # at least
    value = f"{baseline:.4g}, {statistics.mean(values):.4g}, {end:.4g}; {3600 * slope:+.3g} an hour"
    is_level = name in FOLLOWS_LOAD or slack.allows(first + growth, first)
    scene.report.check(
        f"{name}: before, at work, after; slope",
        value,
        "back" if name in FOLLOWS_LOAD else "level" if name in NEVER_FALLS else "level, and back",
        is_level and (name in NEVER_FALLS or slack.allows(end, baseline)),
    )


def _slope_error(times: list[float], values: list[float], slope: float, start: float) -> float:
    """Return the standard error of a fitted slope."""
    residuals = [value - (start + slope * at) for at, value in zip(times, values, strict=True)]
    spread = statistics.pvariance(times) * len(times)
    return math.sqrt(sum(residual * residual for residual in residuals) / max(1, len(residuals) - 2) / spread)


FOLLOWS_LOAD = frozenset({"stream entries", "pending entries", "KV blocks in use"})
"""Quantities that follow the load from moment to moment, for which a fitted line means nothing."""
NEVER_FALLS = frozenset({"metrics series"})
"""Series are added for each new route, status and outcome."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="duration of the load")
    parser.add_argument("--concurrency", type=int, default=12, help="clients at once")
    parser.add_argument("--seed", type=int, default=1, help="seed of the requests")
    parser.add_argument("--folder", type=Path, help="empty folder in which to keep logs and journals")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="glimmer-soak-") as temporary:
        folder = arguments.folder or Path(temporary)
        figures = asyncio.run(stoppable(soak(folder, arguments.seed, arguments.minutes, arguments.concurrency)))
    print_table(figures, Console())
    return int(any(figure.held is False for figure in figures))


if __name__ == "__main__":
    sys.exit(main())
