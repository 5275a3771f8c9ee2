"""OpenTelemetry traces; no-op spans unless `OTEL_EXPORTER_OTLP_ENDPOINT` is set.

Jobs carry the `traceparent`. Spans never hold prompts or images.
"""

import os
import threading
import time
from typing import TYPE_CHECKING, Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from engine.errors import StartError
from engine.jobs.job import Claim

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

LAST_EXPORT_TIMEOUT_S = 2.0

_PROTOCOL = "http/protobuf"
_PROPAGATOR = TraceContextTextMapPropagator()

Attributes = dict[str, str | int | None]


class TracingError(StartError):
    """Tracing cannot be set up."""


class Span:
    """A span in progress, which finished ones can join.

    Times are monotonic seconds; with one offset, clock changes cannot reorder them.

    Args:
        parent: a `traceparent`; an invalid one starts a new trace.
        attributes: for added spans, too.
    """

    def __init__(
        self,
        tracer: trace.Tracer = trace.NoOpTracer(),
        name: str = "",
        parent: str = "",
        attributes: Attributes | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
    ) -> None:
        self._tracer, self._attributes = tracer, attributes or {}
        self._clock_offset_ns = time.time_ns() - time.monotonic_ns()
        self.began = time.monotonic()
        self._parent = _PROPAGATOR.extract({"traceparent": parent}, Context())
        self._span = self._start(name, self._parent, self.began, {}, kind)
        self._context = trace.set_span_in_context(self._span, Context())

    @property
    def traceparent(self) -> str:
        """Return the header; a no-op span's is empty."""
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, self._context)
        return carrier.get("traceparent", "")

    def child(self, name: str, began: float, ended: float | None = None, image: int | None = None) -> None:
        """Add a finished child span; it ends now by default."""
        self._add(name, self._context, began, ended, {"glimmer.image_index": image})

    def sibling(self, name: str, began: float, ended: float) -> None:
        """Add a finished span under this span's parent."""
        self._add(name, self._parent, began, ended, {})

    def end(self, *, name: str = "", error: str | None = None, attributes: Attributes | None = None) -> None:
        """End the span, as failed if there is an `error` code."""
        if name:
            self._span.update_name(name)
        if error is not None:
            self._span.set_status(StatusCode.ERROR, error)
        self._span.set_attributes(_without_none((attributes or {}) | {"error.type": error}))
        self._span.end(self._wall_clock_ns(time.monotonic()))

    def _add(self, name: str, parent: Context, began: float, ended: float | None, attributes: Attributes) -> None:
        span = self._start(name, parent, began, attributes)
        span.end(self._wall_clock_ns(time.monotonic() if ended is None else ended))

    def _start(
        self, name: str, parent: Context, began: float, attributes: Attributes, kind: SpanKind = SpanKind.INTERNAL
    ) -> trace.Span:
        attributes = _without_none(self._attributes | attributes)
        return self._tracer.start_span(name, parent, kind, attributes, start_time=self._wall_clock_ns(began))

    def _wall_clock_ns(self, monotonic: float) -> int:
        return self._clock_offset_ns + round(monotonic * 1e9)


class Tracing:
    """Starts spans; no-op ones without a provider."""

    def __init__(self, provider: "TracerProvider | None" = None) -> None:
        self._provider = provider
        self._tracer = (provider or trace.NoOpTracerProvider()).get_tracer("glimmer")

    def request(self, method: str, traceparent: str) -> Span:
        """Start an HTTP request's span."""
        if self._provider is None:
            traceparent = ""  # no-op spans would forward it
        return Span(self._tracer, method, traceparent, {"http.request.method": method}, SpanKind.SERVER)

    def run(self, claim: Claim, engine_id: str) -> Span:
        """Start a claim's `run` span; add its `queue` span."""
        if not claim.origin.traceparent:
            return Span()
        spec = claim.spec
        attributes: Attributes = {
            "glimmer.job_id": claim.job_id,
            "glimmer.engine_id": engine_id,
            "glimmer.run": claim.runs,
            "glimmer.images": spec.n,
            "glimmer.width": spec.width,
            "glimmer.height": spec.height,
            "glimmer.steps": spec.num_inference_steps,
        }
        span = Span(self._tracer, "run", claim.origin.traceparent, attributes)
        span.sibling("queue", span.began - (claim.claimed_at - claim.submitted_at) / 1000, span.began)
        return span

    def close(self) -> None:
        """Export the remaining spans within `LAST_EXPORT_TIMEOUT_S`."""
        if self._provider is not None:
            shutdown = threading.Thread(target=self._provider.shutdown, daemon=True)
            shutdown.start()
            shutdown.join(LAST_EXPORT_TIMEOUT_S)


def open_tracing(service: str) -> Tracing:
    """Set up tracing from the `OTEL_*` variables; `service` is the default name.

    Raises:
        TracingError: invalid variables, or no SDK.
    """
    endpoint = _exporter_variable("ENDPOINT")
    if not endpoint or os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return Tracing()
    exporter = os.environ.get("OTEL_TRACES_EXPORTER") or "otlp"
    if exporter == "none":
        return Tracing()
    if exporter != "otlp":
        raise TracingError(f"OTEL_TRACES_EXPORTER is {exporter}; use otlp or none")
    if not endpoint.startswith(("http://", "https://")):
        raise TracingError("OTEL_EXPORTER_OTLP_ENDPOINT is not a URL; write it like http://localhost:4318")
    if (protocol := _exporter_variable("PROTOCOL") or _PROTOCOL) != _PROTOCOL:
        raise TracingError(f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol}; only {_PROTOCOL} is supported")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise TracingError(
            f"OTEL_EXPORTER_OTLP_ENDPOINT is set but {error.name} is not installed; tracing needs "
            "`pip install glimmer[otel]`"
        ) from None
    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: service}))
    try:
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    except ValueError as error:
        raise TracingError(f"invalid OTEL_ variable: {error}") from None
    return Tracing(provider)


def _exporter_variable(name: str) -> str:
    return os.environ.get(f"OTEL_EXPORTER_OTLP_TRACES_{name}") or os.environ.get(f"OTEL_EXPORTER_OTLP_{name}") or ""


def _without_none(attributes: Attributes) -> dict[str, Any]:
    return {key: value for key, value in attributes.items() if value is not None}
