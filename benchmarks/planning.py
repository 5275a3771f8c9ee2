"""Planning with and without look-ahead, in turns, on the shipped checkpoint and the small random one.

    python -m benchmarks.planning

Look-ahead gains what the guesses agree: much on a trained planner, nothing on random weights.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.folders import cache_dir
from benchmarks.reference_planner import generated_per_second
from engine.engine import Engine
from engine.jobs.job import JobSpec
from engine.limits import EngineLimits
from engine.planner.lookahead import LookAhead
from engine.request import Failed, Planned, Request
from models.glm_image.model import GlmImage, Stage
from models.glm_image.random_weights import cached_random_checkpoint
from models.nano import CHECKPOINT

PROMPTS = (
    'a blue poster, top headline "GLIMMER", center a large yellow star, bottom footer "HELLO" on a red bar',
    'white background, the title "SALE" at the top, a small red heart and a small black ring',
    'a green poster, footer "OPEN 9-5", headline "MARKET", hero: white diamond',
)
CASES = ((256, 1), (512, 1), (256, 4), (256, 16), (256, 64))  # side, plans in flight


@dataclass(frozen=True)
class Run:
    """Plans made, in seconds and planner steps of the whole run."""

    tokens: int
    plans: int
    seconds: float
    steps: float


def specs(side: int, count: int) -> list[JobSpec]:
    return [JobSpec(PROMPTS[i % len(PROMPTS)], side, side, seed=i, num_inference_steps=12) for i in range(count)]


def plan(engine: Engine, requests: list[JobSpec], concurrency: int, written: list[list[int]] | None = None) -> Run:
    """Write plans on an engine that renders nothing. Their tokens are added to `written`, in order."""
    tokens: dict[int, list[int]] = {}
    waiting = [Request(str(index), spec) for index, spec in enumerate(requests)][::-1]
    in_flight, before, started = 0, steps(engine), time.perf_counter()
    while waiting or not engine.is_idle:
        while waiting and in_flight < concurrency:
            engine.submit(waiting.pop())
            in_flight += 1
        for event in engine.step():
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Planned):
                tokens[int(event.request.id)] = event.plan.tokens
                in_flight -= 1
    seconds = time.perf_counter() - started
    if written is not None:
        written += [tokens[number] for number in sorted(tokens)]
    return Run(sum(s.image_plan_tokens for s in requests), len(requests), seconds, steps(engine) - before)


def steps(engine: Engine) -> float:
    return engine.metrics.registry.get_sample_value("glimmer_planner_step_seconds_count") or 0.0


def in_turns(engine: Engine, rounds: int, work: Callable[[], Run]) -> tuple[list[Run], list[Run]]:
    """Return runs without and with look-ahead."""
    choices = (LookAhead({}), LookAhead(engine.planner.runner.measure_passes()))
    runs: tuple[list[Run], list[Run]] = ([], [])
    for _ in range(rounds):
        for choice, results in zip(choices, runs, strict=True):
            engine.planner.look_ahead = choice
            results.append(work())
    return runs


def load(folder: str, stage: Stage) -> GlmImage:
    return GlmImage.load(folder, torch.device("cpu"), torch.float32, stage)


def whole_image(engine: Engine) -> Run:
    started = time.perf_counter()
    engine.generate(specs(256, 1))
    return Run(0, 1, time.perf_counter() - started, 0)


def report(name: str, folder: str, rounds: int, console: Console) -> None:
    """Plan on an engine that renders nothing, then make whole images on one that does."""
    planner = load(folder, "plan")
    engine = Engine(planner, EngineLimits.choose(planner, max_images=64))
    passes = engine.planner.runner.measure_passes()
    milliseconds = ", ".join(f"{rows} rows {1e3 * seconds:.2f}" for rows, seconds in passes.items())
    table = Table(title=f"{name}; ms a pass of one plan: {milliseconds}")
    for heading in ("", "steps/plan", "with", "tokens/s", "with", "ms/plan", "with", "ratio"):
        table.add_column(heading, justify="left" if not heading else "right")
    for side, concurrency in CASES:
        requests = specs(side, max(3, concurrency))
        runs = in_turns(engine, rounds, lambda: plan(engine, requests, concurrency))  # noqa: B023
        add_row(table, f"{side}x{side}, {concurrency} in flight", *runs)
    model = load(folder, "all")
    engine = Engine(model)
    whole_image(engine)
    add_row(table, "256x256, the whole image", *in_turns(engine, rounds, lambda: whole_image(engine)))
    reference = median(generated_per_second(model, 256) for _ in range(rounds))
    table.add_row("256x256, 1, transformers", "", "", f"{reference:.0f}")
    console.print(table)


def add_row(table: Table, label: str, without: list[Run], with_look_ahead: list[Run]) -> None:
    cells: list[str] = []
    for figure in (
        lambda run: run.steps / run.plans,
        lambda run: run.tokens / run.seconds,
        lambda run: 1e3 * run.seconds / run.plans,
    ):
        values = [median(figure(run) for run in runs) for runs in (without, with_look_ahead)]
        cells += [f"{value:.0f}" if value else "" for value in values]
    ratio = median(run.seconds for run in without) / median(run.seconds for run in with_look_ahead)
    table.add_row(label, *cells, f"{ratio:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs without and with look-ahead of each case")
    rounds = parser.parse_args().rounds
    console = Console(width=120)
    for name, folder in (("nano", Path(CHECKPOINT)), ("random weights", cached_random_checkpoint(cache_dir()))):
        report(name, str(folder), rounds, console)


if __name__ == "__main__":
    main()
