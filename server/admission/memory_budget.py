"""Memory of requests and responses in flight in one API process."""

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from server.admission.keys import Caller
from server.errors import ApiError, too_many, unavailable

RETRY_S = 2
SMALL_BYTES = 64 * 1024  # a body of this size may use the reserve
RESERVE_BYTES = 16 * 2**20
GIVES_WAY_S = 30.0  # without growing; a body grows in steps of 1 MiB, which take 20 s at 400 kbit/s


class MemoryBudget:
    """Counts bytes, in all and by caller. A caller with a key may hold half of the maximum.

    Without other holds any size is accepted, not refused for ever. What does not fit ends the arriving bodies that have
    not grown for `GIVES_WAY_S`.
    """

    def __init__(self, maximum: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._maximum, self._clock = maximum, clock
        self._reserve = min(RESERVE_BYTES, maximum // 16)
        self._arriving: OrderedDict[Hold, tuple[float, Callable[[], None]]] = OrderedDict()  # by their last growth
        self._by_caller: Counter[str] = Counter()
        self.in_use = 0

    @contextmanager
    def hold(self, caller: Caller, size: int = 0) -> Iterator["Hold"]:
        """Count `size` bytes for `caller` until the context ends.

        Raises:
            ApiError: 429 at the caller's share, 503 at the maximum.
        """
        held = Hold(self, caller)
        held.resize(size)
        try:
            yield held
        finally:
            held.release()

    @contextmanager
    def _arrival(self, held: "Hold", give_way: Callable[[], None]) -> Iterator[None]:
        self._arriving[held] = self._clock(), give_way
        try:
            yield
        finally:
            self._arriving.pop(held, None)

    def _resize(self, held: "Hold", owner: str, old: int, new: int) -> None:
        if new > old:
            self._make_room(held, owner, old, new)
            if held in self._arriving:
                self._arriving[held] = self._clock(), self._arriving.pop(held)[1]
        self.in_use += new - old
        self._by_caller[owner] += new - old
        if not self._by_caller[owner]:
            del self._by_caller[owner]

    def _make_room(self, held: "Hold", owner: str, old: int, new: int) -> None:
        while True:
            try:
                return self._check(owner, old, new)
            except ApiError as refusal:
                victim = self._slowest(held, owner if refusal.status == 429 else None)
                if victim is None:
                    raise
            _, give_way = self._arriving.pop(victim)
            victim.release()
            give_way()

    def _slowest(self, held: "Hold", owner: str | None) -> "Hold | None":
        """Return the arriving body, of `owner` if given, that has not grown for longest; None if none is slow."""
        latest = self._clock() - GIVES_WAY_S
        for other, (grown_at, _) in self._arriving.items():
            if grown_at > latest:
                break
            if other is not held and owner in (None, other.owner):
                return other
        return None

    def _check(self, owner: str, old: int, new: int) -> None:
        if owner and 0 < self._by_caller[owner] - old > self._maximum // 2 - new:
            raise too_many(
                "Requests and responses in flight of this key take all the memory reserved for one key; "
                f"try again in about {RETRY_S} s.",
                RETRY_S,
            )
        maximum = self._maximum - (self._reserve if new > SMALL_BYTES else 0)
        if 0 < self.in_use - old > maximum - new:
            raise unavailable("Requests in flight take all the memory reserved for them; try again shortly.", RETRY_S)


class Hold:
    """Bytes counted in a budget."""

    def __init__(self, budget: MemoryBudget, caller: Caller) -> None:
        self._budget, self.owner = budget, caller.owner
        self._size = 0

    def resize(self, size: int) -> None:
        """Count `size` bytes; if they do not fit, raise and keep the count."""
        self._budget._resize(self, self.owner, self._size, size)
        self._size = size

    def arriving(self, give_way: Callable[[], None]) -> AbstractContextManager[None]:
        """Let this hold be released, and `give_way` called, while it grows slowly and others need room."""
        return self._budget._arrival(self, give_way)

    def arrived(self) -> None:
        """Give way no more."""
        self._budget._arriving.pop(self, None)

    def release(self) -> None:
        """Count nothing any more."""
        self.resize(0)
