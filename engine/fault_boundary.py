import traceback
from collections.abc import Callable, Container, Iterable
from typing import Protocol, TypeVar

import torch
from prometheus_client import Counter

from engine.device_errors import is_lost_device, is_out_of_memory
from engine.errors import RequestError
from engine.request import Request
from models.errors import PromptError

PROCESS_ENDS = (KeyboardInterrupt, SystemExit)


class Item(Protocol):
    """Part of a request."""

    @property
    def request(self) -> Request: ...


T = TypeVar("T", bound=Item)


class FaultBoundary:
    """Runs a batch and, if that raises, each item alone: only what fails alone ends.

    A lost device ends the process. Work must leave items unchanged when it raises.

    Args:
        live: requests that have not ended.
        fail: ends a request and removes it from `live`.
        beat: called before all work.
    """

    def __init__(
        self,
        device: torch.device,
        live: Container[Request],
        fail: Callable[[Request, Exception], None],
        out_of_memory: Counter,
    ):
        self.live = live
        self.beat: Callable[[], object] = lambda: None
        self._device, self._fail, self._out_of_memory = device, fail, out_of_memory

    def run(
        self, items: list[T], work: Callable[[list[T]], object], shrink: Callable[[], object] = lambda: None
    ) -> list[T]:
        """Do `work` on all items, or else on each alone; return those done.

        Args:
            shrink: called if only the batch ran out of memory.
        """
        if not items:
            return []
        self.beat()
        try:
            work(items)
            return items
        except PROCESS_ENDS:
            raise
        except BaseException as error:  # a panic of the Rust tokenizer is no Exception
            if is_lost_device(error):
                raise
            lacks_memory = is_out_of_memory(error)
            if len(items) == 1:
                traceback.clear_frames(error.__traceback__)  # `Failed` keeps the error, not its tensors
                self._fail(items[0].request, _as_request_error(error))
        if lacks_memory:  # outside `except`, whose frames keep tensors alive
            self._out_of_memory.labels("request" if len(items) == 1 else "batch").inc()
            self.empty_cache()
        if len(items) == 1:
            return []
        done = self.run_each(items, lambda item: work([item]))
        if lacks_memory and len(done) == len(items):
            shrink()
        return done

    def run_each(self, items: Iterable[T], work: Callable[[T], object]) -> list[T]:
        """Do `work` on each item of a live request."""
        done: list[T] = []
        for item in items:
            if item.request in self.live:
                done += self.run([item], lambda one: work(one[0]))
        return done

    def empty_cache(self) -> None:
        """Return cached memory to the device, for other sizes."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _as_request_error(error: BaseException) -> Exception:
    if isinstance(error, PromptError):
        return RequestError(str(error), param="prompt")
    if isinstance(error, Exception):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")
