"""`python -m tests.chaos.soak`: the same load for a long time, and whether anything grows.

Every quantity is looked at all the while. A line is fitted through the later part of the load, where everything that is
kept for a while has reached its level, and at the end, with no clients left, each has to be back where it was after a
short load at the beginning. Results and records are kept for ten minutes after an end that nobody has read, so those
who leave, cancel or come back stay away for the last of it. Idempotency keys are kept for longer, by as much as their
jobs might have taken, and are left out: that each of them has an end is looked at for all keys.
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
from tests.chaos.campaign import stoppable
from tests.chaos.cases import MIXED, Cases, Kind
from tests.chaos.processes import StackSettings
from tests.chaos.redis_contents import RedisContents
from tests.chaos.report import Figure, print_table
from tests.chaos.scene import DELIVERED_S, Scene, scene
from tests.waiting import until

KEPT_S = 620.0  # as long as records and results are kept, and a bit
WARM_UP_S = 60.0
FITTED_FROM = 0.4  # of the load: what is kept for ten minutes has its level by then, in half an hour
READ_AT_ONCE: Mapping[Kind, int] = {"plain": 40, "stream": 20, "edit": 5}
MIB = 2**20


@dataclass(frozen=True)
class Slack:
    """How much a quantity may be above another and still be the same: a share, and so much in any case."""

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


async def look(here: Scene) -> Sample:
    """All quantities now; of several processes of a kind the sum."""
    contents, stack = await RedisContents.read(here.stack.client), here.stack
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
        "KV blocks in use": await here.metric("glimmer_kv_blocks_used"),
        "API memory, MiB": sum(map(_memory, apis)) / MIB,
        "API file descriptors": sum(map(_descriptors, apis)),
        "engine memory, MiB": sum(map(_memory, engines)) / MIB,
        "engine file descriptors": sum(map(_descriptors, engines)),
    }


def _memory(pid: int) -> int:
    """Resident bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return 1024 * int(line.split()[1])
    return 0


def _descriptors(pid: int) -> int:
    """Files and sockets, but not those to Redis, which is on a Unix socket: a pool of connections stays as large as it
    has ever been needed, up to a limit of its own."""
    unix = {f"socket:[{line.split()[6]}]" for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]}
    count = 0
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            count += str(descriptor.readlink()) not in unix
    return count


async def soak(folder: Path, seed: int, minutes: float, concurrency: int) -> list[Figure]:
    """Load for so many minutes; the figures of what always has to hold, and of what must not grow."""
    seconds = 60 * minutes
    mixed_s = max(0.0, seconds - KEPT_S)
    async with scene("soak", folder, seed, StackSettings()) as here:
        await _work(here, seed, READ_AT_ONCE, min(WARM_UP_S, seconds / 4), concurrency)
        baseline = await _at_rest(here)
        samples: list[tuple[float, Sample]] = []
        watching = asyncio.create_task(_watch(here, samples, max(1.0, seconds / 300)))
        await _work(here, seed + 1, MIXED, mixed_s, concurrency)
        await _work(here, seed + 2, READ_AT_ONCE, seconds - mixed_s, concurrency)
        watching.cancel()
        end = await _at_rest(here)
    later = samples[int(FITTED_FROM * len(samples)) :]
    for name, slack in SLACK.items():
        _judge(here, name, slack, [(at, sample[name]) for at, sample in later], baseline[name], end[name])
    return here.report.figures


async def _work(here: Scene, seed: int, weights: Mapping[Kind, int], seconds: float, concurrency: int) -> None:
    if seconds > 0:
        async with here.load(iter(Cases(seed, weights)), concurrency):
            await asyncio.sleep(seconds)


async def _at_rest(here: Scene) -> Sample:
    """The quantities without clients, once what was delivered is gone and unused connections are closed."""
    await asyncio.sleep(DELIVERED_S + KEEP_ALIVE_S)

    async def is_idle() -> bool:
        return (await RedisContents.read(here.stack.client)).is_idle

    with suppress(TimeoutError):  # then it shows
        await until(is_idle, 30.0)
    await asyncio.sleep(2.0)
    return await look(here)


async def _watch(here: Scene, samples: list[tuple[float, Sample]], every_s: float) -> None:
    while True:
        samples.append((time.monotonic(), await look(here)))
        await asyncio.sleep(every_s)


def _judge(
    here: Scene, name: str, slack: Slack, series: list[tuple[float, float]], baseline: float, end: float
) -> None:
    times, values = [at for at, _ in series], [value for _, value in series]
    slope, start = statistics.linear_regression(times, values)
    first = start + slope * times[0]
    growth = (slope - 2 * _slope_error(times, values, slope, start)) * (times[-1] - times[0])  # no less than this
    told = f"{baseline:.4g}, {statistics.mean(values):.4g}, {end:.4g}; {3600 * slope:+.3g} an hour"
    is_level = name in ROSE_AND_FELL or slack.allows(first + growth, first)
    here.report.hold(
        f"{name}: before, at work, after; slope",
        told,
        "back" if name in ROSE_AND_FELL else "level" if name in NEVER_FALLS else "level, and back",
        is_level and (name in NEVER_FALLS or slack.allows(end, baseline)),
    )


def _slope_error(times: list[float], values: list[float], slope: float, start: float) -> float:
    """The standard error of a fitted slope."""
    left = [value - (start + slope * at) for at, value in zip(times, values, strict=True)]
    spread = statistics.pvariance(times) * len(times)
    return math.sqrt(sum(rest * rest for rest in left) / max(1, len(left) - 2) / spread)


ROSE_AND_FELL = frozenset({"stream entries", "pending entries", "KV blocks in use"})
"""What follows the load from one moment to the next, so that a line through it says nothing."""
NEVER_FALLS = frozenset({"metrics series"})
"""There is one more for each route, status and end that comes up for the first time."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--concurrency", type=int, default=12, help="clients at once")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keeps logs and journals there; it should be empty")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="glimmer-soak-") as temporary:
        folder = arguments.folder or Path(temporary)
        figures = asyncio.run(stoppable(soak(folder, arguments.seed, arguments.minutes, arguments.concurrency)))
    print_table(figures, Console())
    return int(any(figure.held is False for figure in figures))


if __name__ == "__main__":
    sys.exit(main())
