"""A collector of traces on a free port."""

import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status


@dataclass(frozen=True)
class Received:
    """A received span. Times are nanoseconds since the epoch, ids hexadecimal; `parent` is empty for a root span."""

    service: str
    name: str
    trace: str
    id: str
    parent: str
    is_of_request: bool
    began: int
    ended: int
    attributes: dict[str, Any]
    error: str | None


class Collector:
    """Accepts OTLP over HTTP inside its `with` block."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                is_export = (self.path, self.headers["content-type"]) == ("/v1/traces", "application/x-protobuf")
                if is_export:
                    collector.bodies.append(body)
                self.send_response(200 if is_export else 404)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def spans(self) -> list[Received]:
        """Return the received spans by start time."""
        spans = []
        for body in self.bodies:
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                service = _values(resource.resource.attributes)["service.name"]
                spans += [_received(service, span) for scope in resource.scope_spans for span in scope.spans]
        return sorted(spans, key=lambda span: span.began)

    def named(self, name: str) -> list[Received]:
        return [span for span in self.spans if span.name == name]


def _received(service: str, span: Span) -> Received:
    return Received(
        service,
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.kind == Span.SPAN_KIND_SERVER,
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        _values(span.attributes),
        span.status.message if span.status.code == Status.STATUS_CODE_ERROR else None,
    )


def _values(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}
