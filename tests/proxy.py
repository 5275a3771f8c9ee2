"""A link to Redis that can be slow or swallow everything."""

import asyncio
from pathlib import Path
from typing import Self


class Proxy:
    """Between a client and a server on a unix socket. It passes everything on, `delay_s` late in either direction.

    While it `swallows`, it accepts connections and whatever comes, and nothing arrives; afterwards it all does, as
    after a break of the network that TCP rides out.
    """

    def __init__(self, upstream: Path):
        self.delay_s = 0.0
        self._upstream = upstream
        self._flows = asyncio.Event()
        self._flows.set()
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

    def swallow(self) -> None:
        self._flows.clear()

    def flow(self) -> None:
        self._flows.set()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._connect(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_writer = None
        try:
            server_reader, server_writer = await asyncio.open_unix_connection(self._upstream)
            await asyncio.gather(self._pass(reader, server_writer), self._pass(server_reader, writer))
        except OSError:
            pass  # one side is gone: so is the other
        finally:
            writer.close()
            if server_writer is not None:
                server_writer.close()

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(1 << 16):
            await asyncio.sleep(self.delay_s)
            await self._flows.wait()
            sink.write(data)
            await sink.drain()
        sink.close()
