"""Driving an engine with a fixed number of requests in flight, and what to read off it."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.quantile import quantile
from engine.engine import Engine
from engine.jobs.job import JobSpec
from engine.observability.metrics import EngineMetrics
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
    """Closed loop: `concurrency` requests are in flight until the list is used up. Every spec is one image."""
    engine.metrics = EngineMetrics()
    waiting = [Request(str(number), spec) for number, spec in enumerate(specs)][::-1]
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
    return Measurement(
        f"Glimmer, concurrency {concurrency}",
        time.perf_counter() - started,
        latencies,
        1e3 * _ratio(engine, "glimmer_planner_step_seconds_sum", "glimmer_planner_tokens_total"),
        1e3 * _ratio(engine, "glimmer_planner_step_seconds_sum", "glimmer_planner_step_seconds_count"),
        1e6 * _ratio(engine, "glimmer_renderer_step_seconds_sum", "glimmer_renderer_tokens_total"),
    )


def merge(rounds: list[Measurement]) -> Measurement:
    """Several runs of the same list as one: times add up, figures per token are averaged."""
    return Measurement(
        rounds[0].label,
        sum(r.seconds for r in rounds),
        [latency for r in rounds for latency in r.latencies],
        statistics.mean(r.planner_ms_per_token for r in rounds),
        statistics.mean(r.planner_ms_per_step for r in rounds),
        statistics.mean(r.renderer_us_per_token for r in rounds),
    )


def _ratio(engine: Engine, above: str, below: str) -> float:
    value = engine.metrics.registry.get_sample_value
    return (value(above) or 0.0) / (value(below) or 1.0)
