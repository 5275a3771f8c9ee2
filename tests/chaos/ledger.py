"""What the clients received, and when; nothing here was read from Redis."""

import statistics
import time
from collections import Counter, deque
from dataclasses import dataclass, field

from tests.chaos.cases import Case


@dataclass
class Entry:
    """One case of one client. Times are `time.monotonic()` seconds.

    Args:
        job_id: from a 202; the job must not be lost.
        outcome: one of `GOOD`, or what went wrong.
        images: their hashes.
        retries: of the client, by cause.
        disconnected_at: when the client closed the connection on purpose.
    """

    case: Case
    started: float = field(default_factory=time.monotonic)
    job_id: str | None = None
    outcome: str = ""
    images: list[str] = field(default_factory=list)
    retries: Counter[str] = field(default_factory=Counter)
    disconnected_at: float | None = None
    ended: float = 0.0

    @property
    def seconds(self) -> float:
        return self.ended - self.started

    @property
    def failed(self) -> bool:
        """Return whether the outcome is none of `GOOD`."""
        return self.outcome not in GOOD


GOOD = frozenset({"images", "cancelled", "disconnected", "refused"})


class Ledger:
    """All entries."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.refusals: dict[int, list[float]] = {429: [], 503: []}  # seconds of each
        self.in_flight = 0
        self._latest: deque[float] = deque(maxlen=50)

    def open(self, case: Case) -> Entry:
        entry = Entry(case)
        self.entries.append(entry)
        self.in_flight += 1
        return entry

    def close(self, entry: Entry, outcome: str) -> None:
        """Record the outcome of a case."""
        entry.ended, entry.outcome = time.monotonic(), outcome
        self.in_flight -= 1
        if outcome == "images":
            self._latest.append(entry.seconds)
        if outcome == "images" and entry.images != entry.case.expected():
            entry.outcome = "other bytes than those of an undisturbed run"

    @property
    def ended(self) -> int:
        return len(self.entries) - self.in_flight

    def count(self, outcome: str) -> int:
        return sum(entry.outcome == outcome for entry in self.entries)

    @property
    def typical_s(self) -> float:
        """Return a little more than the time recent images took: clients disconnect within it."""
        return 1.2 * statistics.median(self._latest) if self._latest else 1.0

    @property
    def failed(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.failed]

    @property
    def retries(self) -> Counter[str]:
        return sum((entry.retries for entry in self.entries), Counter())

    def latencies(self) -> list[float]:
        """Return the seconds from each request to its images, sorted."""
        return sorted(entry.seconds for entry in self.entries if entry.outcome == "images")


def quantile(values: list[float], share: float) -> float:
    """Return a quantile of sorted values; 0 without values."""
    return values[min(len(values) - 1, int(share * len(values)))] if values else 0.0
