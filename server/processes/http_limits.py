"""Limits of connections, and the sweep that enforces them."""

import asyncio
import logging
import resource
from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

from engine.observability.logs import event

MAX_HEAD_BYTES = 64 * 1024  # request line, headers and trailers; chunk extensions between two bytes of a body
MAX_HEADERS = 256  # some 200 bytes each, however short
MAX_URL_BYTES = 8 * 1024
MAX_PIPELINED = 16  # requests, and
MAX_PIPELINED_BYTES = 64 * 1024  # that are kept while the response before them is in progress
HEAD_READ_BYTES, BODY_READ_BYTES = 16 * 1024, 64 * 1024  # at once; what is refused is read no further

MIN_BYTES_PER_S = 1024  # of a body or a response; the slowest mobile networks have ten times as much

MAX_CONNECTIONS = 4096  # about 10 kB each when idle, up to 100 kB with half a head
MAX_BACKLOG = 2048
MAX_UNSENT_BYTES = 64 * 2**20  # of all connections; beyond it the longest unread are closed
_UNLIMITED_FILES = 1 << 16

logger = logging.getLogger("glimmer.http")


@dataclass(frozen=True)
class HttpLimits:
    """Limits of each connection, in seconds, and their number.

    Args:
        head_s: from the connection or the first byte of a head to its end.
        body_s: without progress of a body that the app reads.
        response_s: without progress of a response. A slow client's window opens in steps of up to 64 KiB.
        linger_s: for the rest of a body after its response, and for what follows a refusal.
        connections: above it, those without a request in progress are closed, the longest waiting first; then those
            whose responses have been unread for longest.
        unsent_bytes: of all responses.
        sweep_s: between checks of all connections; cheaper than a timer each.
    """

    head_s: float = 20.0
    body_s: float = 20.0
    response_s: float = 30.0
    linger_s: float = 2.0
    connections: int = MAX_CONNECTIONS
    unsent_bytes: int = MAX_UNSENT_BYTES
    sweep_s: float = 1.0


def raise_file_limit() -> int:
    """Raise the limit of open files as far as allowed; return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(soft, _UNLIMITED_FILES) if hard == resource.RLIM_INFINITY else hard
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (ValueError, OSError):
        return soft
    return wanted


def share_files(files: int) -> tuple[int, int]:
    """Divide a limit of open files into connections and backlog.

    asyncio accepts a whole backlog before any of it can be refused. A quarter is left for Redis.
    """
    return min(MAX_CONNECTIONS, files // 2), min(MAX_BACKLOG, files // 4)


class Connection(Protocol):
    @property
    def unsent_bytes(self) -> int: ...

    def check(self, now: float) -> None: ...

    def evict(self) -> None: ...


class ConnectionTable:
    """All connections of a server: idle ones in order of waiting, and those that do not read in order of that."""

    def __init__(self, limits: HttpLimits) -> None:
        self.limits = limits
        self._open: set[Connection] = set()
        self._waiting: OrderedDict[Connection, None] = OrderedDict()
        self._unread: OrderedDict[Connection, int] = OrderedDict()  # and their unsent bytes
        self._unsent_bytes = 0
        self._evicted = 0
        self._sweeper: asyncio.TimerHandle | None = None

    def add(self, connection: Connection) -> bool:
        """Add a waiting connection; return False to refuse it if all others are busy."""
        self._open.add(connection)
        if self._sweeper is None:
            self._schedule()
        if len(self._open) > self.limits.connections:
            oldest = next(iter(self._waiting or self._unread), None)
            if oldest is None:
                return False
            self._evict(oldest)
        self._waiting[connection] = None
        return True

    def begin(self, connection: Connection) -> None:
        """Note that a request is in progress."""
        self._waiting.pop(connection, None)

    def end(self, connection: Connection) -> None:
        """Note that the last response is complete."""
        if connection in self._open:
            self._waiting[connection] = None

    def unread(self, connection: Connection) -> None:
        """Note that the client does not read what is sent; make room if that is too much."""
        self._count_unsent(connection)
        if self._unsent_bytes <= self.limits.unsent_bytes:
            return
        for other in self._unread:
            self._count_unsent(other)
        allowed = self.limits.unsent_bytes * 7 // 8  # with less room, each connection would count all others
        while self._unsent_bytes > allowed and len(self._unread) > 1:
            self._evict(next(iter(self._unread)))

    def read(self, connection: Connection) -> None:
        """Note that all is sent, or nearly."""
        self._unsent_bytes -= self._unread.pop(connection, 0)

    def _count_unsent(self, connection: Connection) -> None:
        size = connection.unsent_bytes
        self._unsent_bytes += size - self._unread.get(connection, 0)
        self._unread[connection] = size

    def _evict(self, connection: Connection) -> None:
        self.remove(connection)
        self._evicted += 1
        connection.evict()

    def remove(self, connection: Connection) -> None:
        self.read(connection)
        self._waiting.pop(connection, None)
        self._open.discard(connection)

    def _schedule(self) -> None:
        self._sweeper = asyncio.get_running_loop().call_later(self.limits.sweep_s, self._sweep)

    def _sweep(self) -> None:
        now = asyncio.get_running_loop().time()
        for connection in list(self._open):
            connection.check(now)
        if self._evicted:
            event(logger, "connections_evicted", logging.WARNING, count=self._evicted, limit=self.limits.connections)
            self._evicted = 0
        if self._open:
            self._schedule()
        else:
            self._sweeper = None
