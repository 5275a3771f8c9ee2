"""Traces through OpenTelemetry. No torch.

    POST /v1/images/generations        in the API, from the request's head to the end of its response
        queue                          from submit to claim
        run                            an engine's work on the job; one per engine that claims it
            plan render decode encode  of each image
            commit

A job carries its request's `traceparent` through Redis, so that the spans of all processes form one trace. Spans hold
times, sizes and ids, never prompts or images. Without `OTEL_EXPORTER_OTLP_ENDPOINT` all spans are the API package's
no-op spans, and the SDK is not imported. The standard's other variables apply too: service name, sampler, headers,
batches.
"""

import os
import threading
import time
from typing import TYPE_CHECKING, Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from engine.jobs.job import Claim

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

LAST_SPANS_S = 2.0  # how long the end of a process waits for the collector to take the last spans

_PROTOCOL = "http/protobuf"
_PROPAGATOR = TraceContextTextMapPropagator()

Attributes = dict[str, str | int | None]


class TracingError(Exception):
    """Tracing is enabled but cannot be set up; the message says why."""


class Span:
    """A span in progress, to which finished child spans can be added.

    Times are `time.monotonic()` seconds. All are converted to wall-clock time by one offset, taken at the start, so
    that an adjusted clock cannot change their order.

    Args:
        tracer: the default makes no-op spans.
        parent: a `traceparent`; empty or invalid starts a new trace.
        attributes: set on this span and on those added to it; None values are left out.
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
        """Return the header that makes a span in any process a child of this one; empty for a no-op span."""
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, self._context)
        return carrier.get("traceparent", "")

    def child(self, name: str, began: float, ended: float | None = None, image: int | None = None) -> None:
        """Add a finished child span.

        Args:
            ended: now if None.
            image: index of the image it belongs to, if to one.
        """
        self._add(name, self._context, began, ended, {"glimmer.image_index": image})

    def sibling(self, name: str, began: float, ended: float) -> None:
        """Add a finished span under this span's parent."""
        self._add(name, self._parent, began, ended, {})

    def end(self, *, name: str = "", error: str | None = None, attributes: Attributes | None = None) -> None:
        """End the span; the SDK exports it some seconds later.

        Args:
            name: replaces the span's name.
            error: error code; marks the span as failed.
        """
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
    """Starts the spans of a process.

    Args:
        provider: the SDK's; None makes no-op spans.
    """

    def __init__(self, provider: "TracerProvider | None" = None) -> None:
        self._provider = provider
        self._tracer = (provider or trace.NoOpTracerProvider()).get_tracer("glimmer")

    def request(self, method: str, traceparent: str) -> Span:
        """Start the span of an HTTP request, as a child of the client's span if it sent one."""
        if self._provider is None:
            traceparent = ""  # a no-op span would pass the client's on, and engines would trace requests of this API
        return Span(self._tracer, method, traceparent, {"http.request.method": method}, SpanKind.SERVER)

    def run(self, claim: Claim, engine_id: str) -> Span:
        """Start the span of an engine's work on a job claimed just now, and add the one of its wait in the queue."""
        if not claim.origin.traceparent:  # its API does not trace
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
        """Export the remaining spans; after `LAST_SPANS_S` the rest is lost."""
        if self._provider is not None:
            shutdown = threading.Thread(target=self._provider.shutdown, daemon=True)
            shutdown.start()
            shutdown.join(LAST_SPANS_S)


def open_tracing(service: str) -> Tracing:
    """Set up tracing as the environment says.

    Args:
        service: name of the service, unless `OTEL_SERVICE_NAME` or `OTEL_RESOURCE_ATTRIBUTES` has one.

    Raises:
        TracingError: the SDK is not installed, or a variable asks for something unsupported.
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
    """Return an exporter's setting for traces, or else for all signals."""
    return os.environ.get(f"OTEL_EXPORTER_OTLP_TRACES_{name}") or os.environ.get(f"OTEL_EXPORTER_OTLP_{name}") or ""


def _without_none(attributes: Attributes) -> dict[str, Any]:
    return {key: value for key, value in attributes.items() if value is not None}
