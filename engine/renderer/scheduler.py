"""Which images advance in a tick, when not all fit.

Interleaving equal images makes all late, and least remaining work first makes large ones wait for ever. Here an image
may be overtaken, but only by images that arrive while the renderer does `PATIENCE` times its own work: shorter work
goes first, equals go in the order of their arrival, and every wait is bounded (`python -m benchmarks.render_order`).
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
    def tokens(self) -> int: ...

    @property
    def steps_left(self) -> int: ...

    @property
    def deadline_at(self) -> float:
        """Return monotonic seconds or infinity."""
        ...


W = TypeVar("W", bound=Work)

PATIENCE = 2  # of 1 to 6; above 3 the slowest hundredth of mixed traffic is later than first come, first served


@dataclass(eq=False)
class _Entry(Generic[W]):
    work: W
    arrived: int  # what the renderer had done before, in tokens times steps

    @property
    def remaining(self) -> int:
        return self.work.tokens * self.work.steps_left


class RenderScheduler(Generic[W]):
    """Picks images about to miss their deadline, then by work and arrival.

    Args:
        token_budget: limit of a tick; one image always goes.
    """

    def __init__(self, token_budget: int):
        self.token_limit = BatchLimit(token_budget)
        self._entries: list[_Entry[W]] = []
        self._done = 0  # tokens times steps
        self._seconds_per_token = MovingAverage()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[W]:
        return (entry.work for entry in self._entries)

    @property
    def seconds_left(self) -> float:
        """Estimate the time for all remaining steps."""
        return sum(entry.remaining for entry in self._entries) * (self._seconds_per_token.value or 0.0)

    def add(self, work: W) -> None:
        self._entries.append(_Entry(work, self._done))

    def remove(self, work: W) -> None:
        self._entries = [entry for entry in self._entries if entry.work is not work]

    def pick(self, now: float | None = None) -> list[W]:
        """Return the images of the next tick."""
        if not self._entries:
            return []
        moment, limit = time.monotonic() if now is None else now, self.token_limit.take()
        picked: list[_Entry[W]] = []
        tokens = 0
        for entry in sorted(self._entries, key=lambda entry: self._rank(entry, moment)):
            if not picked or tokens + entry.work.tokens <= limit:
                picked.append(entry)
                tokens += entry.work.tokens
        self._done += tokens
        return [entry.work for entry in picked]

    def observe(self, tokens: int, seconds: float) -> None:
        """Record a tick's duration."""
        self._seconds_per_token.add(seconds / tokens)

    def _rank(self, entry: _Entry[W], now: float) -> tuple[bool, float]:
        needed = entry.remaining * (self._seconds_per_token.value or 0.0)
        slack = entry.work.deadline_at - now - needed
        if slack < needed:  # it must run every other tick
            return False, entry.work.deadline_at
        return True, PATIENCE * entry.remaining + entry.arrived
