"""Server-sent events of requests and jobs.

The status is sent before the first event, so errors are events; pings are comments.
"""

import asyncio
import base64
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing, suppress
from typing import Any

import orjson
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from engine.errors import QueueUnavailable
from engine.jobs.connection import REDIS_OUTAGE_TIMEOUT_S
from engine.jobs.follower import JobFollower
from engine.jobs.job import JobRecord, JobResult, JobState, PartialImage
from engine.jobs.producer import JobProducer
from engine.observability.logs import event, where
from engine.tasks import stop
from server.admission.throughput import Throughput
from server.errors import ApiError, internal_error, queue_unavailable
from server.responses.images import ResponseOptions, common_fields, image_fields, usage
from server.responses.job_wait import JobWait, cancel_on_disconnect
from server.responses.jobs import job_body, render_job

PING_INTERVAL_S = 10.0  # proxies close connections silent for a minute, some sooner
PING = b": ping\n\n"

logger = logging.getLogger("glimmer.images")


class EventStream(StreamingResponse):
    """Sends events and pings until the last event or a disconnect; then closes `resources`."""

    def __init__(self, events: AsyncGenerator[bytes], resources: ExitStack | None = None) -> None:
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}  # nginx would buffer
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._events, self._resources = events, resources or ExitStack()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._resources:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            with suppress(ClientDisconnect):  # the background task still frees the result
                await cancel_on_disconnect(receive, self._send_all(send))
        if self.background is not None:
            await self.background()

    async def _send_all(self, send: Send) -> None:
        pings = asyncio.create_task(_ping(send))
        try:
            async with aclosing(self._events) as events:
                async for chunk in events:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except Exception as error:
            await send({"type": "http.response.body", "body": _error_event(error), "more_body": True})
        finally:
            await stop(pings)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _ping(send: Send) -> None:
    while True:
        await asyncio.sleep(PING_INTERVAL_S)
        await send({"type": "http.response.body", "body": PING, "more_body": True})


def to_event(name: str | None, data: bytes) -> bytes:
    """Return one event. JSON from orjson contains no line breaks."""
    return (f"event: {name}\n".encode() if name else b"") + b"data: " + data + b"\n\n"


async def image_events(queue: JobProducer, job_wait: JobWait) -> AsyncGenerator[bytes]:
    """Yield the events of a request with `stream: true`."""
    record = await _record(queue, job_wait.job_id)
    prefix = ResponseOptions.from_record(record).event_prefix
    async with aclosing(JobFollower(queue, job_wait.job_id).updates()) as updates:
        async for update in updates:
            if isinstance(update, PartialImage):
                yield to_event(f"{prefix}.partial_image", _partial_image(record, update))
            elif not update.state.is_terminal:
                yield _comment(update)
            else:
                result = await job_wait.result(update)
                for index in range(len(result.images)):
                    data = await asyncio.to_thread(_completed, update, result, index)
                    yield to_event(f"{prefix}.completed", data)


async def job_events(queue: JobProducer, job_id: str, throughput: Throughput) -> AsyncGenerator[bytes]:
    """Yield the events of `GET /v1/jobs/{id}/events`."""
    record = await _record(queue, job_id)
    last_record: JobRecord | None = None
    async with aclosing(JobFollower(queue, job_id).updates()) as updates:
        async for update in updates:
            if isinstance(update, PartialImage):
                yield to_event("partial_image", _partial_image(record, update))
                continue
            if update.state.is_terminal:
                name = "completed" if update.state is JobState.SUCCEEDED else "failed"
                yield to_event(name, await render_job(queue, update, throughput))
            elif last_record is None or (last_record.state, last_record.position) != (update.state, update.position):
                yield to_event("status", orjson.dumps(job_body(update, None, throughput)))
            elif update.progress:
                yield to_event("progress", orjson.dumps(update.progress))
            last_record = update


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
    return to_event(None, orjson.dumps({"error": error.detail}))


def _comment(record: JobRecord) -> bytes:
    details = record.progress if record.position is None else {"position": record.position}
    return b": " + record.state.value.encode() + b" " + orjson.dumps(details) + b"\n\n"


def _event_fields(record: JobRecord, kind: str, index: int) -> dict[str, Any]:
    event_type = f"{ResponseOptions.from_record(record).event_prefix}.{kind}"
    image_index = {"image_index": index} if record.spec.n > 1 else {}
    return {"type": event_type, "created_at": int(time.time()), **common_fields(record), **image_index}


def _partial_image(record: JobRecord, partial: PartialImage) -> bytes:
    plan = {"plan": partial.grid} if record.spec.return_plan and partial.grid else {}
    return orjson.dumps(
        {
            **_event_fields(record, "partial_image", partial.image),
            "partial_image_index": partial.index,
            "b64_json": base64.b64encode(partial.data).decode(),
            **plan,
        }
    )


def _completed(record: JobRecord, result: JobResult, index: int) -> bytes:
    """Return a `schemas.CompletedEvent`."""
    prompt, sources = (result.prompt_tokens, result.source_tokens) if index == 0 else (0, 0)
    fields = {
        **_event_fields(record, "completed", index),
        **image_fields(record, result, index),
        "usage": usage(prompt, sources, result.plan_tokens // len(result.images)),
    }
    return orjson.dumps(fields)
