"""Places for expensive work, shared fairly among callers."""

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress


class Turns:
    """Callers wait in a line each; the lines take turns at free places.

    Args:
        per_caller: fewer than `places`, so that one caller cannot fill them.
    """

    def __init__(self, places: int, per_caller: int) -> None:
        self._free, self._per_caller = places, per_caller
        self._taken: Counter[str] = Counter()
        self._lines: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()  # the next turn first

    @asynccontextmanager
    async def take(self, owner: str) -> AsyncIterator[None]:
        """Wait for a place and keep it inside the block."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._lines.setdefault(owner, deque()).append(turn)
        self._hand_out()
        try:
            await turn
        except asyncio.CancelledError:
            self._leave(owner, turn)
            raise
        try:
            yield
        finally:
            self._give_back(owner)

    def _hand_out(self) -> None:
        while self._free and (owner := self._next_owner()) is not None:
            line = self._lines.pop(owner)
            turn = line.popleft()
            if line:
                self._lines[owner] = line  # last: the others are next
            if not turn.done():  # its caller is leaving
                turn.set_result(None)
                self._free -= 1
                self._taken[owner] += 1

    def _next_owner(self) -> str | None:
        return next((owner for owner in self._lines if self._taken[owner] < self._per_caller), None)

    def _leave(self, owner: str, turn: "asyncio.Future[None]") -> None:
        if not turn.cancelled():  # the turn came as its caller left
            self._give_back(owner)
            return
        with suppress(KeyError, ValueError):  # `_hand_out` has passed over it
            self._lines[owner].remove(turn)
            if not self._lines[owner]:
                del self._lines[owner]

    def _give_back(self, owner: str) -> None:
        self._free += 1
        self._taken[owner] -= 1
        if not self._taken[owner]:
            del self._taken[owner]
        self._hand_out()
