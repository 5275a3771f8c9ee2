"""Decides which images advance by a denoising step.

Batching pays only until the device is busy; then interleaving equal images makes all late. So a tick is filled to a
token limit, least remaining work first.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from engine.batch_limit import BatchLimit
from engine.moving_average import MovingAverage


class Work(Protocol):
    """An image being rendered."""

    @property
    def tokens(self) -> int:
        """Return the packed tokens of one step."""
        ...

    @property
    def steps_left(self) -> int: ...

    @property
    def deadline_at(self) -> float:
        """Return monotonic seconds, or infinity."""
        ...


W = TypeVar("W", bound=Work)


@dataclass(eq=False)
class _Entry(Generic[W]):
    work: W
    waited: int = 0  # ticks since it was last picked

    @property
    def remaining(self) -> int:
        return self.work.tokens * self.work.steps_left


class RenderScheduler(Generic[W]):
    """Least remaining work first, with ageing; an image about to miss its deadline goes before.

    Args:
        token_budget: most packed tokens of a tick, though one image always goes.
    """

    def __init__(self, token_budget: int):
        self.token_limit = BatchLimit(token_budget)
        self._entries: list[_Entry[W]] = []
        self._seconds_per_token = MovingAverage()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[W]:
        return (entry.work for entry in self._entries)

    @property
    def seconds_left(self) -> float:
        """Estimate the time until all remaining steps are done."""
        return sum(entry.remaining for entry in self._entries) * (self._seconds_per_token.value or 0.0)

    def add(self, work: W) -> None:
        self._entries.append(_Entry(work))

    def remove(self, work: W) -> None:
        self._entries = [entry for entry in self._entries if entry.work is not work]

    def pick(self, now: float | None = None) -> list[W]:
        """Return the images of the next tick.

        Waits are bounded: every tick takes a whole limit off the rank of those not picked.
        """
        if not self._entries:
            return []
        moment, limit = time.monotonic() if now is None else now, self.token_limit.take()
        picked: list[_Entry[W]] = []
        tokens = 0
        for entry in sorted(self._entries, key=lambda entry: self._rank(entry, moment)):
            if not picked or tokens + entry.work.tokens <= limit:
                picked.append(entry)
                tokens += entry.work.tokens
        for entry in self._entries:
            entry.waited = 0 if entry in picked else entry.waited + 1
        return [entry.work for entry in picked]

    def observe(self, tokens: int, seconds: float) -> None:
        """Record how long a tick took."""
        self._seconds_per_token.add(seconds / tokens)

    def _rank(self, entry: _Entry[W], now: float) -> tuple[bool, float]:
        needed = entry.remaining * (self._seconds_per_token.value or 0.0)
        slack = entry.work.deadline_at - now - needed
        if slack < needed:  # from now on it must run every other tick
            return False, entry.work.deadline_at
        return True, entry.remaining - entry.waited * self.token_limit.current
