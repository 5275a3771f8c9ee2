"""How much goes into a batch, while there is memory for it."""

RECOVERY_BATCHES = 1000


class BatchLimit:
    """A limit on a batch that comes down when a batch runs out of memory.

    It is halved then, and doubled again after every `RECOVERY_BATCHES` batches without that, up to where it was. So
    memory that is short for good costs one failed batch in a thousand, and memory that was short once, for instance
    because another process had it, does not cost speed for ever.

    Args:
        maximum: upper bound of a batch, in the caller's unit (sequences or tokens).
    """

    def __init__(self, maximum: int):
        self.maximum = self.current = maximum
        self._batches = 0  # since it changed

    def take(self) -> int:
        """The limit for a batch that is about to be made."""
        if self.current < self.maximum:
            self._batches += 1
            if self._batches > RECOVERY_BATCHES:
                self.current, self._batches = min(self.maximum, 2 * self.current), 0
        return self.current

    def ran_out(self, used: int) -> None:
        """A batch of so much was more than memory holds."""
        self.current, self._batches = max(1, min(self.current, used) // 2), 0
