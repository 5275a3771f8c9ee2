"""POST /v1/images/generations and /edits."""

import asyncio
import hashlib
import logging
import re
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Annotated

import orjson
from fastapi import APIRouter, Depends, Header, Request, Response
from starlette.background import BackgroundTask

from engine.errors import QueueUnavailable
from engine.observability.logs import bind
from server import openapi
from server.admission.admission import Admitted, Idempotency
from server.admission.auth import require_key
from server.admission.memory_budget import Hold
from server.errors import invalid, queue_unavailable
from server.redis_timeout import with_redis_timeout
from server.requests.body import IncomingBody, ParsedBody, read_generation
from server.requests.uploads import read_edit
from server.requests.validation import validate
from server.responses.disconnect import cancel_on_disconnect
from server.responses.events import EventStream, image_events
from server.responses.images import images_body, share_images
from server.responses.job_wait import JobWait
from server.responses.jobs import render_job
from server.responses.pieces import respond, split
from server.routes.submission import Submission
from server.services import Services, ServicesDep

ReadBody = Callable[[IncomingBody], Awaitable[ParsedBody]]

_IDEMPOTENCY_KEY = re.compile(r"[\x20-\x7e]{1,255}")

logger = logging.getLogger("glimmer.images")


async def _declare_headers(
    prefer: Annotated[
        str | None, Header(description="`respond-async` to get a job at once, and the images from it.")
    ] = None,
    idempotency_key: Annotated[
        str | None,
        Header(
            description="1..255 printable ASCII characters. A request with a key goes on when its client disconnects. "
            "Repeating it with the same key and body returns the first response, as long as results are kept.",
            json_schema_extra={"minLength": 1, "maxLength": 255},
        ),
    ] = None,
) -> None:
    """Declare headers for the OpenAPI document. They are read from the request: `Prefer` may be repeated."""


router = APIRouter(prefix="/v1/images", tags=["images"], dependencies=[Depends(require_key), Depends(_declare_headers)])


@router.post("/generations", responses=openapi.IMAGES, openapi_extra=openapi.GENERATION)
async def generate(request: Request, services: ServicesDep) -> Response:
    """Create `n` images from a prompt."""
    return await _respond(request, services, read_generation, services.settings.max_body_bytes)


@router.post("/edits", responses=openapi.IMAGES, openapi_extra=openapi.EDIT)
async def edit(request: Request, services: ServicesDep) -> Response:
    """Create `n` images from a prompt and 1 to 4 source images."""
    return await _respond(request, services, read_edit, services.settings.max_upload_bytes)


@dataclass(frozen=True)
class _Accepted:
    """What a waiting request keeps; its body and all made from it are freed."""

    job: Admitted
    stream: bool
    is_repeatable: bool


async def _accept(request: Request, services: Services, read_body: ReadBody, max_bytes: int) -> _Accepted:
    """Read, validate and submit a request; until then its body counts in the memory budget."""
    with services.memory.hold(request.state.caller) as held:
        body = await IncomingBody(request, max_bytes, held).read(read_body)
        validated = validate(body.request, services.settings)
        idempotency = await _idempotency(request, body)
        wants_job = _wants_job(request)
        with_partials, waits = body.request.stream or wants_job, idempotency is None and not wants_job
        job = (
            await _find(request, services, idempotency)
            or await Submission(request, services, body, validated, idempotency, with_partials, waits, held).submit()
        )
        return _Accepted(job, body.request.stream, idempotency is not None)


async def _respond(request: Request, services: Services, read_body: ReadBody, max_bytes: int) -> Response:
    with ExitStack() as resources:
        services.gate.require_open()
        accepted = await _accept(request, services, read_body, max_bytes)
        bind(job=accepted.job.job_id)
        job_wait = JobWait(
            services.queue,
            accepted.job,
            detached=accepted.is_repeatable,
            abandoned_jobs=services.abandoned_jobs,
            outcomes=services.outcomes,
        )
        resources.enter_context(job_wait)
        if _wants_job(request):
            response = await _job_response(request, services, accepted.job)
            job_wait.detach()
            return response
        if accepted.is_repeatable:
            resources.enter_context(services.gate.waiting_for(job_wait.job_id))
        free_result = None if job_wait.detached else BackgroundTask(_free_result, services, job_wait.job_id)
        if accepted.stream:
            stream = EventStream(
                image_events(services.queue, job_wait, services.held_for(request)), resources.pop_all()
            )
            stream.background = free_result
            return stream
        answer = _answer(services, job_wait, services.held_for(request), free_result)
        return await cancel_on_disconnect(request.receive, answer)


async def _answer(services: Services, job_wait: JobWait, held: Hold, free_result: BackgroundTask | None) -> Response:
    record, images = await job_wait.end(held)
    images = await share_images(services.queue, record, images, patient=True)
    parts = split(lambda mark: images_body(record, images, mark), images.parts)
    return await respond(parts, held, patient=True, background=free_result)


async def _find(request: Request, services: Services, idempotency: Idempotency | None) -> Admitted | None:
    if idempotency is None:
        return None
    job_id = await services.admission.find_by_idempotency_key(request.state.caller, idempotency)
    return Admitted(job_id, attached=True) if job_id else None


async def _job_response(request: Request, services: Services, job: Admitted) -> Response:
    record = job.record or await with_redis_timeout(services.queue.get(job.job_id))
    if record is None:
        raise queue_unavailable()
    headers = {"location": f"{services.base_url(request)}/v1/jobs/{job.job_id}", "preference-applied": "respond-async"}
    held = services.held_for(request)
    parts = await render_job(services.queue, record, services.admission.throughput, held)
    return await respond(parts, held, patient=False, status_code=202, headers=headers)


async def _free_result(services: Services, job_id: str) -> None:
    with suppress(QueueUnavailable):  # then it expires after `result_ttl_s`
        await with_redis_timeout(services.queue.shorten_ttl(job_id))


def _wants_job(request: Request) -> bool:
    preferences = ",".join(request.headers.getlist("prefer")).split(",")
    return any(preference.partition(";")[0].strip().lower() == "respond-async" for preference in preferences)


async def _idempotency(request: Request, body: ParsedBody) -> Idempotency | None:
    """Return the idempotency key with a fingerprint of the request; raise a 400 if it is not valid."""
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    if not _IDEMPOTENCY_KEY.fullmatch(key):
        raise invalid("Idempotency-Key", "Idempotency-Key takes 1..255 printable ASCII characters.")
    # In a thread: 32 MB of images take tens of milliseconds.
    fingerprint = await asyncio.to_thread(_fingerprint, f"{request.method} {request.url.path}", body)
    return Idempotency(key, fingerprint)


def _fingerprint(route: str, body: ParsedBody) -> str:
    """Hash a request without fields at their default: an API with further fields gets the same hash."""
    fingerprint = hashlib.sha256(f"{route}\n".encode())
    fields = body.request.model_dump(exclude_defaults=True)
    fingerprint.update(orjson.dumps(fields, option=orjson.OPT_SORT_KEYS))
    for file in (*body.images, body.mask or b"") if body.images else ():
        fingerprint.update(hashlib.sha256(file).digest())
    return fingerprint.hexdigest()
