import re
import urllib.parse
from collections.abc import Sequence
from typing import Any, cast

import httptools
from uvicorn._types import ASGIReceiveEvent, ASGISendEvent, HTTPResponseStartEvent
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from server.errors import ApiError
from server.processes.http_errors import Refused, malformed
from server.processes.http_pace import Transfers

# RFC 3986. Starlette would read others as parts of the URL.
_HOST = re.compile(rb"([\w.~!$&'()*+,;=%-]*|\[[0-9A-Fa-f:.]+\])(:[0-9]*)?", re.ASCII)


class Exchange(RequestResponseCycle):
    """A request and its response.

    Attributes:
        closes: close the connection after the response.
        ends_with_connection: the response has neither length nor chunks, which HTTP/1.0 lacks.
        failure: why the body stays incomplete; raised to the app.
        is_receiving: the app waits for the body, or for the disconnect.
    """

    transfers: Transfers
    closes = False
    ends_with_connection = False
    failure: ApiError | None = None
    is_receiving = False

    def close_after_response(self) -> None:
        self.closes = True
        if not self.response_started:
            self.keep_alive = False  # for the header

    def fail(self, failure: ApiError) -> None:
        self.failure = failure
        self.close_after_response()
        self.message_event.set()

    async def send(self, message: ASGISendEvent) -> None:
        if not self.response_started and self.waiting_for_100_continue:
            self.keep_alive = False  # the client may or may not send the body
        if self.scope["http_version"] == "1.0" and message["type"] == "http.response.start":
            message = self._start_for_http_1_0(message)
        if self.ends_with_connection and message["type"] == "http.response.body":
            self.expected_content_length = len(message.get("body", b""))
        await super().send(message)
        if message["type"] == "http.response.body":
            self.transfers.written += len(message.get("body", b""))
        elif not self.keep_alive:
            self.closes = self.keep_alive = True  # uvicorn would reset a client that is still sending

    def _start_for_http_1_0(self, message: HTTPResponseStartEvent) -> HTTPResponseStartEvent:
        headers = list(message.get("headers", []))
        names = {name.lower() for name, _ in headers}
        if not names & {b"content-length", b"transfer-encoding"} and message["status"] not in (204, 304):
            self.ends_with_connection = True
            self.chunked_encoding = self.keep_alive = False
        elif self.keep_alive and b"connection" not in names:
            headers.append((b"connection", b"keep-alive"))
        return {**message, "headers": headers}

    async def receive(self) -> ASGIReceiveEvent:
        if self.flow.read_paused:
            self.transfers.expect_body()
        if self.failure is None:
            self.is_receiving = True
            try:
                message = await super().receive()
            finally:
                self.is_receiving = False
            if self.failure is None or message["type"] == "http.disconnect":
                return message
        if self.response_started:
            return {"type": "http.disconnect"}
        raise self.failure


def target(url: bytes, headers: Sequence[tuple[bytes, bytes]]) -> dict[str, Any]:
    """Return path and query of an ASGI scope; raise `Refused` if they or the host are ambiguous."""
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) > 1 or (hosts and not _HOST.fullmatch(hosts[0])):
        raise Refused(malformed("The Host header must name one host, with or without a port."))
    parsed = httptools.parse_url(url)
    path = cast(bytes | None, parsed.path) or b"/"
    if not path.startswith(b"/"):
        raise Refused(malformed("The URL must have a path that begins with a slash."))
    text = path.decode("ascii")
    return {
        "path": urllib.parse.unquote(text) if "%" in text else text,
        "raw_path": path,
        "query_string": parsed.query or b"",
    }
