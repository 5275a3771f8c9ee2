"""Server-sent events of requests and jobs.

The status is sent before the first event, so errors are events; pings are comments.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack, aclosing, suppress
from typing import Any

import orjson
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.errors import QueueUnavailable
from engine.jobs.connection import REDIS_OUTAGE_TIMEOUT_S
from engine.jobs.follower import JobFollower
from engine.jobs.job import JobRecord, JobState
from engine.jobs.producer import JobProducer
from engine.jobs.results import StoredPartial
from engine.observability.logs import event, where
from engine.tasks import stop
from server.admission.memory_budget import Hold
from server.admission.throughput import Throughput
from server.errors import ApiError, internal_error, queue_unavailable
from server.responses.disconnect import cancel_on_disconnect
from server.responses.held_image import HeldImage, ResultLost
from server.responses.images import ResponseOptions, ResultImages, common_fields, image_fields, usage
from server.responses.job_wait import JobWait
from server.responses.jobs import render_job
from server.responses.pieces import Mark, Part, report_cut, send_parts, split

PING_INTERVAL_S = 10.0  # proxies close connections silent for a minute, some sooner
PING = b": ping\n\n"

Event = Sequence[Part]

logger = logging.getLogger("glimmer.images")


class EventStream(Response):
    """Sends events, with pings between them, until the last event or a disconnect; then closes `resources`."""

    def __init__(self, events: AsyncGenerator[Event], resources: ExitStack | None = None) -> None:
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}  # nginx would buffer
        super().__init__(headers=headers, media_type="text/event-stream")
        del self.headers["content-length"]
        self._events, self._resources = events, resources or ExitStack()
        self._is_between_events = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._resources:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            with suppress(ClientDisconnect):  # the background task still frees the result
                await cancel_on_disconnect(receive, self._send_all(send))
        if self.background is not None:
            await self.background()

    async def _send_all(self, send: Send) -> None:
        pings = asyncio.create_task(self._ping(send))
        try:
            async with aclosing(self._events) as events:
                async for parts in events:
                    self._is_between_events = False
                    await send_parts(parts, send)
                    self._is_between_events = True
        except Exception as error:
            if not self._is_between_events:
                report_cut(error)
                return
            await send_parts([_error_event(error)], send)
        finally:
            await stop(pings)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _ping(self, send: Send) -> None:
        while True:
            await asyncio.sleep(PING_INTERVAL_S)
            if self._is_between_events:
                await send_parts([PING], send)


def to_event(name: str, data: Sequence[Part]) -> Event:
    """Return one event. JSON from orjson contains no line breaks."""
    return [f"event: {name}\ndata: ".encode(), *data, b"\n\n"]


async def image_events(queue: JobProducer, job_wait: JobWait, held: Hold) -> AsyncGenerator[Event]:
    """Yield the events of a request with `stream: true`."""
    record = await _record(queue, job_wait.job_id)
    prefix = ResponseOptions.from_record(record).event_prefix
    async with aclosing(JobFollower(queue, job_wait.job_id).updates()) as updates:
        async for update in updates:
            if isinstance(update, StoredPartial):
                if (partial := await _partial_image(queue, record, update, held)) is not None:
                    yield to_event(f"{prefix}.partial_image", partial)
            elif not update.state.is_terminal:
                yield [_comment(update)]
            else:
                images = await job_wait.result(update, held)
                for index in range(len(images.parts)):
                    yield to_event(f"{prefix}.completed", _completed(update, images, index))


async def job_events(queue: JobProducer, job_id: str, throughput: Throughput, held: Hold) -> AsyncGenerator[Event]:
    """Yield the events of `GET /v1/jobs/{id}/events`."""
    record = await _record(queue, job_id)
    last_record: JobRecord | None = None
    async with aclosing(JobFollower(queue, job_id).updates()) as updates:
        async for update in updates:
            if isinstance(update, StoredPartial):
                if (partial := await _partial_image(queue, record, update, held)) is not None:
                    yield to_event("partial_image", partial)
                continue
            is_new = last_record is None or (last_record.state, last_record.position) != (update.state, update.position)
            if update.state.is_terminal or is_new:
                job = await render_job(queue, update, throughput, held, patient=True)
                yield to_event(_job_event_name(update.state), job)
            elif update.progress:
                yield to_event("progress", [orjson.dumps(update.progress)])
            last_record = update


def _job_event_name(state: JobState) -> str:
    if not state.is_terminal:
        return "status"
    return "completed" if state is JobState.SUCCEEDED else "failed"


async def _record(queue: JobProducer, job_id: str) -> JobRecord:
    record = await queue.get(job_id, outage_timeout_s=REDIS_OUTAGE_TIMEOUT_S)
    if record is None:
        raise QueueUnavailable(f"Redis has no record of job {job_id}")
    return record


def _error_event(error: Exception) -> bytes:
    """Return an event without a name: with one, the official SDK would not raise the error."""
    if isinstance(error, QueueUnavailable):
        error = queue_unavailable()
    elif not isinstance(error, ApiError):
        event(logger, "stream_failed", logging.ERROR, error=type(error).__name__, where=where(error))
        error = internal_error()
    return b"data: " + orjson.dumps({"error": error.detail}) + b"\n\n"


def _comment(record: JobRecord) -> bytes:
    details = record.progress if record.position is None else {"position": record.position}
    return b": " + record.state.value.encode() + b" " + orjson.dumps(details) + b"\n\n"


def _event_fields(record: JobRecord, kind: str, index: int) -> dict[str, Any]:
    event_type = f"{ResponseOptions.from_record(record).event_prefix}.{kind}"
    image_index = {"image_index": index} if record.spec.n > 1 else {}
    return {"type": event_type, "created_at": int(time.time()), **common_fields(record), **image_index}


async def _partial_image(
    queue: JobProducer, record: JobRecord, partial: StoredPartial, held: Hold
) -> list[Part] | None:
    """Return a `schemas.PartialImageEvent`, None if the image has expired."""
    image = HeldImage(lambda: queue.partial_data(record.id, partial), partial.size, held)
    plan = {"plan": partial.grid} if record.spec.return_plan and partial.grid else {}
    try:
        await image.load(patient=True)
    except ResultLost:
        return None

    def body(mark: Mark) -> dict[str, Any]:
        return {
            **_event_fields(record, "partial_image", partial.image),
            "partial_image_index": partial.index,
            "b64_json": mark(0),
            **plan,
        }

    return split(body, [image])


def _completed(record: JobRecord, images: ResultImages, index: int) -> list[Part]:
    """Return a `schemas.CompletedEvent`."""
    result = images.result
    prompt, sources = (result.prompt_tokens, result.source_tokens) if index == 0 else (0, 0)

    def body(mark: Mark) -> dict[str, Any]:
        return {
            **_event_fields(record, "completed", index),
            **image_fields(record, images, index, mark),
            "usage": usage(prompt, sources, result.plan_tokens // len(result.images)),
        }

    return split(body, images.parts)
