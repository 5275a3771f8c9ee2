class MovingAverage:
    """Exponential moving average in which a new sample weighs 0.1.

    Args:
        value: None is replaced by the first sample.
    """

    def __init__(self, value: float | None = None) -> None:
        self.value = value

    def add(self, sample: float) -> None:
        """Add a sample."""
        self.value = sample if self.value is None else self.value + 0.1 * (sample - self.value)
