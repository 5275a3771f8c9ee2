"""Stop signals, and an event loop that waits for no thread at its end."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Coroutine
from contextlib import suppress
from types import FrameType
from typing import Any, Self, TypeVar

from engine.tasks import retrieve

T = TypeVar("T")

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_LAST_TASKS_S = 1.0


class Stopped(Exception):
    """A signal came before the process had started."""


class StopSignals:
    """Counts SIGTERM, SIGINT and SIGHUP: the first asks for a drain, the second for a quick end.

    An event loop's own handlers end with it; then a signal would kill the process. Create it in the main thread.
    Signals ignored before, as by `nohup`, stay ignored.
    """

    def __init__(self) -> None:
        self.count = 0
        self.interrupted = False
        """Whether the first signal was SIGINT: somebody waits at a terminal."""
        self.draining, self.hurried = asyncio.Event(), asyncio.Event()
        self._previous: dict[int, Any] = {}
        self._reader, self._writer = os.pipe()
        for end in (self._reader, self._writer):
            os.set_blocking(end, False)

    def install(self) -> Self:
        """Handle signals from now on; before `attach` they are only counted."""
        # Or a signal just before the loop waits would not wake it.
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for sig in _SIGNALS:
            if signal.getsignal(sig) is not signal.SIG_IGN:
                self._previous[sig] = signal.signal(sig, self._count)
        return self

    def attach(self) -> None:
        """Set `draining` and `hurried` in the running event loop."""
        asyncio.get_running_loop().add_reader(self._reader, self._wake)
        self._wake()

    async def unless_stopped(self, work: Awaitable[T]) -> T:
        """Await `work`; raise `Stopped` at the first signal. The work goes on: a thread cannot be ended."""
        task, stop = asyncio.ensure_future(work), asyncio.create_task(self.draining.wait())
        await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if not task.done():
            task.add_done_callback(retrieve)
            raise Stopped
        return task.result()

    def __enter__(self) -> Self:
        return self.install()

    def __exit__(self, *_: object) -> None:
        for sig, handler in self._previous.items():
            signal.signal(sig, handler)
        signal.set_wakeup_fd(-1)
        with suppress(RuntimeError):
            asyncio.get_running_loop().remove_reader(self._reader)
        os.close(self._reader)
        os.close(self._writer)

    def _count(self, sig: int, frame: FrameType | None) -> None:
        if self.count == 0:
            self.interrupted = sig == signal.SIGINT
        self.count += 1

    def _wake(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._reader, 4096)
        asyncio.get_running_loop().call_soon(self._notice)  # after `_count` ran

    def _notice(self) -> None:
        if self.count >= 1:
            self.draining.set()
        if self.count >= 2:
            self.hurried.set()


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` as `asyncio.run`, but wait for no thread: one may hang in a device call."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(main)
    finally:
        if tasks := asyncio.all_tasks(loop):
            for task in tasks:
                task.cancel()
            loop.run_until_complete(asyncio.wait(tasks, timeout=_LAST_TASKS_S))
        asyncio.set_event_loop(None)
        loop.close()
