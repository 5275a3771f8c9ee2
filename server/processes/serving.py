import asyncio
import errno
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import cast

import uvicorn
from fastapi import FastAPI

from engine.errors import StartError
from engine.observability.logs import event, where
from engine.stop_signals import StopSignals
from server.addresses import authority
from server.admission.gate import Gate
from server.processes.allocator import IdleMemory, return_large_allocations
from server.processes.http_limits import HttpLimits, raise_file_limit, share_files
from server.processes.http_protocol import http_protocol

# Longer than clients keep idle connections (httpx 5 s, nginx and cloud balancers 60 s): a request sent as the server
# closes one is lost.
KEEP_ALIVE_S = 75
LAST_BYTES_S = 5  # for slow clients when the drain ends
CANCEL_S = 1.0  # for cancelled requests, whose jobs are discarded
CLOSE_S = 5.0  # for the last calls to Redis
UNSENT_BYTES = 128 * 1024  # of a connection, in the kernel, beyond what is in flight
_TRIM_TICKS = 50  # of 0.1 s
_TICK_S = 0.05
_OTHER_ADDRESS = "choose another --host or --port"

logger = logging.getLogger("glimmer.serve")


def describe(error: Exception) -> str:
    """Return an unexpected error on one line."""
    return " ".join(f"{type(error).__name__}: {error}".splitlines()).removesuffix(": ")


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket, for IPv4 and IPv6 at `::`; raise `StartError` if the address cannot be used."""
    host = host.removeprefix("[").removesuffix("]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = family == socket.AF_INET6 and not host.strip("0:") and socket.has_dualstack_ipv6()
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048, dualstack_ipv6=both)
        # Inherited by connections: else a small body waits 40 ms for the acknowledgement of the headers. asyncio sets
        # it only on its own sockets.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Ethernet's: with a local client's segments of 64 KiB, kernels take 4 MB more than is read.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1460)
        # What a client does not read stays here, where it is counted, and not in up to 4 MB of the kernel's.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        return listener
    except (OSError, ValueError, TypeError, OverflowError) as error:  # a name that cannot be encoded
        number = error.errno if isinstance(error, OSError) else None
        reason = os.strerror(number) if number and number > 0 else str(error)
        remedy = "raise the limit of open files" if number in (errno.EMFILE, errno.ENFILE) else _OTHER_ADDRESS
        raise StartError(f"cannot listen on {authority(host, port)} ({reason}); {remedy}") from None


def url_of(listener: socket.socket) -> str:
    """Return the URL of a listening socket."""
    return f"http://{authority(*listener.getsockname()[:2])}"


class DrainingServer(uvicorn.Server):
    """The app under uvicorn; `drain` ends it in order, `hurry` at once.

    `drained` is set when requests need no engine any more.

    Args:
        drain_delay_s: how long a draining server accepts requests, at most half of `grace_s`.
    """

    def __init__(self, app: FastAPI, grace_s: float, drain_delay_s: float = 0.0) -> None:
        return_large_allocations()
        connections, backlog = share_files(raise_file_limit())
        super().__init__(
            uvicorn.Config(
                app,
                http=http_protocol(HttpLimits(connections=connections)),
                ws="none",
                backlog=backlog,
                lifespan="off",  # uvicorn would print a traceback and call sys.exit if it raises
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
            )
        )
        self._app, self._gate = app, cast(Gate, app.state.gate)
        self._grace_s, self._delay_s = grace_s, min(drain_delay_s, grace_s / 2)
        self._gate_closes_at = self._drain_ends_at = math.inf
        self._idle_memory = IdleMemory()
        self.drained = asyncio.Event()
        self.on_start: Callable[[], None] = lambda: None

    @property
    def grace_left_s(self) -> float:
        """Return the rest of the grace period, 0 after `hurry`."""
        return max(0.0, min(self._grace_s, self._drain_ends_at - time.monotonic()))

    async def follow(self, stop: StopSignals) -> None:
        """Drain at the first signal, hurry at the second."""
        await stop.draining.wait()
        self.drain(delayed=not stop.interrupted)
        await stop.hurried.wait()
        self.hurry()

    def drain(self, *, delayed: bool = False) -> None:
        """Start the grace period; refuse new requests, if `delayed` after the delay."""
        now = time.monotonic()
        self._gate.draining = True
        self._gate_closes_at = now + (self._delay_s if delayed else 0)
        self._drain_ends_at = now + self._grace_s

    def hurry(self) -> None:
        """Exit without waiting for anything."""
        self._gate.close()
        self._gate_closes_at = self._drain_ends_at = -math.inf
        self.should_exit = self.force_exit = True

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until the drain has ended; raise `StartError` if the app cannot start."""
        resources = AsyncExitStack()
        try:
            await resources.enter_async_context(self._app.router.lifespan_context(self._app))
        except StartError:
            raise
        except Exception as error:
            raise StartError(f"the API cannot start: {describe(error)}") from error
        try:
            await super().serve(sockets)
        finally:
            try:
                async with asyncio.timeout(CLOSE_S):
                    await resources.aclose()
            except Exception as error:  # engines and Redis are still to be stopped
                event(logger, "close_failed", logging.WARNING, error=type(error).__name__, where=where(error))

    @contextmanager
    def capture_signals(self) -> Iterator[None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Leave signals to `StopSignals`."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to serve."""
        await super().startup(sockets)
        self.on_start()

    async def on_tick(self, counter: int) -> bool:
        """Return whether to exit; called every 0.1 s."""
        now = time.monotonic()
        if now >= self._gate_closes_at:
            self._gate.close()
        if self._gate.closed and (now > self._drain_ends_at or not (self._gate.inside or self._has_unsent_bytes())):
            self.should_exit = True
        if counter % _TRIM_TICKS == 0:
            self._idle_memory.give_back()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the listener; cut requests and responses after the last seconds."""
        self._gate.close()
        self.drained.set()
        for listener in (*self.servers, *(sockets or ())):
            listener.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        tasks, connections = self.server_state.tasks, self.server_state.connections
        for _ in range(round(LAST_BYTES_S / _TICK_S)):
            if self.force_exit or not (tasks or connections):
                break
            await asyncio.sleep(_TICK_S)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(list(tasks), timeout=CANCEL_S)
        for connection in list(connections):
            connection.transport.abort()

    def _has_unsent_bytes(self) -> bool:
        return any(connection.transport.get_write_buffer_size() for connection in self.server_state.connections)
