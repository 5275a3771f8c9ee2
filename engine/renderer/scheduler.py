"""Decides which images advance by a step.

The unit of work is (image, step): every tick the scheduler picks images and each advances by one step, at its own
timestep. Packing more images into a tick pays only until the device is busy; past that, interleaving equal images just
makes all of them late. So a tick is filled up to a token budget, in the order of least remaining work.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from engine.batch_limit import BatchLimit
from engine.moving_average import MovingAverage


class Work(Protocol):
    """What the scheduler needs to know of an image being rendered."""

    @property
    def tokens(self) -> int:
        """Packed tokens of one of its steps."""
        ...

    @property
    def steps_left(self) -> int: ...

    @property
    def deadline_at(self) -> float:
        """`time.monotonic()` seconds, infinite if there is none."""
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
    """Shortest remaining work first, with ageing; an image about to miss its deadline goes before the others.

    Args:
        token_budget: packed tokens of a tick, at most; one image always goes, however large.
    """

    def __init__(self, token_budget: int):
        self.budget = BatchLimit(token_budget)
        self._entries: list[_Entry[W]] = []
        self._seconds_per_token = MovingAverage()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[W]:
        return (entry.work for entry in self._entries)

    @property
    def seconds_left(self) -> float:
        """How long what is here will take, at the speed of the last ticks."""
        return sum(entry.remaining for entry in self._entries) * (self._seconds_per_token.value or 0.0)

    def add(self, work: W) -> None:
        self._entries.append(_Entry(work))

    def remove(self, work: W) -> None:
        self._entries = [entry for entry in self._entries if entry.work is not work]

    def pick(self, now: float | None = None) -> list[W]:
        """The images of the next tick. Every image waits a bounded number of ticks: each tick it is passed over takes
        a whole budget off the work it is judged by."""
        if not self._entries:
            return []
        moment, budget = time.monotonic() if now is None else now, self.budget.take()
        picked: list[_Entry[W]] = []
        tokens = 0
        for entry in sorted(self._entries, key=lambda entry: self._rank(entry, moment)):
            if not picked or tokens + entry.work.tokens <= budget:
                picked.append(entry)
                tokens += entry.work.tokens
        for entry in self._entries:
            entry.waited = 0 if entry in picked else entry.waited + 1
        return [entry.work for entry in picked]

    def observe(self, tokens: int, seconds: float) -> None:
        """A tick of so many tokens took so long: what deadlines are judged by."""
        self._seconds_per_token.add(seconds / tokens)

    def _rank(self, entry: _Entry[W], now: float) -> tuple[bool, float]:
        needed = entry.remaining * (self._seconds_per_token.value or 0.0)
        slack = entry.work.deadline_at - now - needed
        if slack < needed:  # as urgent as it is long: it must run at least every other tick from now on
            return False, entry.work.deadline_at
        return True, entry.remaining - entry.waited * self.budget.current
