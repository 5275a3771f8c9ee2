import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NoReturn

from engine.config import EXIT_STUCK, HAND_BACK_S
from engine.geometry import CELL, PATCH
from engine.jobs.consumer import JobConsumer
from engine.jobs.job import JobSpec
from engine.observability.logs import event
from engine.quotes import MAX_TOKENS

STEP_TIMEOUT_S = 11.0  # between two beats
CPU_TIMEOUT_PER_MEGAPIXEL_S = 15.0  # added per megapixel of the largest job: one layer can take that long

logger = logging.getLogger("glimmer.engine")


class Watchdog:
    """Detects an engine step that hangs; a thread in a device call can only be ended with its process."""

    def __init__(self, running: Callable[[], Sequence[JobSpec]], *, on_cpu: bool):
        self._running, self._on_cpu = running, on_cpu
        self._beat_at = time.monotonic()
        self._suspected: float | None = None  # the beat after which nothing came

    def beat(self) -> None:
        """Restart the timeout. Thread-safe."""
        self._beat_at = time.monotonic()

    @property
    def is_stuck(self) -> bool:
        timeout = STEP_TIMEOUT_S
        if self._on_cpu:
            timeout += CPU_TIMEOUT_PER_MEGAPIXEL_S * max(map(_pixels, self._running()), default=0) / 1e6
        return time.monotonic() - self._beat_at > timeout

    def check(self) -> bool:
        """Return whether a step is stuck for the second check in a row: one stopped by SIGSTOP ends in between."""
        beat_at = self._beat_at
        stuck = self.is_stuck
        confirmed = stuck and beat_at == self._suspected
        self._suspected = beat_at if stuck else None
        return confirmed

    async def give_up(self, queue: JobConsumer, engine_id: str) -> NoReturn:
        """Requeue all jobs, if Redis answers; exit with `EXIT_STUCK`."""
        seconds = time.monotonic() - self._beat_at
        event(logger, "engine_stuck", logging.CRITICAL, jobs=len(self._running()), seconds=seconds)
        with exit_within(HAND_BACK_S), suppress(Exception):
            await queue.requeue_all(engine_id)
        os._exit(EXIT_STUCK)


@contextmanager
def exit_within(seconds: float) -> Iterator[None]:
    """End the process with `EXIT_STUCK` if the block takes longer."""
    timer = threading.Timer(seconds, _exit)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _exit() -> None:
    event(logger, "engine_stuck", logging.CRITICAL, while_ending=True)
    os._exit(EXIT_STUCK)


def _pixels(spec: JobSpec) -> int:
    """Return the pixels of an image and its sources, and the area of as many patches as text tokens.

    Images of a job and jobs of a batch are not summed: beats come between their layers.
    """
    text_tokens = sum(min(len(text.encode()), MAX_TOKENS) for text in (spec.prompt, spec.negative_prompt))
    return spec.width * spec.height + spec.source_tokens * CELL**2 + text_tokens * PATCH**2
