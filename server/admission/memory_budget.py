"""Bounding the memory of requests and responses in flight in one API process."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from server.admission.keys import Caller
from server.errors import ApiError, unavailable

RETRY_S = 2


class MemoryBudget:
    """Counts bytes, in all and by caller. A caller with a key may hold half of the maximum.

    Without other holds any size is accepted: a larger request is served alone, not refused for ever.
    """

    def __init__(self, maximum: int) -> None:
        self._maximum = maximum
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

    def _resize(self, owner: str, old: int, new: int) -> None:
        if new > old:
            self._check(owner, old, new)
        self.in_use += new - old
        self._by_caller[owner] += new - old
        if not self._by_caller[owner]:
            del self._by_caller[owner]

    def _check(self, owner: str, old: int, new: int) -> None:
        if owner and 0 < self._by_caller[owner] - old > self._maximum // 2 - new:
            raise ApiError(
                429,
                "Requests and responses in flight of this key take all the memory reserved for one key; "
                f"try again in about {RETRY_S} s.",
                type="rate_limit_error",
                code="rate_limit_exceeded",
                headers={"retry-after": str(RETRY_S)},
            )
        if 0 < self.in_use - old > self._maximum - new:
            raise unavailable("Requests in flight take all the memory reserved for them; try again shortly.", RETRY_S)


class Hold:
    """Bytes counted in a budget."""

    def __init__(self, budget: MemoryBudget, caller: Caller) -> None:
        self._budget, self._owner = budget, caller.owner
        self._size = 0

    def resize(self, size: int) -> None:
        """Count `size` bytes; if they do not fit, raise as `MemoryBudget.hold` and keep the count."""
        self._budget._resize(self._owner, self._size, size)
        self._size = size

    def release(self) -> None:
        """Count nothing any more."""
        self.resize(0)
