import logging
from collections.abc import Mapping

from engine.observability.logs import event

logger = logging.getLogger("glimmer.engine")


def log_fallbacks(fallbacks: Mapping[str, str]) -> None:
    """Warn of kernels that torch replaces, and why."""
    for name, reason in fallbacks.items():
        event(logger, "kernel_replaced", logging.WARNING, kernel=name, reason=reason)
