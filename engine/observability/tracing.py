"""Traces, where `OTEL_EXPORTER_OTLP_ENDPOINT` says who takes them; OpenTelemetry is imported only then. No torch.

    POST /v1/images/generations        in the API, from the request's head to the end of its answer
        queue                          from submit to claim
        run                            an engine's work on the job; one more for every further engine that claims it
            plan render decode encode  of each image
            commit

A job carries its request's `traceparent` through Redis, so all of it is one trace, in whatever process it was made.
Spans have times, sizes and ids in them, never prompts or pictures. The standard's other variables hold as well: the
name of the service, the sampler, headers, batches.
"""

import os
import threading
import time
from typing import TYPE_CHECKING, Any

from engine.jobs.job import Claim

if TYPE_CHECKING:
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider

LAST_SPANS_S = 2.0  # for so long the end of a process waits for a collector that may be away

_PROTOCOL = "http/protobuf"

Attributes = dict[str, str | int | None]


class TracingError(Exception):
    """Traces are asked for and cannot be had; the message says why."""


class Span:
    """A span under way, and a place for those below it. Without a tracer it does nothing.

    Times are `time.monotonic()` seconds. One look at the clock turns those of a span and of all below it into times of
    day, so that none seems to come before what came before it.

    Args:
        parent: a `traceparent`; where it is none, a trace begins here.
        of_request: whether it stands for a request that came in.
        attributes: of this span and of those it tells of; those that are None are left out.
    """

    def __init__(
        self,
        tracer: "trace.Tracer | None" = None,
        name: str = "",
        parent: str = "",
        attributes: Attributes | None = None,
        *,
        of_request: bool = False,
    ) -> None:
        self._tracer, self._parent, self._attributes = tracer, parent, attributes or {}
        self._zero_ns = time.time_ns() - time.monotonic_ns()
        self.began = time.monotonic()
        self._span = self._start(name, parent, self.began, {}, of_request=of_request)

    @property
    def traceparent(self) -> str:
        """What makes a span this one's child, in whatever process; empty without a tracer."""
        if self._span is None:
            return ""
        context = self._span.get_span_context()
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"

    def child(self, name: str, began: float, ended: float | None = None, image: int | None = None) -> None:
        """Tells of a part of this that is over, just now if no time is given.

        Args:
            image: the index of the image it was for, if for one.
        """
        self._tell(name, self.traceparent, began, ended, {"glimmer.image_index": image})

    def sibling(self, name: str, began: float, ended: float) -> None:
        """Tells of something under the same parent that is over."""
        self._tell(name, self._parent, began, ended, {})

    def end(self, *, name: str = "", error: str | None = None, attributes: Attributes | None = None) -> None:
        """Over, and sent some seconds later.

        Args:
            name: a better one than it had.
            error: the code of what went wrong, if something did.
        """
        if self._span is None:
            return
        if name:
            self._span.update_name(name)
        if error is not None:
            from opentelemetry.trace import StatusCode

            self._span.set_status(StatusCode.ERROR, error)
        self._span.set_attributes(_known((attributes or {}) | {"error.type": error}))
        self._span.end(self._time_of_day(time.monotonic()))

    def _tell(self, name: str, parent: str, began: float, ended: float | None, attributes: Attributes) -> None:
        span = self._start(name, parent, began, attributes)
        if span is not None:
            span.end(self._time_of_day(time.monotonic() if ended is None else ended))

    def _start(
        self, name: str, parent: str, began: float, attributes: Attributes, *, of_request: bool = False
    ) -> "trace.Span | None":
        if self._tracer is None:
            return None
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        return self._tracer.start_span(
            name,
            TraceContextTextMapPropagator().extract({"traceparent": parent}, Context()),
            SpanKind.SERVER if of_request else SpanKind.INTERNAL,
            _known(self._attributes | attributes),
            start_time=self._time_of_day(began),
        )

    def _time_of_day(self, monotonic: float) -> int:
        """In nanoseconds since the epoch."""
        return self._zero_ns + round(monotonic * 1e9)


class Tracing:
    """Makes the spans of a process, or none without a provider."""

    def __init__(self, provider: "TracerProvider | None" = None) -> None:
        self._provider = provider
        self._tracer = None if provider is None else provider.get_tracer("glimmer")

    def request(self, method: str, traceparent: str) -> Span:
        """Starts the span of a request, under that of the client if it sent one."""
        return Span(self._tracer, method, traceparent, {"http.request.method": method}, of_request=True)

    def run(self, claim: Claim, engine_id: str) -> Span:
        """Starts the span of an engine's work on a job that it claimed just now, and tells how long that waited."""
        if not claim.origin.traceparent:  # its API makes no traces
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
        """Sends what has not been sent yet. Takes `LAST_SPANS_S` at most; what is left then is lost."""
        if self._provider is not None:
            sending = threading.Thread(target=self._provider.shutdown, daemon=True)
            sending.start()
            sending.join(LAST_SPANS_S)


def open_tracing(service: str) -> Tracing:
    """What the environment asks for.

    Args:
        service: the name of the service, unless `OTEL_SERVICE_NAME` or `OTEL_RESOURCE_ATTRIBUTES` has one.

    Raises:
        TracingError: what it takes is not installed, or not what is asked for.
    """
    endpoint = _variable("ENDPOINT")
    if not endpoint or os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return Tracing()
    exporter = os.environ.get("OTEL_TRACES_EXPORTER") or "otlp"
    if exporter == "none":
        return Tracing()
    if exporter != "otlp":
        raise TracingError(f"OTEL_TRACES_EXPORTER is {exporter}; use otlp or none")
    if not endpoint.startswith(("http://", "https://")):
        raise TracingError("OTEL_EXPORTER_OTLP_ENDPOINT is no URL; write it like http://localhost:4318")
    if (protocol := _variable("PROTOCOL") or _PROTOCOL) != _PROTOCOL:
        raise TracingError(f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol}; traces are sent as {_PROTOCOL} only")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise TracingError(
            f"OTEL_EXPORTER_OTLP_ENDPOINT is set and {error.name} is not installed; traces need "
            "`pip install glimmer[otel]`"
        ) from None
    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: service}))
    try:
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    except ValueError as error:
        raise TracingError(f"the variables OTEL_... cannot be used: {error}") from None
    return Tracing(provider)


def _variable(name: str) -> str:
    """Of the exporter: the one for traces, or the one for all it exports."""
    return os.environ.get(f"OTEL_EXPORTER_OTLP_TRACES_{name}") or os.environ.get(f"OTEL_EXPORTER_OTLP_{name}") or ""


def _known(attributes: Attributes) -> dict[str, Any]:
    return {key: value for key, value in attributes.items() if value is not None}
