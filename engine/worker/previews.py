import asyncio
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from engine.engine import Engine
from engine.errors import QueueUnavailable
from engine.jobs.consumer import JobConsumer
from engine.jobs.job import PreviewOffer
from engine.observability.logs import event, where
from engine.request import Event, Failed, Finished, Partial, Request
from engine.worker.encoding import encode_partial

POLL_INTERVAL_S = 0.5  # while the engine must take none

logger = logging.getLogger("glimmer.engine")


class PreviewRunner:
    """Renders previews of jobs that other engines plan, one at a time, beside the jobs of this one.

    Args:
        may_take: whether the engine may take one now.
        taking: held while a preview or a job is taken.
    """

    def __init__(
        self,
        engine: Engine,
        queue: JobConsumer,
        *,
        may_take: Callable[[], bool],
        taking: asyncio.Lock,
        stopping: threading.Event,
        wake_engine: Callable[[], None],
    ):
        self._engine, self._queue, self._may_take, self._taking = engine, queue, may_take, taking
        self._stopping, self._wake_engine = stopping, wake_engine
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self.request: Request | None = None  # in progress

    async def run(self) -> None:
        """Work until `stopping` or cancelled."""
        while not self._stopping.is_set():
            try:
                if not self._may_take():
                    await asyncio.sleep(POLL_INTERVAL_S)
                elif (offer := await self._take()) is None:
                    await self._queue.wait_for_preview()
                else:
                    await self._render(offer)
            except QueueUnavailable:
                await asyncio.sleep(POLL_INTERVAL_S)
            except Exception as error:  # a lost preview is rendered with its image
                event(logger, "preview_lost", logging.WARNING, error=type(error).__name__, where=where(error))

    def dispatch(self, engine_event: Event) -> None:
        """Take an event of the engine if it is of the preview."""
        if engine_event.request is self.request:
            self._events.put_nowait(engine_event)

    async def _take(self) -> PreviewOffer | None:
        async with self._taking:
            if not self._may_take() or (offer := await self._queue.take_preview()) is None:
                return None
            spec = replace(offer.spec, n=1, seed=offer.spec.seed + offer.image, plan=None, partial_images=1)
            self.request = Request(
                f"preview {offer.image} of {offer.job_id}/{offer.epoch}",
                spec,
                time.monotonic() + offer.seconds_left,
                preview=offer.grid,
            )
        return offer

    async def _render(self, offer: PreviewOffer) -> None:
        request, self._events = self.request, asyncio.Queue()
        assert request is not None
        try:
            self._engine.submit(request)
            self._wake_engine()
            while True:
                match await self._events.get():
                    case Partial() as partial:
                        encoded = await asyncio.to_thread(encode_partial, partial)
                        with suppress(QueueUnavailable):
                            await self._queue.preview_image(offer, replace(encoded, image=offer.image))
                    case Failed(error=error):
                        raise error
                    case Finished():
                        return
        finally:
            self._engine.cancel(request.id)
            self.request = None
