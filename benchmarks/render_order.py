"""Compare orders in which images are rendered when not all fit into a tick.

    python -m benchmarks.render_order                 simulated: 512, 1024 and 2048 pixels on one H200
    python -m benchmarks.render_order --real          on this machine: nano, 256x256 and 512x512, minutes

ours          the renderer's scheduler: an image is overtaken by shorter ones for a time
in order      the oldest images first
in turns      the images that have waited longest since their last step (processor sharing)
least first   least remaining work first, without a bound

The simulation runs the scheduler on a virtual clock. A tick costs the arithmetic floor of each image's step (1.65, 7.6
and 47 s for 50 steps with guidance) and 4 ms. Images arrive at random; `load` is the share of the time that their
work takes. Latencies are in seconds from arrival, the slowdown divides them by the time of the image alone.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.quantile import quantile
from engine.engine import Engine
from engine.jobs.job import JobSpec
from engine.limits import EngineLimits
from engine.renderer.scheduler import RenderScheduler
from engine.request import Failed, Finished, Request

SECONDS = {512: 1.65, 1024: 7.6, 2048: 47.0}  # of an image
TICK_S = 0.004
SHARES = (0.5, 0.35, 0.15)  # of the sizes
STEPS, GLYPH_TOKENS = 50, 32
BUDGET = 16384
LOADS = (0.6, 0.8, 0.95)
REAL_SIDES, REAL_SHARES, REAL_STEPS = (256, 512), (0.7, 0.3), 12
PROMPT = 'a blue poster, top headline "GLIMMER", center a large yellow star'


@dataclass(eq=False)
class SimulatedImage:
    side: int
    arrived: float
    steps_left: int = STEPS
    ended: float = 0.0
    deadline_at: float = float("inf")

    @property
    def tokens(self) -> int:
        return 2 * ((self.side // 16) ** 2 + GLYPH_TOKENS)

    @property
    def latency(self) -> float:
        return self.ended - self.arrived


class InOrder(RenderScheduler[Any]):
    def _rank(self, entry: Any, now: float) -> tuple[bool, float]:
        return True, 0.0  # entries are sorted by arrival


class InTurns(RenderScheduler[Any]):
    def __init__(self, token_budget: int):
        super().__init__(token_budget)
        self._ticks, self._last = 0, dict[Any, int]()

    def pick(self, now: float | None = None) -> list[Any]:
        picked = super().pick(now)
        self._ticks += 1
        self._last |= dict.fromkeys(picked, self._ticks)
        return picked

    def _rank(self, entry: Any, now: float) -> tuple[bool, float]:
        return True, self._last.get(entry.work, 0)


class LeastFirst(RenderScheduler[Any]):
    def _rank(self, entry: Any, now: float) -> tuple[bool, float]:
        return True, entry.remaining


ORDERS: dict[str, Callable[[int], RenderScheduler[Any]]] = {
    "ours": RenderScheduler, "in order": InOrder, "in turns": InTurns, "least first": LeastFirst,
}  # fmt: skip


@dataclass(frozen=True)
class Latencies:
    """Seconds of the images of one run, and of each alone."""

    seconds: list[float]
    alone: list[float]

    def row(self) -> list[str]:
        slowdowns = [seconds / alone for seconds, alone in zip(self.seconds, self.alone, strict=True)]
        figures = statistics.mean(self.seconds), quantile(self.seconds, 0.99), max(self.seconds)
        return [f"{figure:.1f}" for figure in (*figures, statistics.mean(slowdowns))]


def simulate(scheduler: RenderScheduler[SimulatedImage], load: float, count: int, seed: int) -> Latencies:
    """Render `count` images on a virtual clock."""
    random, now = Random(seed), 0.0
    mean = sum(share * seconds for share, seconds in zip(SHARES, SECONDS.values(), strict=True))
    coming: list[SimulatedImage] = []
    for _ in range(count):
        now += random.expovariate(load / mean)
        coming.append(SimulatedImage(random.choices([*SECONDS], SHARES)[0], now))
    images, now = coming[:], 0.0
    coming.reverse()
    while coming or len(scheduler):
        if not len(scheduler):
            now = max(now, coming[-1].arrived)
        while coming and coming[-1].arrived <= now:
            scheduler.add(coming.pop())
        picked = scheduler.pick(now)
        now += TICK_S + sum(SECONDS[image.side] / STEPS for image in picked)
        for image in picked:
            image.steps_left -= 1
            if not image.steps_left:
                image.ended = now
                scheduler.remove(image)
    return Latencies([image.latency for image in images], [SECONDS[image.side] for image in images])


def run_real(engine: Engine, specs: Sequence[JobSpec], arrivals: Sequence[float]) -> list[float]:
    """Return the seconds from arrival to end of each image, on a real engine."""
    latencies, started, submitted = [0.0] * len(specs), time.perf_counter(), 0
    while submitted < len(specs) or not engine.is_idle:
        now = time.perf_counter() - started
        while submitted < len(specs) and arrivals[submitted] <= now:
            engine.submit(Request(str(submitted), specs[submitted]))
            submitted += 1
        if engine.is_idle:
            time.sleep(0.001)
            continue
        for event in engine.step():
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished):
                index = int(event.request.id)
                latencies[index] = time.perf_counter() - started - arrivals[index]
    return latencies


def measure_real(loads: Sequence[float], count: int) -> dict[float, dict[str, Latencies]]:
    """Run every order on the same arrivals of nano images, at shares of what the engine renders when it is full."""
    import torch

    from models.glm_image.model import GlmImage
    from models.nano import CHECKPOINT

    model = GlmImage.load(str(CHECKPOINT), torch.device("cpu"), torch.float32, "all")
    random = Random(0)
    sides = random.choices(REAL_SIDES, REAL_SHARES, k=count)
    specs = [JobSpec(PROMPT, side, side, seed=i, num_inference_steps=REAL_STEPS) for i, side in enumerate(sides)]

    def engine(order: str) -> Engine:
        made = Engine(model, EngineLimits.choose(model))
        made.renderer.scheduler = ORDERS[order](made.limits.render_token_budget)
        return made

    alone = {}
    for side in REAL_SIDES:
        spec = JobSpec(PROMPT, side, side, seed=0, num_inference_steps=REAL_STEPS)
        alone[side] = min(run_real(engine("ours"), [spec], [0.0])[0] for _ in range(3))
    began = time.perf_counter()
    run_real(engine("ours"), specs[:16], [0.0] * 16)
    mean = (time.perf_counter() - began) / 16
    runs: dict[float, dict[str, Latencies]] = {}
    for load in loads:
        arrivals, now = [], 0.0
        for _ in specs:
            now += random.expovariate(load / mean)
            arrivals.append(now)
        own = [alone[side] for side in sides]
        runs[load] = {order: Latencies(run_real(engine(order), specs, arrivals), own) for order in ORDERS}
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="on this machine, with nano")
    parser.add_argument("--images", type=int, help="images of a run; default 3000 simulated, 80 real")
    parser.add_argument("--loads", type=float, nargs="+", default=LOADS, help="default: 0.6 0.8 0.95")
    arguments = parser.parse_args()
    if arguments.real:
        runs = measure_real(arguments.loads, arguments.images or 80)
    else:
        count = arguments.images or 3000
        runs = {
            load: {order: simulate(make(BUDGET), load, count, seed=0) for order, make in ORDERS.items()}
            for load in arguments.loads
        }
    table = Table("load", "order", "mean s", "p99 s", "longest s", "mean slowdown")
    for load, orders in runs.items():
        for order, latencies in orders.items():
            table.add_row(str(load), order, *latencies.row(), end_section=order == [*orders][-1])
    Console().print(table)


if __name__ == "__main__":
    main()
