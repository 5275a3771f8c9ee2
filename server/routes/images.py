"""POST /v1/images/generations: check, admit, wait with the client, answer."""

import asyncio
import contextlib
import logging
import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from starlette.background import BackgroundTask
from starlette.requests import ClientDisconnect

from engine.errors import QueueUnavailable
from engine.jobs.job import JobRecord, JobResult, JobSpec, JobState
from engine.logs import event
from server.admission import in_time
from server.auth import require_key
from server.body import read_json_object
from server.errors import ApiError, internal_error
from server.generation import check, render_answer, to_spec
from server.schemas import ErrorBody, ImagesBody, parse_generation
from server.services import Services, services

LARGE_ANSWER_BYTES = 256 * 1024  # from here on, encoding would hold up the event loop noticeably
RESULT_PATIENCE_S = 30.0  # the pictures are made; a restart of Redis takes some seconds

logger = logging.getLogger("glimmer.images")
router = APIRouter(prefix="/v1/images", tags=["images"], dependencies=[Depends(require_key)])

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": description}
    for status, description in {
        400: "A field is missing, unknown or out of range; `param` names it.",
        401: "The key is missing or wrong.",
        404: "The model is not served here.",
        413: "The body is too large.",
        429: "The queue is full; `Retry-After` says when to come back.",
        500: "The server failed on this request.",
        503: "No engine, no queue, or shutting down; `Retry-After` says when to come back.",
        504: "The request's `timeout` passed.",
    }.items()
}
_BODY = {
    "required": True,
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/GenerationRequest"}}},
}


@router.post("/generations", responses={200: {"model": ImagesBody}, **_ERRORS}, openapi_extra={"requestBody": _BODY})
async def generate(request: Request, app: Annotated[Services, Depends(services)]) -> Response:
    """Makes `n` images from a prompt."""
    with app.gate.enter():
        body = parse_generation(await read_json_object(request, app.settings.max_body_bytes))
        order = check(body, app.settings)
        spec = to_spec(order, await app.engines.one_ready())
        job_id = await app.admission.submit(spec, order.timeout_s, body.priority)
        request.state.job_id = job_id
        result = await _run(request, app, job_id, spec)
        return await _answer(app, job_id, result, spec, order.quality)


async def _run(request: Request, app: Services, job_id: str, spec: JobSpec) -> JobResult:
    """Sees an accepted job to its end.

    Raises:
        ApiError: it ended without a result.
        ClientDisconnect: the client left, and the job is being withdrawn.
    """
    event(
        logger,
        "job_accepted",
        id=request.state.request_id,
        job=job_id,
        n=spec.n,
        size=f"{spec.width}x{spec.height}",
        steps=spec.num_inference_steps,
    )
    started = time.monotonic()
    record, result = await _with_client(request, app, job_id)
    app.admission.pace.ended(time.monotonic() - started)
    app.metrics.jobs.labels(record.state).inc()
    if record.state is not JobState.SUCCEEDED:
        raise _failure(record)
    if result is None:
        event(logger, "result_missing", logging.ERROR, id=request.state.request_id, job=job_id)
        raise internal_error()
    return result


async def _with_client(request: Request, app: Services, job_id: str) -> tuple[JobRecord, JobResult | None]:
    """How the job ended. Nobody waits for a job whose client left, so it is withdrawn then, and also when this request
    itself is cut short."""
    ending = asyncio.ensure_future(_end_of(app, job_id))
    leaving = asyncio.ensure_future(_client_gone(request))
    try:
        await asyncio.wait({ending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if ending.done():
            return ending.result()
        raise ClientDisconnect
    finally:
        finished = ending.done() and not ending.cancelled() and ending.exception() is None
        ending.cancel()
        leaving.cancel()
        if not finished:
            app.withdrawals.start(job_id)


async def _end_of(app: Services, job_id: str) -> tuple[JobRecord, JobResult | None]:
    """The job's last record, and what it left. Rides out a restart of Redis, whenever it comes."""
    record = await app.queue.wait(job_id)
    succeeded = record.state is JobState.SUCCEEDED
    return record, await app.queue.result(job_id, patience_s=RESULT_PATIENCE_S) if succeeded else None


async def _client_gone(request: Request) -> None:
    """Returns when the client has closed its connection; the body has been read, so nothing else can come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _failure(record: JobRecord) -> ApiError:
    """The answer for a job that ended without a result."""
    if record.state is JobState.EXPIRED:
        # The client's own limit passed; an SDK that posts it again by itself would only add to the load.
        return ApiError(
            504,
            "The request did not finish within its timeout.",
            type="server_error",
            code="deadline_exceeded",
            headers={"x-should-retry": "false"},
        )
    if record.state is JobState.CANCELLED:
        return ApiError(409, "The job was cancelled.", code="job_cancelled", headers={"x-should-retry": "false"})
    error = record.error
    if error is None:
        return internal_error()
    status = 400 if error.type == "invalid_request_error" else 500
    return ApiError(status, error.message, type=error.type, code=error.code, param=error.param)


async def _answer(app: Services, job_id: str, result: JobResult, spec: JobSpec, quality: str) -> Response:
    if sum(len(image.data) for image in result.images) > LARGE_ANSWER_BYTES:
        content = await asyncio.to_thread(render_answer, result, spec, quality)
    else:
        content = render_answer(result, spec, quality)
    return Response(content, media_type="application/json", background=BackgroundTask(_let_go, app, job_id))


async def _let_go(app: Services, job_id: str) -> None:
    """Frees the memory that a result takes up in Redis, once it has been sent."""
    with contextlib.suppress(QueueUnavailable):  # then it goes with `result_ttl_s`
        await in_time(app.queue.delivered(job_id))
