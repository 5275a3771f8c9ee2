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

TICK_S = 1.0
STEP_TIMEOUT_S = 11.0  # between two beats
LOOP_TIMEOUT_S = 30.0
CPU_TIMEOUT_PER_MEGAPIXEL_S = 15.0  # added per megapixel of the largest job: one layer can take that long

logger = logging.getLogger("glimmer.engine")


class Patience:
    """Counts seconds without a beat in ticks of at most `TICK_S`: none while the process is stopped."""

    def __init__(self) -> None:
        self._beats = self._seen = 0
        self._waited_s = 0.0

    def beat(self) -> None:
        self._beats += 1

    def tick(self, elapsed_s: float) -> None:
        if self._beats != self._seen:
            self._seen, self._waited_s = self._beats, 0.0
        else:
            self._waited_s += min(elapsed_s, TICK_S)

    @property
    def waited_s(self) -> float:
        return self._waited_s if self._beats == self._seen else 0.0


class Watchdog:
    """Detects an engine step that hangs; only the end of the process ends a device call."""

    def __init__(self, running: Callable[[], Sequence[JobSpec]], *, on_cpu: bool):
        self._running, self._on_cpu = running, on_cpu
        self._step, self._loop = Patience(), Patience()
        self._checked_at = time.monotonic()
        self._suspected = False

    def beat(self) -> None:
        """Restart the timeout of the step. Thread-safe."""
        self._step.beat()

    def beat_loop(self) -> None:
        """Restart the timeout of the event loop."""
        self._loop.beat()

    @property
    def is_stuck(self) -> bool:
        timeout = STEP_TIMEOUT_S
        if self._on_cpu:
            timeout += CPU_TIMEOUT_PER_MEGAPIXEL_S * max(map(_pixels, self._running()), default=0) / 1e6
        return self._step.waited_s >= timeout

    @property
    def is_loop_stuck(self) -> bool:
        return self._loop.waited_s >= LOOP_TIMEOUT_S

    def check(self) -> bool:
        """Count the time since the last check; return whether a step is stuck for the second check in a row.

        Call it every `TICK_S`.
        """
        now = time.monotonic()
        self._step.tick(now - self._checked_at)
        self._loop.tick(now - self._checked_at)
        self._checked_at = now
        stuck = self.is_stuck
        confirmed = stuck and self._suspected
        self._suspected = stuck
        return confirmed

    async def give_up(self, queue: JobConsumer, engine_id: str) -> NoReturn:
        """Requeue all jobs, if Redis answers; exit with `EXIT_STUCK`."""
        event(logger, "engine_stuck", logging.CRITICAL, jobs=len(self._running()), seconds=self._step.waited_s)
        with exit_within(HAND_BACK_S), suppress(Exception):
            await queue.requeue_all(engine_id)
        os._exit(EXIT_STUCK)


@contextmanager
def exit_within(seconds: float) -> Iterator[None]:
    """End the process with `EXIT_STUCK` if the block takes longer, not counting time in which it is stopped."""
    over = threading.Event()
    threading.Thread(target=_exit_after, args=(seconds, over), daemon=True).start()
    try:
        yield
    finally:
        over.set()


def end_process(reason: str) -> NoReturn:
    """Exit with `EXIT_STUCK`; the jobs' leases lapse."""
    event(logger, "engine_stuck", logging.CRITICAL, reason=reason)
    os._exit(EXIT_STUCK)


def _exit_after(seconds: float, over: threading.Event) -> None:
    while seconds > 0:
        if over.wait(min(seconds, TICK_S)):
            return
        seconds -= TICK_S
    end_process("it does not end")


def _pixels(spec: JobSpec) -> int:
    """Return the pixels of an image, its sources, and as many patches as text tokens.

    Images of a job and jobs of a batch are not summed: beats come between their layers.
    """
    text_tokens = sum(min(len(text.encode()), MAX_TOKENS) for text in (spec.prompt, spec.negative_prompt))
    return spec.width * spec.height + spec.source_tokens * CELL**2 + text_tokens * PATCH**2
