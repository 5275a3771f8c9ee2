"""Counting requests in progress, and refusing further ones while the server drains."""

from collections.abc import Iterator
from contextlib import contextmanager

from server.errors import DRAINING_RETRY_S, unavailable


class Gate:
    def __init__(self) -> None:
        self.closed = False
        self.inside = 0

    def close(self) -> None:
        """Refuse further requests."""
        self.closed = True

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Count a request; raise a 503 if the gate is closed."""
        if self.closed:
            raise unavailable("This server is shutting down; try again.", DRAINING_RETRY_S)
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1
