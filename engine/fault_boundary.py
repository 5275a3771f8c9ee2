"""The boundary between requests: an error in a batch ends only the requests that fail on their own."""

import traceback
from collections.abc import Callable, Container, Iterable
from typing import Protocol, TypeVar

import torch
from prometheus_client import Counter

from engine.device_errors import is_lost_device, is_out_of_memory
from engine.errors import RequestError
from engine.request import Request
from models.errors import PromptError


class Item(Protocol):
    """Anything that belongs to a request."""

    @property
    def request(self) -> Request: ...


T = TypeVar("T", bound=Item)


class FaultBoundary:
    """Runs batches, and each item alone when its batch raises.

    Work passed in must leave its items unchanged when it raises. An error of a lost device is raised again: it is not
    the fault of a request, and ends the process.

    Args:
        device: whose allocator's cache is emptied after running out of memory.
        live: requests that have not ended.
        fail: ends a request with an error, and removes it from `live`.
        out_of_memory: counter by `whose`: a batch, which was split, or a request, which failed.
    """

    def __init__(
        self,
        device: torch.device,
        live: Container[Request],
        fail: Callable[[Request, Exception], None],
        out_of_memory: Counter,
    ):
        self.live = live
        self._device, self._fail, self._out_of_memory = device, fail, out_of_memory

    def run(
        self, items: list[T], work: Callable[[list[T]], object], shrink: Callable[[], object] = lambda: None
    ) -> list[T]:
        """Do `work` on all items at once; if it raises, on each alone, and fail the requests that raise again.

        Args:
            shrink: lowers the limit of later batches; called if the batch ran out of memory but no single item did.

        Returns:
            The items whose work is done.
        """
        if not items:
            return []
        try:
            work(items)
            return items
        except Exception as error:
            if is_lost_device(error):
                raise
            lacks_memory = is_out_of_memory(error)
            if len(items) == 1:
                traceback.clear_frames(error.__traceback__)  # `Failed` keeps the error, which must not keep tensors
                self._fail(items[0].request, _as_request_error(error))
        if lacks_memory:  # after `except`: while the error lived, its frames kept tensors in memory
            self._out_of_memory.labels("request" if len(items) == 1 else "batch").inc()
            self.empty_cache()
        if len(items) == 1:
            return []
        done = self.run_each(items, lambda item: work([item]))
        if lacks_memory and len(done) == len(items):
            shrink()
        return done

    def run_each(self, items: Iterable[T], work: Callable[[T], object]) -> list[T]:
        """Do `work` on each item alone, except those of requests that have ended; return the items done."""
        done: list[T] = []
        for item in items:
            if item.request in self.live:
                done += self.run([item], lambda one: work(one[0]))
        return done

    def empty_cache(self) -> None:
        """Return cached memory to the device, where blocks of other sizes can be allocated from it."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _as_request_error(error: Exception) -> Exception:
    return RequestError(str(error), param="prompt") if isinstance(error, PromptError) else error
