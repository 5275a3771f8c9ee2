"""Quantiles of measurements."""

from collections.abc import Sequence


def quantile(values: Sequence[float], share: float) -> float:
    """Return the `share` quantile (0..1) of at least one value, by nearest rank."""
    return sorted(values)[round(share * (len(values) - 1))]
