"""Batch sizes that memory allows."""

RECOVERY_BATCHES = 1000


class BatchLimit:
    """A limit that is halved when a batch runs out of memory.

    It doubles after `RECOVERY_BATCHES` batches: a lasting shortage costs one failed batch in a thousand, a passing one
    no lasting speed.

    Args:
        maximum: in the caller's unit (sequences or tokens).
    """

    def __init__(self, maximum: int):
        self.maximum = self.current = maximum
        self._batches = 0  # since it changed

    def take(self) -> int:
        """Return the limit for the next batch."""
        if self.current < self.maximum:
            self._batches += 1
            if self._batches > RECOVERY_BATCHES:
                self.current, self._batches = min(self.maximum, 2 * self.current), 0
        return self.current

    def ran_out(self, used: int) -> None:
        """Lower the limit: this many were too many."""
        self.current, self._batches = max(1, min(self.current, used) // 2), 0
