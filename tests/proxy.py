"""A proxy to Redis that can be slow, stall, reset connections or lose replies."""

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Self

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with RST


class Proxy:
    """Forwards TCP connections to a Unix socket, with a delay of `delay_s` in either direction.

    While it stalls, it accepts connections and data but forwards nothing until `resume`, like an interrupted network.
    Where `loses` returns true for the last command of a connection and the reply, the connection is reset instead.
    """

    def __init__(self, upstream: Path):
        self.delay_s = 0.0
        self.loses: Callable[[bytes, bytes], bool] | None = None
        self._upstream = upstream
        self._forwarding = asyncio.Event()
        self._forwarding.set()
        self._connections: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._socket = socket.create_server(("127.0.0.1", 0))

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, sock=self._socket)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    @property
    def url(self) -> str:
        host, port = self._socket.getsockname()
        return f"redis://{host}:{port}"

    def stall(self) -> None:
        self._forwarding.clear()

    def resume(self) -> None:
        self._forwarding.set()

    def reset(self) -> None:
        """Reset all connections of clients."""
        for writer in self._writers:
            _reset(writer)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._connect(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_writer = None
        command = b""

        async def send(data: bytes) -> None:
            nonlocal command
            assert server_writer is not None
            command = data
            server_writer.write(data)
            await server_writer.drain()

        async def reply(data: bytes) -> None:
            if self.loses is not None and self.loses(command, data):
                _reset(writer)
                raise ConnectionResetError
            writer.write(data)
            await writer.drain()

        self._writers.add(writer)
        try:
            server_reader, server_writer = await asyncio.open_unix_connection(self._upstream)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._forward(reader, send, server_writer))
                group.create_task(self._forward(server_reader, reply, writer))
        except* OSError:
            pass  # one side has closed: close the other
        finally:
            self._writers.discard(writer)
            writer.close()
            if server_writer is not None:
                server_writer.close()

    async def _forward(
        self, source: asyncio.StreamReader, write: Callable[[bytes], Awaitable[None]], sink: asyncio.StreamWriter
    ) -> None:
        while data := await source.read(1 << 16):
            await asyncio.sleep(self.delay_s)
            await self._forwarding.wait()
            await write(data)
        sink.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
