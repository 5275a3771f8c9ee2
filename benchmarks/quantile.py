"""The one way in which the benchmarks read a quantile."""

from collections.abc import Sequence


def quantile(values: Sequence[float], share: float) -> float:
    """The value that so large a share of all is no more than; there is at least one."""
    return sorted(values)[round(share * (len(values) - 1))]
