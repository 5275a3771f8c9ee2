import math
import time

from engine.moving_average import MovingAverage

MIN_RETRY_S, MAX_RETRY_S = 1, 60


class Throughput:
    """The average interval between ends of jobs, each at most the job's duration."""

    def __init__(self) -> None:
        self._interval_s = MovingAverage()
        self._last_end = -math.inf

    def record_end(self, duration_s: float) -> None:
        """Record the end of a job that took `duration_s`."""
        now = time.monotonic()
        interval = min(now - self._last_end, duration_s)
        self._last_end = now
        self._interval_s.add(interval)

    def seconds_until_end(self, ahead: int) -> float | None:
        """Estimate when a job behind `ahead` others ends; None before the first end."""
        interval = self._interval_s.value
        return None if interval is None else round(interval * (ahead + 1), 1)

    def retry_after_s(self, queued: int) -> int:
        """Estimate the whole seconds until a tenth of `queued` jobs have ended."""
        interval = 1.0 if self._interval_s.value is None else self._interval_s.value
        return min(MAX_RETRY_S, max(MIN_RETRY_S, math.ceil(interval * max(1, queued // 10))))
