from dataclasses import dataclass


@dataclass(frozen=True)
class Backoff:
    """Seconds before a restart: `initial`, doubled up to `maximum`; reset after an uptime of `reset_after`."""

    initial: float = 1.0
    maximum: float = 30.0
    reset_after: float = 60.0

    def next_delay(self, last_delay: float, uptime: float) -> float:
        """Return the delay after `last_delay`, which is 0 at first."""
        if uptime >= self.reset_after or not last_delay:
            return self.initial
        return min(2 * last_delay, self.maximum)
