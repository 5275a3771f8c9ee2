RECOVERY_BATCHES = 1000


class BatchLimit:
    """A batch size, halved when memory runs out and doubled after `RECOVERY_BATCHES`.

    A lasting shortage costs one failed batch in a thousand, a passing one no speed.
    """

    def __init__(self, maximum: int):
        self.maximum = self.current = maximum
        self._batches = 0  # since the last change

    @property
    def is_lowered(self) -> bool:
        return self.current < self.maximum

    def take(self) -> int:
        """Return the limit for the next batch."""
        if self.is_lowered:
            self._batches += 1
            if self._batches > RECOVERY_BATCHES:
                self.current, self._batches = min(self.maximum, 2 * self.current), 0
        return self.current

    def ran_out(self, used: int) -> None:
        """Lower the limit after a failed batch of size `used`."""
        self.current, self._batches = max(1, min(self.current, used) // 2), 0
