"""Id, span, log line, metrics of every request, and the 500 for unhandled exceptions.

Pure ASGI: Starlette's `BaseHTTPMiddleware` would hide disconnects from the routes.
"""

import logging
import re
import time
import uuid
from contextlib import ExitStack
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.jobs.job import Origin
from engine.observability.logs import bind, bound, event, where
from engine.observability.tracing import Span, Tracing
from server.errors import ApiError, internal_error
from server.metrics import Metrics

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_QUIET_ROUTES = frozenset({"/live", "/health", "/metrics"})  # frequent probes

logger = logging.getLogger("glimmer.http")


@dataclass
class _Exchange:
    """A request in progress. `status` is 0 until the response starts."""

    request_id: str
    span: Span
    method: str
    started: float = field(default_factory=time.perf_counter)
    status: int = 0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started


class RequestObserver:
    """Counts requests; sets `request.state`: `origin`, and `places`, held until the response is sent.

    Adds `request.state.response_headers` to every response.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: Tracing) -> None:
        self._app = app
        self._metrics, self._tracing = metrics, tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        exchange = _Exchange(_request_id(headers), self._span(scope, headers), scope["method"])
        if exchange.method == "HEAD":  # a copy: the server's own `scope` stays as it is
            scope, send = {**scope, "method": "GET"}, _headers_only(send)
        if scope["path"].endswith("/") and scope["path"] != "/":  # served: a redirect would have to know the public URL
            scope = {**scope, "path": scope["path"][:-1]}
        bind(request=exchange.request_id, job=None)  # a connection's requests may share a task
        scope.setdefault("state", {})["origin"] = Origin(exchange.request_id, exchange.span.traceparent)
        with self._metrics.in_flight.track_inprogress(), scope["app"].state.gate.exchange():
            try:
                await self._serve(scope, receive, send, exchange)
            finally:
                self._report(scope, exchange)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, exchange: _Exchange) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.update(scope["state"].get("response_headers", {}))
                headers["x-request-id"] = exchange.request_id
                if scope["app"].state.gate.draining:
                    headers["connection"] = "close"  # the next goes to another process
                headers["openai-processing-ms"] = str(round(exchange.seconds * 1000))
            await send(message)

        try:
            with ExitStack() as places:
                if scope["path"].startswith("/v1/"):
                    places.enter_context(scope["app"].state.gate.request())
                scope["state"]["places"] = places
                await self._app(scope, receive, send_with_headers)
        except ApiError as refusal:
            if exchange.status:
                raise
            await refusal.response()(scope, receive, send_with_headers)
        except Exception as error:
            event(logger, "unhandled", logging.ERROR, error=type(error).__name__, where=where(error))
            if exchange.status:
                raise  # too late for a response
            await internal_error().response()(scope, receive, send_with_headers)

    def _report(self, scope: Scope, exchange: _Exchange) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        self._metrics.request(route, exchange.method, exchange.status, exchange.seconds)
        exchange.span.end(
            name=f"{exchange.method} {route}",
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
            method=exchange.method,
            route=route,
            status=exchange.status,
            ms=exchange.seconds * 1000,
            key=getattr(scope["state"].get("caller"), "owner", None) or None,
        )

    def _span(self, scope: Scope, headers: Headers) -> Span:
        if scope["path"] in _QUIET_ROUTES:
            return Span()
        return self._tracing.request(scope["method"], headers.get("traceparent", ""))


def _headers_only(send: Send) -> Send:
    """Return a `send` that ends the response after its headers."""

    async def send_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            await send(message)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    return send_headers


def _request_id(headers: Headers) -> str:
    """Return the client's id if safe to log, else a new one."""
    sent = headers.get("x-request-id", "")
    return sent if _REQUEST_ID.fullmatch(sent) else f"req_{uuid.uuid4().hex}"
