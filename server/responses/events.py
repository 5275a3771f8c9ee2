"""Server-sent events: how they travel, and what a request's stream and a job's stream consist of.

What cannot be known when a stream begins is told within it: an error is an event, and what only shows that something
goes on is a comment.
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
from engine.jobs.job import JobRecord, JobResult, JobState, PartialImage
from engine.jobs.producer import JobProducer
from engine.observability.logs import event, where
from engine.tasks import stop
from server.admission.throughput import Throughput
from server.errors import ApiError, internal_error, queue_unavailable
from server.responses.images import ResponseOptions, common_fields, image_fields, job_body, render_job, usage
from server.responses.job_wait import JobWait, cancel_on_disconnect

PING_EVERY_S = 10.0  # proxies close what stays silent for a minute, some for less
PING = b": ping\n\n"

logger = logging.getLogger("glimmer.images")


class EventStream(StreamingResponse):
    """Sends events as they come, with a comment now and then, until the last one or until the client leaves.

    Args:
        held: what is to be left when the stream is over.
    """

    def __init__(self, events: AsyncGenerator[bytes], held: ExitStack | None = None) -> None:
        # nginx would collect the events otherwise.
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._events, self._held = events, held or ExitStack()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            with suppress(ClientDisconnect):  # what is made by now is let go all the same: nobody will ask for it
                await cancel_on_disconnect(receive, self._send_all(send))
        if self.background is not None:
            await self.background()

    async def _send_all(self, send: Send) -> None:
        pinging = asyncio.create_task(_ping(send))
        try:
            async with aclosing(self._events) as events:
                async for chunk in events:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except Exception as error:  # the status has been sent, so it can only be told in the stream
            await send({"type": "http.response.body", "body": _error_event(error), "more_body": True})
        finally:
            await stop(pinging)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _ping(send: Send) -> None:
    while True:
        await asyncio.sleep(PING_EVERY_S)
        await send({"type": "http.response.body", "body": PING, "more_body": True})


def to_event(name: str | None, data: bytes) -> bytes:
    """One event. JSON made by orjson has no line breaks, so it is one line of data."""
    return (f"event: {name}\n".encode() if name else b"") + b"data: " + data + b"\n\n"


async def image_events(queue: JobProducer, job_wait: JobWait) -> AsyncGenerator[bytes]:
    """The events of a request with `stream: true`, as OpenAI's clients read them."""
    record = await _record(queue, job_wait.job_id)
    async with aclosing(queue.follow(job_wait.job_id)) as happenings:
        async for happened in happenings:
            if isinstance(happened, PartialImage):
                yield to_event(
                    f"{ResponseOptions.of(record).event_type}.partial_image", _partial_image(record, happened)
                )
            elif not happened.state.is_terminal:
                yield _comment(happened)
            else:
                result = await job_wait.result(happened)
                for index in range(len(result.images)):
                    data = await asyncio.to_thread(_completed, happened, result, index)
                    yield to_event(f"{ResponseOptions.of(happened).event_type}.completed", data)


async def job_events(queue: JobProducer, job_id: str, throughput: Throughput) -> AsyncGenerator[bytes]:
    """The events of `GET /v1/jobs/{id}/events`: status, progress, partial_image; at the end completed or failed."""
    record = await _record(queue, job_id)
    told: JobRecord | None = None
    async with aclosing(queue.follow(job_id)) as happenings:
        async for happened in happenings:
            if isinstance(happened, PartialImage):
                yield to_event("partial_image", _partial_image(record, happened))
                continue
            if happened.state.is_terminal:
                name = "completed" if happened.state is JobState.SUCCEEDED else "failed"
                yield to_event(name, await render_job(queue, happened, throughput))
            elif told is None or (told.state, told.position) != (happened.state, happened.position):
                yield to_event("status", orjson.dumps(job_body(happened, None, throughput)))
            elif happened.progress:
                yield to_event("progress", orjson.dumps(happened.progress))
            told = happened


async def _record(queue: JobProducer, job_id: str) -> JobRecord:
    record = await queue.get(job_id, outage_timeout_s=REDIS_OUTAGE_TIMEOUT_S)
    if record is None:
        raise QueueUnavailable(f"Redis has no record of job {job_id}")
    return record


def _error_event(error: Exception) -> bytes:
    """It has no name: with one, the official SDK would not raise it."""
    if isinstance(error, QueueUnavailable):
        error = queue_unavailable()
    elif not isinstance(error, ApiError):
        event(logger, "stream_failed", logging.ERROR, error=type(error).__name__, where=where(error))
        error = internal_error()
    return to_event(None, orjson.dumps({"error": error.detail}))


def _comment(record: JobRecord) -> bytes:
    facts = record.progress if record.position is None else {"position": record.position}
    return b": " + record.state.value.encode() + b" " + orjson.dumps(facts) + b"\n\n"


def _event_fields(record: JobRecord, kind: str, index: int) -> dict[str, Any]:
    several = {"image_index": index} if record.spec.n > 1 else {}
    notes = ResponseOptions.of(record)
    return {"type": f"{notes.event_type}.{kind}", "created_at": int(time.time()), **common_fields(record), **several}


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
    """The usage of all events adds up to that of the request: the first has the prompt, each its own plan."""
    prompt, sources = (result.prompt_tokens, result.source_tokens) if index == 0 else (0, 0)
    fields = {
        **_event_fields(record, "completed", index),
        **image_fields(record, result, index),
        "usage": usage(prompt, sources, result.plan_tokens // len(result.images)),
    }
    return orjson.dumps(fields)
