import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NoReturn

from engine.config import EXIT_STUCK
from engine.errors import QueueUnavailable
from engine.jobs.consumer import JobConsumer
from engine.jobs.job import JobSpec
from engine.observability.logs import event

STEP_TIMEOUT_S = 11.0  # of one engine step
CPU_TIMEOUT_PER_MEGAPIXEL_S = 15.0  # added per megapixel in flight: a step can take that long

logger = logging.getLogger("glimmer.engine")


class Watchdog:
    """Detects an engine step that hangs; a thread in a device call can only be ended with its process."""

    def __init__(self, running: Callable[[], Sequence[JobSpec]], *, on_cpu: bool):
        self._running, self._on_cpu = running, on_cpu
        self._step_began_at = time.monotonic()
        self._suspected_step: float | None = None  # by its start

    def begin_step(self) -> None:
        """Restart the timeout."""
        self._step_began_at = time.monotonic()

    @property
    def is_stuck(self) -> bool:
        timeout = STEP_TIMEOUT_S
        if self._on_cpu:
            pixels = sum(spec.n * spec.width * spec.height for spec in self._running())
            timeout += CPU_TIMEOUT_PER_MEGAPIXEL_S * pixels / 1e6
        return time.monotonic() - self._step_began_at > timeout

    def check(self) -> bool:
        """Return whether a step is stuck for the second check in a row: one stopped by SIGSTOP ends in between."""
        began_at = self._step_began_at
        stuck = self.is_stuck
        confirmed = stuck and began_at == self._suspected_step
        self._suspected_step = began_at if stuck else None
        return confirmed

    async def give_up(self, queue: JobConsumer, engine_id: str) -> NoReturn:
        """Requeue all jobs; exit with `EXIT_STUCK`."""
        seconds = time.monotonic() - self._step_began_at
        event(logger, "engine_stuck", logging.CRITICAL, jobs=len(self._running()), seconds=seconds)
        with suppress(QueueUnavailable):
            await queue.requeue_all(engine_id)
        os._exit(EXIT_STUCK)
