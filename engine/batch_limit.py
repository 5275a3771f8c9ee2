"""How much goes into a batch, while there is memory for it."""

RECOVERY_BATCHES = 1000


class BatchLimit:
    """A limit on a batch that comes down when a batch runs out of memory.

    It is halved then, and doubled again after every `RECOVERY_BATCHES` batches without that, up to where it was. So
    memory that is short for good costs one failed batch in a thousand, and memory that was short once, for instance
    because another process had it, does not cost speed for ever.

    Args:
        most: in whatever a batch is measured by.
    """

    def __init__(self, most: int):
        self.most = self.now = most
        self._batches = 0  # since it changed

    def take(self) -> int:
        """The limit for a batch that is about to be made."""
        if self.now < self.most:
            self._batches += 1
            if self._batches > RECOVERY_BATCHES:
                self.now, self._batches = min(self.most, 2 * self.now), 0
        return self.now

    def ran_out(self, used: int) -> None:
        """A batch of so much was more than memory holds."""
        self.now, self._batches = max(1, min(self.now, used) // 2), 0
