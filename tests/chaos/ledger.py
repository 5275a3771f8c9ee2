"""What the clients were told, and when. The other half of the proof: nothing in here was asked of Redis."""

import statistics
import time
from collections import Counter, deque
from dataclasses import dataclass, field

from tests.chaos.cases import Case


@dataclass
class Entry:
    """One case on its way. Times are `time.monotonic()` seconds.

    Args:
        job_id: from a 202: from then on the job may not be lost, whatever happens.
        outcome: images, cancelled, disconnected or refused; or what went wrong, in words.
        images: their hashes.
        retries: answers 429, 503 and refused connections, after which the client tried again.
        disconnected_at: when the connection was closed on purpose.
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
        """Whether the client got neither what it asked for nor what it brought about itself."""
        return self.outcome not in GOOD


GOOD = frozenset({"images", "cancelled", "disconnected", "refused"})


class Ledger:
    """All entries."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.refusals: dict[int, list[float]] = {429: [], 503: []}  # seconds that each took
        self.in_flight = 0
        self._latest: deque[float] = deque(maxlen=50)

    def open(self, case: Case) -> Entry:
        entry = Entry(case)
        self.entries.append(entry)
        self.in_flight += 1
        return entry

    def close(self, entry: Entry, outcome: str) -> None:
        """The case has ended for its client."""
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
        """Return about how long recent images took; clients disconnect within a little more than that."""
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
    """Of sorted values; 0 where there are none."""
    return values[min(len(values) - 1, int(share * len(values)))] if values else 0.0
