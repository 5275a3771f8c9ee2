"""How fast jobs end, to tell a refused client when to come back."""

import math
import time

from engine.moving_average import MovingAverage

MIN_RETRY_S, MAX_RETRY_S = 1, 60


class Throughput:
    """How often jobs end, to tell a refused client when to come back.

    An idle hour says nothing about the pace, so the time between two ends counts at most as long as a job took.
    """

    def __init__(self) -> None:
        self._interval_s = MovingAverage()
        self._last_end = -math.inf

    def record_end(self, duration_s: float) -> None:
        now = time.monotonic()
        interval = min(now - self._last_end, duration_s)
        self._last_end = now
        self._interval_s.add(interval)

    def seconds_until_end(self, ahead: int) -> float | None:
        """About how long until a job with `ahead` others before it will have ended; None before any has."""
        interval = self._interval_s.value
        return None if interval is None else round(interval * (ahead + 1), 1)

    def retry_after_s(self, queued: int) -> int:
        """Whole seconds until about a tenth of `queued` jobs, at least one, will have ended."""
        interval = 1.0 if self._interval_s.value is None else self._interval_s.value
        return min(MAX_RETRY_S, max(MIN_RETRY_S, math.ceil(interval * max(1, queued // 10))))
