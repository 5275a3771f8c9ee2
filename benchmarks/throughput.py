"""Throughput and latency of the engine against the reference pipeline, in one run on one machine.

    python -m benchmarks.throughput                 the small checkpoint, on this machine's CPU or GPU
    python -m benchmarks.throughput --size full     the published size with random weights, on a CUDA GPU

The small run sends the same requests, in the same order, to diffusers' `GlmImagePipeline` one by one, to the same
pipeline in batches of equal size and steps (it can batch no others), and to the engine with 1, 4 and 16 in flight. All
run in float32 with the same number of threads. Control tokens, which make the reference fail, are suppressed. The five
take turns in every round, so that a drift in the machine's speed affects all; ratios are those of the rounds' sums.
"""

import argparse
import itertools
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers
from diffusers import GlmImagePipeline
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.folders import cache_dir
from benchmarks.full_size import PARTS, RESULTS, run_full_size
from benchmarks.measure import Measurement, drive, merge
from engine.engine import Engine
from engine.jobs.job import JobSpec
from models.glm_image.model import GlmImage
from models.glm_image.random_weights import cached_random_checkpoint

SIZES = ((256, 256), (384, 256), (512, 512))
STEPS = (8, 12, 20)
PROMPTS = ('a poster with top headline "SUMMER SALE" and a red circle', "a plain poster", 'bottom footer "OPEN 9 TO 5"')
CONCURRENCY = (1, 4, 16)


def requests(count: int) -> list[JobSpec]:
    """Return requests of all combinations of sizes and steps, mixed."""
    mixed = list(itertools.product(SIZES, STEPS))
    return [
        JobSpec(
            PROMPTS[i % len(PROMPTS)],
            *mixed[i * 4 % len(mixed)][0],
            seed=i,
            num_inference_steps=mixed[i * 4 % len(mixed)][1],
        )
        for i in range(count)
    ]


def load_reference(folder: Path, device: torch.device) -> GlmImagePipeline:
    transformers.logging.set_verbosity_error()
    pipeline = GlmImagePipeline.from_pretrained(folder, dtype=torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)
    planner = pipeline.vision_language_encoder
    codes, outputs = planner.config.vq_config.num_embeddings, planner.config.text_config.vision_vocab_size
    planner.generation_config.suppress_tokens = list(range(codes, outputs))
    return pipeline


def run_reference(pipeline: GlmImagePipeline, specs: list[JobSpec], batched: bool) -> Measurement:
    groups: dict[tuple[int, int, int, int], list[JobSpec]] = defaultdict(list)
    for index, spec in enumerate(specs):
        group_index = -1 if batched else index
        groups[spec.width, spec.height, spec.num_inference_steps, group_index].append(spec)
    latencies: list[float] = []
    started = time.perf_counter()
    for (width, height, steps, _), group in groups.items():
        began = started if batched else time.perf_counter()
        pipeline(
            prompt=[spec.prompt for spec in group],
            width=width,
            height=height,
            num_inference_steps=steps,
            guidance_scale=group[0].guidance_scale,
        )
        latencies += [time.perf_counter() - began] * len(group)
    label = "diffusers, equal requests batched" if batched else "diffusers, one by one"
    return Measurement(label, time.perf_counter() - started, latencies)


def print_table(rows: list[Measurement]) -> None:
    base = rows[0]
    table = Table(title=f"{len(base.latencies)} requests, {torch.get_num_threads()} threads")
    for heading in ("", "images/s", "ratio", "p50 s", "p95 s", "planner ms/token", "renderer µs/token"):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in rows:
        table.add_row(
            row.label,
            f"{row.images_per_second:.3f}",
            f"{row.images_per_second / base.images_per_second:.2f}",
            f"{row.p50:.2f}",
            f"{row.p95:.2f}",
            f"{row.planner_ms_per_token:.3f}" if row.planner_ms_per_token else "",
            f"{row.renderer_us_per_token:.1f}" if row.renderer_us_per_token else "",
        )
    Console(width=120).print(table)


def run_small(model: str | None, count: int, rounds: int, device: torch.device) -> None:
    folder = Path(model) if model else cached_random_checkpoint(cache_dir())
    specs = requests(count)
    engine = Engine(GlmImage.load(str(folder), device, torch.float32))
    reference = load_reference(folder, device)
    for warm_up in (specs[:1], specs[:2]):
        run_reference(reference, warm_up, batched=False)
        drive(engine, warm_up, 2)
    contestants: list[Callable[[], Measurement]] = [
        partial(run_reference, reference, specs, batched=False),
        partial(run_reference, reference, specs, batched=True),
        *(partial(drive, engine, specs, concurrency) for concurrency in CONCURRENCY),
    ]
    turns = [[contestant() for contestant in contestants] for _ in tqdm(range(rounds), desc="rounds", disable=None)]
    print_table([merge(list(rows)) for rows in zip(*turns, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("small", "full"), default="small")
    parser.add_argument("--model", help="a checkpoint folder for the small run; default: the small random checkpoint")
    parser.add_argument("--requests", type=int, default=36, help="requests of a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--part", choices=PARTS, help="one part of the full size; default: all")
    parser.add_argument("--results", type=Path, default=RESULTS, help="figures of the full size")
    arguments = parser.parse_args()
    if arguments.size == "full":
        parts = (arguments.part,) if arguments.part else PARTS
        run_full_size(torch.device(arguments.device), parts, arguments.results)
    else:
        run_small(arguments.model, arguments.requests, arguments.rounds, torch.device(arguments.device))


if __name__ == "__main__":
    main()
