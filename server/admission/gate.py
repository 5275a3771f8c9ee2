"""The gate that closes when the server drains."""

from collections.abc import Iterator
from contextlib import contextmanager

from server.errors import DRAINING_RETRY_S, unavailable


class Gate:
    """Counts the requests being served and, once closed, lets no further one in."""

    def __init__(self) -> None:
        self.closed = False
        self.inside = 0

    def close(self) -> None:
        """Start of the drain; there is no way back."""
        self.closed = True

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Holds a place while a request is served.

        Raises:
            ApiError: 503 when the gate is closed.
        """
        if self.closed:
            raise unavailable("This server is shutting down; try again.", DRAINING_RETRY_S)
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1
