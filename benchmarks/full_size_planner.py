"""The planner of the published size on a CUDA GPU: correctness of replayed passes, then their time against the floor.

Part of `python -m benchmarks.throughput --size full`. Weights are random, so look-ahead says little: its passes and its
seconds are stated apart.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.planning import Run, plan
from benchmarks.reference_planner import generated_per_second
from engine.engine import Engine
from engine.jobs.job import JobSpec
from engine.limits import EngineLimits
from engine.planner.graph_decoder import GraphDecoder
from engine.planner.lookahead import LookAhead
from models.glm_image.model import GlmImage

SIDE = 1024
BATCHES = (1, 8, 16, 64)

Measure = Callable[[str, Callable[[], Any]], Any]  # returns a figure by name, measured unless it is known


@dataclass(frozen=True)
class Floor:
    """What memory allows: a pass reads all weights, and the keys and values of every plan."""

    weights: int
    token: int
    bandwidth: float

    def pass_ms(self, batch: int, context: float) -> float:
        return 1e3 * (self.weights + batch * context * self.token) / self.bandwidth


def run_planner(
    model: GlmImage,
    floor: Floor,
    measure: Measure,
    console: Console,
    batches: Sequence[int] = BATCHES,
    side: int = SIDE,
) -> None:
    """Measure passes without and with look-ahead, and transformers' planner."""
    table = Table(title=f"plans of {side}x{side}, random weights")
    for heading in ("plans at once", "ms/pass", "floor", "ratio", "tokens/s", "s for all", "passes/plan", "s for all"):
        table.add_column(heading, justify="right")
    for batch in batches:
        least = floor.pass_ms(batch, 100 + specs(1, side)[0].image_plan_tokens / 2)
        milliseconds, rate, seconds, *ahead = measure(f"plans {batch}", lambda: _plans(model, batch, side))  # noqa: B023
        row = milliseconds, least, milliseconds / least, rate, seconds, *ahead
        table.add_row(str(batch), *(f"{value:.2f}" for value in row))
    console.print(table)
    _, rate, *_ = measure("plans 1", lambda: _plans(model, 1, side))
    reference = measure("plans by transformers", lambda: generated_per_second(model, side))
    console.print(
        f"one plan: {rate:.0f} tokens/s; transformers' generate: {reference:.0f}; {rate / reference:.1f} times"
    )


def _plans(model: GlmImage, batch: int, side: int) -> list[float]:
    """Return ms a pass, tokens/s and seconds, then passes a plan and seconds with look-ahead."""
    engine, requests = engine_of(model, batch, side), specs(batch, side)
    runs: list[Run] = []
    for look_ahead in (LookAhead({}), LookAhead(engine.planner.runner.measure_passes())):
        engine.planner.look_ahead = look_ahead
        plan(engine, requests[:1], 1)
        runs.append(plan(engine, requests, batch))
    without, ahead = runs
    del engine
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    rate = without.tokens / without.seconds
    return [
        1e3 * without.seconds / without.steps,
        rate,
        without.seconds,
        ahead.steps / (ahead.plans / batch),
        ahead.seconds,
    ]


def check_replays(model: GlmImage, console: Console) -> None:
    """Compare plans of captured passes with those of the same passes run eagerly, to the bit.

    Raises:
        SystemExit: they differ, or passes are not captured.
    """
    engine = engine_of(model, 4)
    decoder = engine.planner.runner.decoder
    if not isinstance(decoder, GraphDecoder):
        raise SystemExit(f"passes are not captured: {engine.planner.runner.fallbacks}")
    replayed = plans(engine)
    decoder.capture(eagerly=True)
    eager = plans(engine)
    console.print(f"replayed plans equal eager ones: {replayed == eager}; not used: {engine.planner.runner.fallbacks}")
    if replayed != eager:
        raise SystemExit("a captured pass gives other plans than the same pass run eagerly")


def engine_of(model: GlmImage, batch: int, side: int = SIDE) -> Engine:
    """Return an engine that renders nothing; passes have `batch` rows, or as many as look-ahead pays for."""
    spec = specs(1, side)[0]
    kv_tokens = max(batch, 10) * (spec.image_plan_tokens + 512)
    planner = replace(model, stage="plan")
    limits = EngineLimits.choose(planner, max_images=batch, min_planner_rows=batch, kv_tokens=kv_tokens)
    return Engine(planner, limits)


def specs(count: int, side: int = SIDE) -> list[JobSpec]:
    return [JobSpec("a poster", side, side, seed=seed, num_inference_steps=1) for seed in range(count)]


def plans(engine: Engine) -> list[list[int]]:
    """Return the tokens of four plans."""
    written: list[list[int]] = []
    run: Run = plan(engine, specs(4), 4, written)
    assert run.plans == len(written) == 4
    return written
