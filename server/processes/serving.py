"""The app under uvicorn, with a drain."""

import asyncio
import math
import os
import socket
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from server.admission.gate import Gate
from server.processes.http_limits import HttpLimits, raise_file_limit, share_files
from server.processes.http_protocol import http_protocol

# Longer than clients keep idle connections (httpx 5 s, nginx and cloud balancers 60 s): a request sent as the server
# closes one is lost.
KEEP_ALIVE_S = 75
LAST_BYTES_S = 5  # for slow clients when the drain ends


class StartError(Exception):
    """The server cannot start; for the user."""


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; raise `StartError` if the address cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
        # Inherited by connections: else a small body waits 40 ms for the acknowledgement of the headers. asyncio sets
        # it only on its own sockets.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Ethernet's: from the same machine, with segments of 64 KiB, the kernels take 4 MB more than is read.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1460)
        return listener
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise StartError(f"cannot listen on {host}:{port} ({reason}); choose another --host or --port") from None


def url_of(listener: socket.socket) -> str:
    """Return the URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class DrainingServer(uvicorn.Server):
    """The first SIGTERM or SIGINT drains, the second exits at once; `drained` is set when only last bytes remain."""

    def __init__(self, app: FastAPI, grace_s: float) -> None:
        connections, backlog = share_files(raise_file_limit())
        super().__init__(
            uvicorn.Config(
                app,
                http=http_protocol(HttpLimits(connections=connections)),
                ws="none",
                backlog=backlog,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=LAST_BYTES_S,
                timeout_keep_alive=KEEP_ALIVE_S,
            )
        )
        self._gate: Gate = app.state.gate
        self._grace_s = grace_s
        self._drain_ends_at = math.inf
        self.drained = asyncio.Event()

    @property
    def grace_left_s(self) -> float:
        """Return the rest of the grace period, 0 after a second signal."""
        if self.force_exit:
            return 0.0
        return max(0.0, min(self._grace_s, self._drain_ends_at - time.monotonic()))

    def drain(self) -> None:
        """Refuse new requests and start the grace period."""
        self._gate.close()
        self._drain_ends_at = time.monotonic() + self._grace_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal; not raised again, as in uvicorn: callers still have to clean up."""
        if self._gate.closed:
            self.should_exit = self.force_exit = True
        else:
            self.drain()

    async def on_tick(self, counter: int) -> bool:
        """Return whether to exit; called ten times a second."""
        if self._gate.closed and (self._gate.inside == 0 or time.monotonic() > self._drain_ends_at):
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Set `drained` after uvicorn's last tick."""
        self.drained.set()
        await super().shutdown(sockets)
