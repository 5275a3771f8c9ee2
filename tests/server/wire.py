"""A small app behind the server's HTTP protocol, and HTTP byte by byte."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from server.errors import ApiError
from server.processes.http_limits import HttpLimits
from server.processes.http_protocol import http_protocol
from server.processes.serving import listen

GET = b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n"
WAIT = b"GET /wait?%d HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


def post(body: bytes, *headers: bytes, path: bytes = b"/echo") -> bytes:
    lines = [b"POST %s HTTP/1.1" % path, b"Host: x", b"Content-Length: %d" % len(body), *headers]
    return b"\r\n".join([*lines, b"", body])


PIECE = b"x" * 65536


class App:
    """/echo reads the body, /wait waits for a disconnect or for `release`, /large and /pieces send 16 MiB, /events is
    silent for a second after each event; all else responds at once. `begun` and `disconnected` hold paths and queries.
    """

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.disconnected: list[str] = []
        self.received = 0  # bytes
        self.release = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        self.begun.append(f"{scope['path']}?{scope['query_string'].decode()}")
        respond = getattr(self, "_" + scope["path"].strip("/"), self._live)
        try:
            await respond(scope, receive, send)
        except ApiError as error:
            await error.response()(scope, receive, send)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _send(send, b"{}")

    async def _echo(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _read(receive)
        headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"]}
        await _send(send, json.dumps({"body": body.decode("latin-1"), "headers": headers}).encode())

    async def _wait(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _read(receive)
        disconnect, release = asyncio.ensure_future(receive()), asyncio.ensure_future(self.release.wait())
        await asyncio.wait({disconnect, release}, return_when=asyncio.FIRST_COMPLETED)
        if disconnect.done():
            self.disconnected.append(self.begun[-1])
        for task in (disconnect, release):
            task.cancel()
        await _send(send, b"{}")

    async def _large(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _send(send, PIECE * 256)

    async def _pieces(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _start(send, len(PIECE) * 256)
        for _ in range(256):
            await send({"type": "http.response.body", "body": PIECE, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for event in (b"one", b"two"):
            await send({"type": "http.response.body", "body": event, "more_body": True})
            await asyncio.sleep(1.0)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _read(receive: Receive) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            break
        body += message["body"]
        more = message["more_body"]
    return body


async def _start(send: Send, size: int) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(size).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _send(send: Send, body: bytes) -> None:
    await _start(send, len(body))
    await send({"type": "http.response.body", "body": body})


class Response:
    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Wire:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def response(self) -> Response:
        """Return the next response.

        Raises:
            EOFError, ConnectionError: the connection has ended.
        """
        async with asyncio.timeout(30):
            head = await self.reader.readuntil(b"\r\n\r\n")
            status, *lines = head.decode("latin-1").split("\r\n")[:-2]
            headers = dict(line.lower().split(": ", 1) for line in lines)
            body = await self.reader.readexactly(int(headers.get("content-length", 0)))
            return Response(int(status.split(" ")[1]), headers, body)

    async def is_closed(self) -> bool:
        """Wait for the end of the connection; return whether nothing came before."""
        async with asyncio.timeout(30):
            try:
                return await self.reader.read() == b""
            except ConnectionError:
                return True

    async def close(self) -> None:
        self.writer.close()
        with suppress(ConnectionError):
            await self.writer.wait_closed()


class WireServer:
    def __init__(self, app: App, state: ServerState, address: tuple[str, int]) -> None:
        self.app, self.address = app, address
        self.connections: set[Any] = state.connections

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Wire]:
        wire = Wire(*await asyncio.open_connection(*self.address))
        try:
            yield wire
        finally:
            await wire.close()

    async def is_live(self) -> bool:
        async with self.connect() as wire:
            wire.send(b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n")
            return (await wire.response()).status == 200


@asynccontextmanager
async def serve(**limits: Any) -> AsyncIterator[WireServer]:
    """Serve an `App`, with a sweep every 20 ms."""
    app, listener = App(), listen("127.0.0.1", 0)

    class CountingProtocol(http_protocol(HttpLimits(**{"sweep_s": 0.02, **limits}))):
        def data_received(self, data: bytes) -> None:
            app.received += len(data)
            super().data_received(data)

    config = uvicorn.Config(app, http=CountingProtocol, lifespan="off", log_config=None)
    state = ServerState()
    server = await asyncio.get_running_loop().create_server(lambda: CountingProtocol(config, state, {}), sock=listener)
    try:
        yield WireServer(app, state, listener.getsockname())
    finally:
        server.close()
        app.release.set()
        for connection in list(state.connections):
            connection.transport.abort()
        await asyncio.gather(*state.tasks)
