"""Render images of random sizes on one engine, and watch its memory.

    python -m benchmarks.growth                    2,000 images; minutes
    python -m benchmarks.growth --images 300

Sizes, steps, guidance, partial images and lettering are drawn at random, and one request in fifty is cancelled. The
table has the resident memory after each tenth. Exits with 1 if the last tenth has more than `TOLERANCE` above the
third: what is kept for later (layouts, modulations, freed memory) has its size by then.
"""

import argparse
import os
import sys
from pathlib import Path
from random import Random

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.folders import cache_dir
from engine.engine import Engine
from engine.jobs.job import JobSpec
from engine.limits import EngineLimits
from engine.request import Failed, Finished, Request
from models.glm_image.model import GlmImage
from models.glm_image.random_weights import cached_random_checkpoint

IN_FLIGHT, CANCELLED_SHARE, TENTHS = 8, 0.02, 10
TOLERANCE = 0.08
SIDES = range(64, 385, 16)
WORDS = ("SALE", "OPEN", "JAZZ", "50 CENTS", "GRAND OPENING", "ZOO")


def random_spec(random: Random, number: int) -> JobSpec:
    prompt = f'a poster {number}, "{random.choice(WORDS)}" and "{random.choice(WORDS)} {random.randint(0, 999)}"'
    return JobSpec(
        prompt, random.choice(SIDES), random.choice(SIDES), seed=number, num_inference_steps=random.randint(1, 4),
        guidance_scale=random.choice((1.0, 1.5)), partial_images=random.choice((0, 0, 1, 2)),
    )  # fmt: skip


def resident_bytes() -> int:
    """Return this process's resident memory, on Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run(engine: Engine, count: int) -> list[int]:
    """Render `count` images; return the resident memory after each tenth."""
    random, begun, live, resident = Random(0), 0, set[str](), list[int]()
    while begun < count or not engine.is_idle:
        while begun < count and len(live) < IN_FLIGHT:
            engine.submit(Request(str(begun), random_spec(random, begun)))
            live.add(str(begun))
            begun += 1
            if random.random() < CANCELLED_SHARE:
                engine.cancel(cancelled := random.choice(sorted(live)))
                live.remove(cancelled)
            if begun % (count // TENTHS) == 0:
                resident.append(resident_bytes())
        for event in engine.step():
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished):
                live.discard(event.request.id)
    engine.check_integrity()
    return resident


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000, help="default: 2000")
    arguments = parser.parse_args()
    checkpoint = cached_random_checkpoint(cache_dir())
    model = GlmImage.load(str(checkpoint), torch.device("cpu"), torch.float32)
    resident = run(Engine(model, EngineLimits.choose(model)), arguments.images)
    table = Table("images", "resident MB")
    for index, size in enumerate(resident):
        table.add_row(str((index + 1) * arguments.images // TENTHS), f"{size / 1e6:.0f}")
    Console().print(table)
    growth = resident[-1] / resident[2] - 1
    print(f"grown by {100 * growth:.1f}% since the third tenth")
    return int(growth > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
