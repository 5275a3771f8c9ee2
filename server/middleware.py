"""Around every request: an id, the time it took, one log line, a span, the metrics, and no exception that gets out.

Pure ASGI: Starlette's `BaseHTTPMiddleware` would hide the client's disconnect from the routes.
"""

import logging
import re
import time
import uuid
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.jobs.job import Origin
from engine.observability.logs import bind, bound, event, where
from engine.observability.tracing import Span, Tracing
from server.errors import internal_error
from server.metrics import Metrics

_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_QUIET_ROUTES = frozenset({"/live", "/health", "/metrics"})  # probes come every few seconds and say nothing new

logger = logging.getLogger("glimmer.http")


@dataclass
class _Exchange:
    """One request as it goes by. `status` is 0 until the answer starts."""

    request_id: str
    span: Span
    started: float = field(default_factory=time.perf_counter)
    status: int = 0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started


class RequestObserver:
    """Gives each request its id and its span (`request.state.origin`) and reports it when it is over. What a route puts
    into `request.state.response_headers` goes onto the answer, whatever that is."""

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: Tracing) -> None:
        self._app = app
        self._metrics, self._tracing = metrics, tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        exchange = _Exchange(_request_id(headers), self._span(scope, headers))
        bind(request=exchange.request_id, job=None)  # a connection's next request may start in the task of its last
        scope.setdefault("state", {})["origin"] = Origin(exchange.request_id, exchange.span.traceparent)
        with self._metrics.in_flight.track_inprogress():
            try:
                await self._serve(scope, receive, send, exchange)
            finally:
                self._report(scope, exchange)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, exchange: _Exchange) -> None:
        async def send_stamped(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.update(scope["state"].get("response_headers", {}))
                headers["x-request-id"] = exchange.request_id
                if scope["app"].state.gate.closed:
                    headers["connection"] = "close"  # the next request would find nobody
                headers["openai-processing-ms"] = str(round(exchange.seconds * 1000))
            await send(message)

        try:
            await self._app(scope, receive, send_stamped)
        except Exception as error:
            kind, frames = type(error).__name__, where(error)
            event(logger, "unhandled", logging.ERROR, error=kind, where=frames)
            if exchange.status:
                raise  # too late for an answer; the server closes the connection
            await internal_error().response()(scope, receive, send_stamped)

    def _report(self, scope: Scope, exchange: _Exchange) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        self._metrics.request(route, scope["method"], exchange.status, exchange.seconds)
        exchange.span.end(
            name=f"{scope['method']} {route}",
            error=str(exchange.status) if exchange.status >= 500 else None,
            attributes={
                "http.route": route,
                "http.response.status_code": exchange.status or None,
                "glimmer.request_id": exchange.request_id,
                "glimmer.job_id": bound().get("job"),
            },
        )
        event(
            logger,
            "request",
            logging.DEBUG if route in _QUIET_ROUTES else logging.INFO,
            method=scope["method"],
            route=route,
            status=exchange.status,
            ms=exchange.seconds * 1000,
            key=getattr(scope["state"].get("caller"), "owner", None) or None,
        )

    def _span(self, scope: Scope, headers: Headers) -> Span:
        if scope["path"] in _QUIET_ROUTES:
            return Span()
        return self._tracing.request(scope["method"], headers.get("traceparent", ""))


def _request_id(headers: Headers) -> str:
    """The client's id where it is fit for a header and a log line, otherwise a new one."""
    sent = headers.get("x-request-id", "")
    return sent if _SANE_ID.fullmatch(sent) else f"req_{uuid.uuid4().hex}"
