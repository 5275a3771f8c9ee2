"""HTTP/1.1 on one connection: uvicorn's protocol, with limits, pipelining and errors in JSON.

To see disconnects, reading stops only while the body of the request in progress waits for the app.
"""

import asyncio
import logging
from collections import deque
from typing import Any, cast

from uvicorn import Config
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.server import ServerState

from engine.observability.logs import event
from server.addresses import without_mapping
from server.errors import ApiError, unavailable
from server.processes.http_errors import Refused, error_response, malformed, timed_out
from server.processes.http_exchange import Exchange
from server.processes.http_limits import (
    HEAD_READ_BYTES,
    MAX_PIPELINED,
    MAX_PIPELINED_BYTES,
    ConnectionTable,
    HttpLimits,
)
from server.processes.http_pace import Transfers
from server.processes.http_requests import Part, RequestParser

logger = logging.getLogger("glimmer.http")


class HttpProtocol(RequestParser):
    """One connection. `http_protocol` returns the class for a server."""

    table: ConnectionTable

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limits = self.table.limits
        self._transfers = Transfers(self._limits, self.loop)
        self._unanswered: deque[Exchange] = deque()  # the first is in progress, the others are pipelined
        self._ahead_bytes = 0  # since the request in progress was complete
        self._is_dropping = False  # parses no further; reads on, to see the disconnect
        self._last_error: ApiError | None = None  # the response after the last one
        self._deadline = 0.0  # while no request is in progress
        self._is_held = False  # the next request, until the last response is read

    # --- the connection -----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.client, self.server = without_mapping(self.client), without_mapping(self.server)
        self._read_up_to(HEAD_READ_BYTES)
        self._deadline = self.loop.time() + self._limits.head_s
        if not self.table.add(self):
            self._finish(unavailable("This server has no connection left; try again.", 2))

    def connection_lost(self, exc: Exception | None) -> None:
        self.table.remove(self)
        for exchange in self._unanswered:
            exchange.disconnected = True
            exchange.message_event.set()
        self._unanswered.clear()
        super().connection_lost(exc)

    @property
    def unsent_bytes(self) -> int:
        return self.transport.get_write_buffer_size()

    def evict(self) -> None:
        self.transport.abort()

    def shutdown(self) -> None:
        """Close after the last response. Called by uvicorn."""
        if self._unanswered:
            self._unanswered[-1].close_after_response()
        else:
            self.transport.close()

    def check(self, now: float) -> None:
        """End what is late, also a closing connection whose client does not take the response."""
        if self._transfers.is_response_late(now, self.transport):
            event(logger, "response_not_read", bytes=self.transport.get_write_buffer_size())
            self.transport.abort()
        if self.transport.is_closing():
            return
        if self._unanswered:
            exchange = self._unanswered[0]
            if exchange.is_receiving and exchange.more_body and self._transfers.is_body_late(now):
                self._fail(timed_out("body"))
        elif now > self._deadline:
            if self._part is Part.HEAD and not self._is_dropping:
                self._finish(timed_out("head"))
            else:
                self.transport.close()

    # --- receiving ----------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._is_dropping:
            return
        if self._unanswered and not self._unanswered[0].more_body:
            self._ahead_bytes += len(data)
            if self._ahead_bytes > MAX_PIPELINED_BYTES:
                self._fail(None)
                return
        try:
            self._parse(data)
        except Refused as refusal:
            self._fail(refusal.error)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._deadline = self.loop.time() + self._limits.head_s

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if self._part is not Part.BODY:
            return
        if len(self._unanswered) > MAX_PIPELINED:
            raise Refused(None)
        exchange = self.cycle = self._exchange()
        self._unanswered.append(exchange)
        if len(self._unanswered) == 1:
            self.table.begin(self)
            self._start_when_read()

    def _exchange(self) -> Exchange:
        exchange = Exchange(
            scope=self.scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue and self.scope["http_version"] != "1.0",
            keep_alive=self.parser.should_keep_alive(),
            on_response=self.on_response_complete,
        )
        exchange.transfers = self._transfers
        return exchange

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        exchange = self.cycle
        if exchange.response_complete:
            return
        self._transfers.body_arrived(len(body))
        exchange.body += body
        if len(exchange.body) > HIGH_WATER_LIMIT and exchange is self._unanswered[0]:
            self.flow.pause_reading()
        exchange.message_event.set()

    def on_message_complete(self) -> None:
        if self._part is not Part.BODY:
            return  # an offer of an upgrade
        super().on_message_complete()
        exchange = self.cycle
        exchange.more_body = False
        if exchange.response_complete:
            self._wait()
        else:
            exchange.message_event.set()
            self.flow.resume_reading()  # to see the disconnect

    def _fail(self, error: ApiError | None) -> None:
        """Parse no further. The error, if any, answers the incomplete request."""
        self._is_dropping = True
        self.flow.resume_reading()
        if not self._unanswered:
            self._finish(error)
        elif not (last := self._unanswered[-1]).more_body:
            self._last_error = error
        elif len(self._unanswered) > 1:
            self._unanswered.pop()  # not started
            self._last_error = error
        else:
            last.fail(error or malformed())
            self.transport.pause_reading()

    # --- responding ---------------------------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        self.table.unread(self)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.table.read(self)
        if self.unsent_bytes == 0:
            self.transport.set_write_buffer_limits()
            if self._is_held and not self.transport.is_closing():
                self._start()

    def _start_when_read(self) -> None:
        """Start the next request once the last response is sent: a client that does not read costs one response."""
        if self.unsent_bytes:
            self._is_held = True
        else:
            self._start()

    def _start(self) -> None:
        self._is_held = False
        self._transfers.expect_body()
        self._start_asgi_task(self._unanswered[0], cast(ASGI3Application, self.app))

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        exchange = self._unanswered.popleft()
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.unsent_bytes:
            self.transport.set_write_buffer_limits(0)  # `resume_writing` when all is sent
        if len(self._unanswered) < 2:
            self._ahead_bytes = 0
        if exchange.closes:
            self._finish(None)
        elif self._unanswered:
            self._start_when_read()
        elif self._is_dropping:
            self._finish(self._last_error)
        else:
            self.table.end(self)
            self._wait()

    def _wait(self) -> None:
        """Wait for the next request, or for the rest of one."""
        if self._part is Part.NONE:
            wait_s = self.timeout_keep_alive
        else:
            wait_s = self._limits.head_s if self._part is Part.HEAD else self._limits.linger_s
        self._deadline = self.loop.time() + wait_s

    def _finish(self, error: ApiError | None) -> None:
        """Respond with the error, if any, and close the connection.

        Closing resets a client that is still sending, and most read only after sending: wait a moment, and read on if
        the request was valid.
        """
        is_sending = self._is_dropping or self._part is not Part.NONE
        if self._is_dropping or error is not None:
            self.transport.pause_reading()
        self._is_dropping, self._is_held = True, False
        self._unanswered.clear()
        self.table.end(self)
        self._deadline = self.loop.time() + self._limits.linger_s
        if error is not None:
            self.transport.write(error_response(error, self.server_state.default_headers))
        if is_sending:
            self.transport.write_eof()
        else:
            self.transport.close()


def http_protocol(limits: HttpLimits) -> type[HttpProtocol]:
    """Return the protocol of a server whose connections share `limits`."""

    class LimitedHttpProtocol(HttpProtocol):
        table = ConnectionTable(limits)

    return LimitedHttpProtocol
