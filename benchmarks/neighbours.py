"""Measure what engines of one machine, or an engine and another busy process, leave of each other's speed.

    python -m benchmarks.neighbours                 nano, 12 s each; two to three minutes
    python -m benchmarks.neighbours --wait system   OpenMP's threads spin while they wait, as without our default

Every engine is a process of its own that renders 256x256 images, two in flight. `images/s` is the sum of a row's
engines, `of one` that sum divided by the first row's: sharing costs nothing where it is 1. `CPU s` is the processor
time of an image, which depends less on what else the machine does.
"""

import argparse
import multiprocessing
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from typing import Any
from unittest.mock import patch

from rich.console import Console
from rich.table import Table

from engine.cores import WAIT_VARIABLE, usable_cores
from server.processes.supervisor import engine_environments

SIDE, IN_FLIGHT, WARM_UP_IMAGES = 256, 2, 3
_SPAWN = multiprocessing.get_context("spawn")  # OpenMP reads the environment when a process loads it


@dataclass(frozen=True)
class Layout:
    """Engines that run at once, each with its own environment."""

    label: str
    environments: list[dict[str, str]]
    busy: int = 0  # other processes that compute all the time


def layouts() -> list[Layout]:
    """Return what is compared; the first is the measure of the others."""
    return [
        Layout("1", [{}]),
        Layout("2 with all cores each", [{}, {}]),
        Layout("2 that share the cores", engine_environments({}, 2, "cpu")),
        Layout("1 beside a busy process", [{}], busy=1),
    ]


@dataclass(frozen=True)
class Rate:
    """What one engine did."""

    images_per_second: float
    cpu_s: float  # of an image


def measure(layout: Layout, seconds: float, shared: Mapping[str, str]) -> list[Rate]:
    """Return what each engine did."""
    start, results = _SPAWN.Barrier(len(layout.environments) + layout.busy), _SPAWN.SimpleQueue()
    processes: list[Any] = [_SPAWN.Process(target=_spin, args=(start, seconds)) for _ in range(layout.busy)]
    for process in processes:
        process.start()
    for environment in layout.environments:
        with patch.dict(os.environ, {**shared, **environment}):
            processes.append(_SPAWN.Process(target=_render, args=(start, results, seconds)))
            processes[-1].start()
    rates = [results.get() for _ in layout.environments]
    for process in processes:
        process.join()
    return rates


def _render(start: Barrier, results: Any, seconds: float) -> None:
    import torch

    from engine.engine import Engine
    from engine.jobs.job import JobSpec
    from engine.request import Failed, Rendered, Request
    from models.glm_image.model import GlmImage
    from models.nano import CHECKPOINT

    engine = Engine(GlmImage.load(str(CHECKPOINT), torch.device("cpu"), torch.float32))
    submitted = done = 0

    def run(is_over: Any) -> None:
        nonlocal submitted, done
        while not is_over():
            while submitted < done + IN_FLIGHT:
                steps = engine.model.defaults.num_inference_steps
                spec = JobSpec(f"image {submitted}", SIDE, SIDE, seed=submitted, num_inference_steps=steps)
                engine.submit(Request(str(submitted), spec))
                submitted += 1
            for event in engine.step():
                if isinstance(event, Failed):
                    raise event.error
                done += isinstance(event, Rendered)

    run(lambda: done >= WARM_UP_IMAGES)
    start.wait()
    before, began, cpu = done, time.monotonic(), time.process_time()
    run(lambda: time.monotonic() > began + seconds and done > before)
    images = done - before
    results.put(Rate(images / (time.monotonic() - began), (time.process_time() - cpu) / images))


def _spin(start: Barrier, seconds: float) -> None:
    start.wait()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=12.0, help="of each measurement; default: 12")
    parser.add_argument("--wait", choices=("passive", "system"), default="passive", help="default: passive")
    arguments = parser.parse_args()
    shared = {WAIT_VARIABLE: "passive"} if arguments.wait == "passive" else {}
    table = Table("engines", "images/s", "of one", "CPU s", title=f"{usable_cores()} cores, wait: {arguments.wait}")
    first = 0.0
    for layout in layouts():
        rates = measure(layout, arguments.seconds, shared)
        total = sum(rate.images_per_second for rate in rates)
        first = first or total
        cpu_s = sum(rate.cpu_s for rate in rates) / len(rates)
        table.add_row(layout.label, f"{total:.2f}", f"{total / first:.2f}", f"{cpu_s:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
