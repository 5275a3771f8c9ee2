"""Metrics of the API, exposed together with those of the engines.

Labels are bounded: route templates and known methods, never a path or key.
"""

import logging
import math
from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from engine.jobs.job import ENGINE_STATES, TERMINAL_STATES, EngineInfo, QueueStats
from engine.observability.logs import event
from server.admission.engine_directory import STAGES, models_of

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_LATENCY_BUCKETS = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)

REFUSALS = (
    "requests",
    "requests_of_key",
    "requests_of_job",
    "idempotency_key",
    "host",
    "cross_site",
)  # labels of `glimmer_http_refused_total`

logger = logging.getLogger("glimmer.metrics")


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "glimmer_http_requests", "Responses sent.", ("route", "method", "status"), registry=self.registry
        )
        self._seconds = Histogram(
            "glimmer_http_request_seconds",
            "Time from a request's headers to the end of its response.",
            ("route", "method"),
            buckets=_LATENCY_BUCKETS,
            registry=self.registry,
        )
        self.in_flight = Gauge("glimmer_http_requests_in_flight", "Requests in progress.", registry=self.registry)
        self.inflight_bytes = Gauge(
            "glimmer_api_inflight_bytes",
            "Memory held for requests that arrive and responses that are sent.",
            registry=self.registry,
        )
        self.jobs = Counter(
            "glimmer_api_jobs", "Jobs that ended, as seen by this API process.", ("state",), registry=self.registry
        )
        for state in TERMINAL_STATES:  # from 0, or Prometheus misses the first increase
            self.jobs.labels(state)
        self.rewrites = Counter(
            "glimmer_prompt_rewrites",
            "Prompts sent to the rewriter: rewritten, dropped (result not usable) or failed.",
            ("outcome",),
            registry=self.registry,
        )
        self.refused = Counter(
            "glimmer_http_refused",
            "Requests refused because too many were in progress: in this process (requests), of one key "
            "(requests_of_key), for one job (requests_of_job) or with one Idempotency-Key (idempotency_key); or "
            "because a web page may have sent them: an unknown host name (host) or a page elsewhere (cross_site).",
            ("reason",),
            registry=self.registry,
        )
        for reason in REFUSALS:
            self.refused.labels(reason)
        self._queue = Gauge("glimmer_queue_jobs", "Jobs in the queue.", ("state",), registry=self.registry)
        self._backlog = Gauge(
            "glimmer_stage_backlog",
            "Jobs that wait for a stage or run there; an engine of all stages renders without leaving the first.",
            ("stage",),
            registry=self.registry,
        )
        self._queue_cap = Gauge("glimmer_queue_cap", "Maximum number of waiting jobs.", registry=self.registry)
        self._dead_lettered = Gauge(
            "glimmer_queue_jobs_given_up",
            "Jobs failed because they repeatedly crashed their engines, since the queue was created.",
            registry=self.registry,
        )
        self._models = Gauge(
            "glimmer_models",
            "Different models of the ready engines; more than 1 is a mistake, or a change of the checkpoint.",
            registry=self.registry,
        )
        self._engines = Gauge("glimmer_engines", "Engines with a heartbeat.", ("state",), registry=self.registry)
        self._stage_engines = Gauge(
            "glimmer_stage_engines",
            "Engines with a heartbeat that plan or that render; one of all stages does both.",
            ("stage", "state"),
            registry=self.registry,
        )
        self._source_bytes = Gauge(
            "glimmer_queue_source_bytes", "Memory that source images take in Redis.", registry=self.registry
        )
        self._result_bytes = Gauge(
            "glimmer_queue_result_bytes",
            "Memory that records and results take in Redis, with those that live jobs may come to.",
            registry=self.registry,
        )
        self._redis_up = Gauge("glimmer_redis_up", "1 if Redis responded during this scrape.", registry=self.registry)
        self._redis_takes_writes = Gauge(
            "glimmer_redis_takes_writes",
            "1 if Redis accepted a small write during this scrape.",
            registry=self.registry,
        )

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count a request; `route` is a template."""
        method = method if method in _METHODS else "other"
        self._requests.labels(route, method, status).inc()
        self._seconds.labels(route, method).observe(seconds)

    def queue(
        self, stats: QueueStats | None, engines: Sequence[EngineInfo], max_queue: int, *, takes_writes: bool
    ) -> None:
        """Set the gauges of queue and engines; clear them without `stats`."""
        self._redis_up.set(stats is not None)
        self._redis_takes_writes.set(takes_writes)
        self._queue_cap.set(max_queue)
        self._models.set(len(models_of(engines)))
        self._queue.clear()
        self._engines.clear()
        self._stage_engines.clear()
        self._backlog.clear()
        self._source_bytes.set(math.nan if stats is None else stats.source_bytes)
        self._result_bytes.set(math.nan if stats is None else stats.result_bytes)
        self._dead_lettered.set(math.nan if stats is None else stats.dead_lettered)
        if stats is not None:
            self._queue.labels("waiting").set(stats.waiting)
            self._queue.labels("running").set(stats.running)
            self._backlog.labels("plan").set(stats.to_plan)
            self._backlog.labels("render").set(stats.to_render)
            for state in ENGINE_STATES:
                of_state = [engine for engine in engines if engine.state == state]
                self._engines.labels(state).set(len(of_state))
                for stage in STAGES:
                    count = sum(engine.has_stage(stage) for engine in of_state)
                    self._stage_engines.labels(stage, state).set(count)


class _Families:
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def exposition(api: CollectorRegistry, engines: dict[str, str]) -> bytes:
    """Return one Prometheus text of `api` and, with an `engine` label, each engine's text."""
    families: dict[str, Metric] = {}
    for family in api.collect():
        _add(families, family, {})
    for engine_id, text in engines.items():
        try:
            parsed = list(text_string_to_metric_families(text))
        except ValueError as error:
            event(logger, "engine_metrics_unreadable", logging.WARNING, engine=engine_id, error=error)
            continue
        for family in parsed:
            _add(families, family, {"engine": engine_id})
    return generate_latest(_Families(families.values()))


def _add(families: dict[str, Metric], family: Metric, labels: dict[str, str]) -> None:
    """Merge `family`, without what would be invalid: another type (another version's), `_created` gauges (names
    collide).
    """
    if family.name.endswith("_created"):
        return
    target = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
    if target.type != family.type:
        return
    for sample in family.samples:
        if not sample.name.endswith("_created"):
            target.add_sample(sample.name, {**sample.labels, **labels}, sample.value)
