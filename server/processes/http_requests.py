"""Requests as they are parsed. Offered upgrades are ignored."""

import asyncio
from enum import Enum
from typing import Any

import httptools
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from server.processes.http_errors import Refused, head_too_large, malformed, url_too_long
from server.processes.http_exchange import target
from server.processes.http_limits import (
    BODY_READ_BYTES,
    HEAD_READ_BYTES,
    MAX_HEAD_BYTES,
    MAX_HEADERS,
    MAX_URL_BYTES,
)


class Part(Enum):
    """What of a request the parser has begun."""

    NONE = "none"
    HEAD = "head"
    BODY = "body"


class RequestParser(HttpToolsProtocol):
    """uvicorn's protocol with bounded heads. Its callbacks raise `Refused`."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._part = Part.NONE
        self._head_bytes = 0
        self._quiet_bytes = 0  # since the last byte of a body or end of a request

    def _parse(self, data: bytes) -> None:
        """Parse what arrived; raise `Refused`."""
        self._quiet_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            self._ignore_upgrade(data[offer.args[0] :])
        except httptools.HttpParserError as error:
            cause = error.__context__
            raise cause if isinstance(cause, Refused) else Refused(malformed()) from None
        else:
            self._read_up_to(HEAD_READ_BYTES if self._quiet_bytes else BODY_READ_BYTES)
            if self._quiet_bytes > MAX_HEAD_BYTES:
                raise Refused(head_too_large())

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Parse the head again without the offer: the parser would take the body for another protocol."""
        version = self.parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
        lines += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._quiet_bytes = 0
        self._parse(b"\r\n".join([*lines, b"", rest]))

    def _read_up_to(self, size: int) -> None:
        self.transport.max_size = size  # type: ignore[attr-defined]  # asyncio's, of one call

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._part, self._head_bytes = Part.HEAD, 0

    def on_url(self, url: bytes) -> None:
        self.url += url
        self._head_bytes += len(url)
        if len(self.url) > MAX_URL_BYTES:
            raise Refused(url_too_long())

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value) + 4
        if self._head_bytes > MAX_HEAD_BYTES or len(self.headers) >= MAX_HEADERS:
            raise Refused(head_too_large())
        if self._part is not Part.HEAD:
            return  # a trailer must not look like a header
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """Complete the scope; the part stays the head if `_ignore_upgrade` is next."""
        if self.parser.get_method() == b"CONNECT":
            raise Refused(malformed("This server is not a proxy."))
        if self.parser.should_upgrade():
            return
        self._part = Part.BODY
        self.scope["method"] = self.parser.get_method().decode("ascii")
        self.scope["http_version"] = self.parser.get_http_version()
        self.scope.update(target(self.url, self.headers))  # type: ignore[typeddict-item]

    def on_body(self, body: bytes) -> None:
        self._quiet_bytes = 0

    def on_message_complete(self) -> None:
        self._part, self._quiet_bytes = Part.NONE, 0
