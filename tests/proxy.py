"""A proxy to Redis that can be slow or stall."""

import asyncio
from pathlib import Path
from typing import Self


class Proxy:
    """Forwards TCP connections to a Unix socket, with a delay of `delay_s` in either direction.

    While it stalls, it accepts connections and data but forwards nothing until `resume`, like an interrupted network.
    """

    def __init__(self, upstream: Path):
        self.delay_s = 0.0
        self._upstream = upstream
        self._forwarding = asyncio.Event()
        self._forwarding.set()
        self._connections: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    @property
    def url(self) -> str:
        host, port = self._server.sockets[0].getsockname()
        return f"redis://{host}:{port}"

    def stall(self) -> None:
        self._forwarding.clear()

    def resume(self) -> None:
        self._forwarding.set()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._connect(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_writer = None
        try:
            server_reader, server_writer = await asyncio.open_unix_connection(self._upstream)
            await asyncio.gather(self._forward(reader, server_writer), self._forward(server_reader, writer))
        except OSError:
            pass  # one side has closed: close the other
        finally:
            writer.close()
            if server_writer is not None:
                server_writer.close()

    async def _forward(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(1 << 16):
            await asyncio.sleep(self.delay_s)
            await self._forwarding.wait()
            sink.write(data)
            await sink.drain()
        sink.close()
