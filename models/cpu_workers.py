"""Threads that each compute with one core: torch's threads wait for the slowest of them at every operation."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from queue import SimpleQueue

import torch

from models.threads import threads

Task = Callable[[], None]
Ends = SimpleQueue[BaseException | None]


class Workers:
    """Runs tasks on the calling thread and `count` - 1 others."""

    def __init__(self, count: int):
        self.count = count
        self._lock = threading.Lock()  # tasks may wait for each other, so that those of two calls must not mix
        self._batches: SimpleQueue[tuple[deque[Task], Ends]] = SimpleQueue()
        for number in range(1, count):
            threading.Thread(target=self._serve, name=f"render-{number}", daemon=True).start()

    def run(self, tasks: Sequence[Task]) -> None:
        """Run all tasks; idle threads take them in order.

        Raises:
            BaseException: of a task that failed, when all threads are idle; the rest may not have run.
        """
        remaining, ends, helpers = deque(tasks), Ends(), min(len(tasks), self.count) - 1
        with self._lock:
            for _ in range(helpers):
                self._batches.put((remaining, ends))
            with threads(1):
                ends.put(self._work(remaining))
            ended = [ends.get() for _ in range(helpers + 1)]
        if errors := [end for end in ended if end]:
            raise min(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError))  # what broke it

    def _serve(self) -> None:
        torch.set_num_threads(1)
        with torch.inference_mode():
            while True:
                remaining, ends = self._batches.get()
                ends.put(self._work(remaining))

    def _work(self, remaining: deque[Task]) -> BaseException | None:
        with suppress(IndexError):
            while True:
                task = remaining.popleft()
                try:
                    task()
                except BaseException as error:  # the caller raises it
                    remaining.clear()
                    return error
        return None


@cache
def workers(count: int) -> Workers:
    """Return the threads, shared by all networks of a process."""
    return Workers(count)
