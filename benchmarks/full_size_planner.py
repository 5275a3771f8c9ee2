"""The planner of the published size on a CUDA GPU: correctness of replayed passes, then their time against the floor.

Part of `python -m benchmarks.throughput --size full`. Weights are random, so look-ahead says little: its passes and its
seconds are stated apart.
"""

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Floor:
    """What memory allows: a pass reads all weights, and the keys and values of every plan."""

    weights: int
    token: int
    bandwidth: float

    def pass_ms(self, batch: int, context: float) -> float:
        return 1e3 * (self.weights + batch * context * self.token) / self.bandwidth


def run_planner(model: GlmImage, floor: Floor, console: Console) -> None:
    """Check replays, then measure passes.

    Raises:
        SystemExit: a replayed plan differs from the same pass run eagerly.
    """
    check_replays(model, console)
    table = Table(title=f"plans of {SIDE}x{SIDE}, random weights")
    for heading in ("plans at once", "ms/pass", "floor", "ratio", "tokens/s", "s for all", "passes/plan", "s for all"):
        table.add_column(heading, justify="right")
    for batch in BATCHES:
        engine = engine_of(model, batch)
        requests = specs(batch)
        context = 100 + requests[0].image_plan_tokens / 2
        runs = []
        for look_ahead in (LookAhead({}), LookAhead(engine.planner.runner.measure_passes())):
            engine.planner.look_ahead = look_ahead
            plan(engine, requests[:1], 1)
            runs.append(plan(engine, requests, batch))
        without, with_look_ahead = runs
        milliseconds, least = 1e3 * without.seconds / without.steps, floor.pass_ms(batch, context)
        row = (milliseconds, least, milliseconds / least, without.tokens / without.seconds, without.seconds)
        ahead = (with_look_ahead.steps / (with_look_ahead.plans / batch), with_look_ahead.seconds)
        table.add_row(str(batch), *(f"{value:.2f}" for value in (*row, *ahead)))
        del engine
        torch.cuda.empty_cache()
    console.print(table)
    alone, reference = plan(engine_of(model, 1), specs(1), 1), generated_per_second(model, SIDE)
    rate = alone.tokens / alone.seconds
    console.print(
        f"one plan: {rate:.0f} tokens/s; transformers' generate: {reference:.0f}; {rate / reference:.1f} times"
    )


def check_replays(model: GlmImage, console: Console) -> None:
    """Compare plans of captured passes with those of the same passes run eagerly, to the bit."""
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


def engine_of(model: GlmImage, batch: int) -> Engine:
    """Return an engine whose passes have `batch` rows, or as many as look-ahead pays for."""
    spec = specs(1)[0]
    kv_tokens = max(batch, 10) * (spec.image_plan_tokens + 512)
    limits = EngineLimits.choose(model, max_images=batch, min_planner_rows=batch, kv_tokens=kv_tokens)
    return Engine(model, limits)


def specs(count: int) -> list[JobSpec]:
    return [JobSpec("a poster", SIDE, SIDE, seed=seed, num_inference_steps=1) for seed in range(count)]


def plans(engine: Engine) -> list[list[int]]:
    """Return the tokens of four plans."""
    written: list[list[int]] = []
    run: Run = plan(engine, specs(4), 4, written)
    assert run.plans == len(written) == 4
    return written
