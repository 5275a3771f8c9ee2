"""Drive an engine with a fixed number of requests in flight, and measure it."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.quantile import quantile
from engine.engine import Engine
from engine.jobs.job import JobSpec
from engine.request import Failed, Finished, Request


@dataclass(frozen=True)
class Measurement:
    """One run over a list of requests. Times in seconds unless a name says otherwise."""

    label: str
    seconds: float
    latencies: list[float]
    planner_ms_per_token: float = 0.0
    planner_ms_per_step: float = 0.0
    renderer_us_per_token: float = 0.0

    @property
    def images_per_second(self) -> float:
        return len(self.latencies) / self.seconds

    @property
    def p50(self) -> float:
        return statistics.median(self.latencies)

    @property
    def p95(self) -> float:
        return quantile(self.latencies, 0.95)


def drive(engine: Engine, specs: Sequence[JobSpec], concurrency: int) -> Measurement:
    """Keep `concurrency` requests in flight until the list is used up. Every spec is one image."""
    before = _totals(engine)
    waiting = [Request(str(index), spec) for index, spec in enumerate(specs)][::-1]
    submitted: dict[str, float] = {}
    latencies: list[float] = []
    started = time.perf_counter()
    while waiting or not engine.is_idle:
        while waiting and len(submitted) - len(latencies) < concurrency:
            request = waiting.pop()
            submitted[request.id] = time.perf_counter()
            engine.submit(request)
        for event in engine.step():
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished):
                latencies.append(time.perf_counter() - submitted[event.request.id])
    seconds = time.perf_counter() - started
    planner_seconds, planner_steps, planner_tokens, renderer_seconds, renderer_tokens = (
        after - earlier for after, earlier in zip(_totals(engine), before, strict=True)
    )
    return Measurement(
        f"Glimmer, concurrency {concurrency}",
        seconds,
        latencies,
        1e3 * planner_seconds / (planner_tokens or 1.0),
        1e3 * planner_seconds / (planner_steps or 1.0),
        1e6 * renderer_seconds / (renderer_tokens or 1.0),
    )


def synchronize(device: torch.device) -> None:
    """Wait for a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def merge(rounds: list[Measurement]) -> Measurement:
    """Merge several runs of the same list: times add up, figures per token are averaged."""
    return Measurement(
        rounds[0].label,
        sum(r.seconds for r in rounds),
        [latency for r in rounds for latency in r.latencies],
        statistics.mean(r.planner_ms_per_token for r in rounds),
        statistics.mean(r.planner_ms_per_step for r in rounds),
        statistics.mean(r.renderer_us_per_token for r in rounds),
    )


def _totals(engine: Engine) -> list[float]:
    """Return what the engine has counted since it started: seconds, steps and tokens of both stages."""
    names = (
        "glimmer_planner_step_seconds_sum",
        "glimmer_planner_step_seconds_count",
        "glimmer_planner_tokens_total",
        "glimmer_renderer_step_seconds_sum",
        "glimmer_renderer_tokens_total",
    )
    return [engine.metrics.registry.get_sample_value(name) or 0.0 for name in names]
