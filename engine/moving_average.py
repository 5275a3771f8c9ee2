"""Smooth durations that vary from one step or job to the next."""


class MovingAverage:
    """Exponential moving average: each new sample weighs 0.1.

    Args:
        value: the average to start from; None takes the first sample as it is.
    """

    def __init__(self, value: float | None = None) -> None:
        self.value = value

    def add(self, sample: float) -> None:
        """Take one sample into the average."""
        self.value = sample if self.value is None else self.value + 0.1 * (sample - self.value)
