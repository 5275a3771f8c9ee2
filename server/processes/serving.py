"""Running the app under uvicorn, with a drain: the port stays open and says 503 while what runs is finished."""

import asyncio
import math
import os
import socket
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from server.admission.gate import Gate

# Longer than clients and proxies (httpx 5 s, nginx and cloud balancers 60 s) keep an idle connection. Whoever closes
# first must be the one that sends, or a request is lost on a connection that is just being closed.
KEEP_ALIVE_S = 75
LAST_BYTES_S = 5  # for answers that are still on their way to slow clients when the drain is over


class StartError(Exception):
    """The server cannot start as it was told to; the message is for whoever told it."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, so that a taken port is found before anything else is started.

    Raises:
        StartError: the address is taken or not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
        # Connections inherit it. Without it the kernel holds a small body back until the client has acknowledged the
        # headers, 40 ms later; asyncio sets it on sockets of its own only.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise StartError(f"cannot listen on {host}:{port} ({reason}); choose another --host or --port") from None


def url_of(listener: socket.socket) -> str:
    """The URL of a listening socket, with the port it got."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class DrainingServer(uvicorn.Server):
    """A uvicorn server whose first SIGTERM or SIGINT closes the gate, and whose second one ends it at once.

    `drained` is set when the requests that were let in are done or the grace period is over; what is left to do then is
    to send the last bytes.
    """

    def __init__(self, app: FastAPI, grace_s: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=LAST_BYTES_S,
                timeout_keep_alive=KEEP_ALIVE_S,
            )
        )
        self._gate: Gate = app.state.gate
        self._grace_s = grace_s
        self._drain_ends = math.inf
        self.drained = asyncio.Event()

    @property
    def grace_left_s(self) -> float:
        """What is left of the grace period, in seconds: all of it before the drain, nothing after a second signal."""
        if self.force_exit:
            return 0.0
        return max(0.0, min(self._grace_s, self._drain_ends - time.monotonic()))

    def drain(self) -> None:
        """Lets no further request in, and exits when those inside are done or the grace period is over."""
        self._gate.close()
        self._drain_ends = time.monotonic() + self._grace_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """uvicorn's signal handler. The signal is not raised again at the end: our callers still have to clean up."""
        if self._gate.closed:
            self.should_exit = self.force_exit = True
        else:
            self.drain()

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second; True ends the server."""
        if self._gate.closed and (self._gate.inside == 0 or time.monotonic() > self._drain_ends):
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn between its last tick and the end of `serve`."""
        self.drained.set()
        await super().shutdown(sockets)
