import asyncio
import fcntl
import struct
import termios

from server.processes.http_limits import MIN_BYTES_PER_S, HttpLimits


class Pace:
    """Late after `stall_s` without progress, or with less than `MIN_BYTES_PER_S` for as long."""

    def __init__(self, stall_s: float) -> None:
        self._stall_s, self._late_at = stall_s, 0.0

    def start(self, now: float) -> None:
        self._late_at = now + self._stall_s

    def progress(self, now: float, size: int) -> None:
        self._late_at = min(self._late_at + size / MIN_BYTES_PER_S, now + self._stall_s)

    def is_late(self, now: float) -> bool:
        return now > self._late_at


class Transfers:
    """The progress of one connection's transfers.

    Attributes:
        body: of the request in progress.
        written: bytes of responses.
    """

    def __init__(self, limits: HttpLimits, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.written = 0
        self._body, self._response = Pace(limits.body_s), Pace(limits.response_s)
        self._taken: int | None = None  # by the client until the last look

    def expect_body(self) -> None:
        """Start to count: the app wants the body."""
        self._body.start(self._loop.time())

    def body_arrived(self, size: int) -> None:
        self._body.progress(self._loop.time(), size)

    def is_body_late(self, now: float) -> bool:
        return self._body.is_late(now)

    def is_response_late(self, now: float, transport: asyncio.Transport) -> bool:
        """Return whether the client stalls; called regularly."""
        unsent = transport.get_write_buffer_size()
        if not unsent:
            self._taken = None
            return False
        taken = self.written - unsent - _unacknowledged(transport)
        if self._taken is None:
            self._response.start(now)
            self._taken = taken
        elif taken > self._taken:  # less, while the kernel takes more from the transport
            self._response.progress(now, taken - self._taken)
            self._taken = taken
        return self._response.is_late(now)


def _unacknowledged(transport: asyncio.Transport) -> int:
    """Return the bytes in the kernel that the client has not acknowledged, 0 if unknown.

    The kernel takes more of a transport only when a third of its buffer, up to a megabyte, is free.
    """
    try:
        fd = transport.get_extra_info("socket").fileno()
        return struct.unpack("i", fcntl.ioctl(fd, termios.TIOCOUTQ, bytes(4)))[0]
    except (OSError, ValueError, AttributeError):
        return 0
