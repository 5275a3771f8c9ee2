"""POST /v1/images/generations and /edits."""

import hashlib
import logging
import re
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Annotated

import orjson
from fastapi import APIRouter, Depends, Header, Request, Response
from starlette.background import BackgroundTask

from engine.errors import QueueUnavailable
from engine.jobs.job import JobSpec
from engine.observability.logs import bind, event
from server import openapi
from server.admission.admission import Admitted, Idempotency
from server.admission.auth import require_key
from server.errors import invalid, queue_unavailable
from server.redis_timeout import with_redis_timeout
from server.requests.body import IncomingBody, ParsedBody, read_generation
from server.requests.edit_input import EditFiles, EditInput
from server.requests.schemas import GenerationRequest
from server.requests.uploads import read_edit
from server.requests.validation import ValidatedRequest, to_job_spec, validate
from server.responses.events import EventStream, image_events
from server.responses.images import ResponseOptions, new_file_tokens, render_response
from server.responses.job_wait import JobWait, cancel_on_disconnect
from server.responses.jobs import render_job
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
    """What a request needs of itself while it waits: the body and all made from it are freed."""

    job: Admitted
    stream: bool
    is_repeatable: bool


async def _accept(request: Request, services: Services, read_body: ReadBody, max_bytes: int) -> _Accepted:
    """Read, validate and submit a request. Its body counts in the memory budget until then."""
    with services.memory.hold(request.state.caller) as held:
        body = await IncomingBody(request, max_bytes, held).read(read_body)
        validated = validate(body.request, services.settings)
        idempotency = _idempotency(request, body)
        with_partials = body.request.stream or _wants_job(request)
        job = await _find(request, services, idempotency) or await _submit(
            request, services, body, validated, idempotency, with_partials=with_partials
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
            response = await _job_response(request, services, job_wait.job_id)
            job_wait.detach()
            return response
        if accepted.is_repeatable:
            resources.enter_context(services.gate.waiting_for(job_wait.job_id))
        free_result = None if job_wait.detached else BackgroundTask(_free_result, services, job_wait.job_id)
        if accepted.stream:
            stream = EventStream(image_events(services.queue, job_wait), resources.pop_all())
            stream.background = free_result
            return stream
        record, result = await cancel_on_disconnect(request.receive, job_wait.end())
        content = await render_response(services.queue, record, result)
        return Response(content, media_type="application/json", background=free_result)


async def _find(request: Request, services: Services, idempotency: Idempotency | None) -> Admitted | None:
    if idempotency is None:
        return None
    job_id = await services.admission.find_by_idempotency_key(request.state.caller, idempotency)
    return Admitted(job_id, attached=True) if job_id else None


async def _submit(
    request: Request,
    services: Services,
    body: ParsedBody,
    validated: ValidatedRequest,
    idempotency: Idempotency | None,
    *,
    with_partials: bool,
) -> Admitted:
    engine = await services.engines.require_ready()
    edit = await _prepare_edit(request, services, body, validated) if body.images else None
    spec = to_job_spec(validated, engine, edit, with_partials=with_partials)
    charge = await services.admission.charge(request.state.caller, spec)
    request.state.response_headers = charge.headers
    revised_prompt = await _rewrite(services, body.request, is_edit=edit is not None)
    options = ResponseOptions(
        operation="edit" if edit else "generation",
        quality=validated.quality,
        response_format=validated.response_format,
        base_url=base_url(request, services),
        revised_prompt=revised_prompt,
        file_tokens=new_file_tokens(spec.n) if validated.response_format == "url" else [],
    )
    job = await services.admission.submit(
        spec if revised_prompt is None else replace(spec, prompt=revised_prompt),
        validated.timeout_s,
        body.request.priority,
        charge,
        source_images=edit.source_images if edit else None,
        notes=options.to_dict(),
        idempotency=idempotency,
        origin=request.state.origin,
    )
    if not job.attached:
        _log_accepted(job.job_id, spec)
    return job


def _log_accepted(job_id: str, spec: JobSpec) -> None:
    event(
        logger,
        "job_accepted",
        job=job_id,
        n=spec.n,
        size=f"{spec.width}x{spec.height}",
        steps=spec.num_inference_steps,
        sources=spec.num_sources or None,
    )


async def _prepare_edit(
    request: Request, services: Services, body: ParsedBody, validated: ValidatedRequest
) -> EditInput:
    """Decode the images unless the queue is full."""
    await services.admission.check_room()
    files = EditFiles(body.images, body.mask, validated.size, services.settings.max_pixels)
    return await services.decoders.decode(request.state.caller.owner, files)


async def _rewrite(services: Services, request: GenerationRequest, *, is_edit: bool) -> str | None:
    """Return a richer prompt, or None to keep it. A plan leaves nothing to describe; the prompt of an edit describes a
    change, not an image, so it is rewritten only on request."""
    wanted = request.rewrite_prompt if request.rewrite_prompt is not None else not is_edit
    if services.rewriter is None or not wanted or request.plan is not None:
        return None
    return await services.rewriter.rewrite(request.prompt)


async def _job_response(request: Request, services: Services, job_id: str) -> Response:
    record = await with_redis_timeout(services.queue.get(job_id))
    if record is None:
        raise queue_unavailable()
    headers = {"location": f"{base_url(request, services)}/v1/jobs/{job_id}", "preference-applied": "respond-async"}
    content = await render_job(services.queue, record, services.admission.throughput)
    return Response(content, 202, headers, "application/json")


async def _free_result(services: Services, job_id: str) -> None:
    """Free a sent result's memory in Redis."""
    with suppress(QueueUnavailable):  # then it expires after `result_ttl_s`
        await with_redis_timeout(services.queue.shorten_ttl(job_id))


def base_url(request: Request, services: Services) -> str:
    """Return the URL of this server for the client, without a trailing slash."""
    return services.settings.public_url or str(request.base_url).rstrip("/")


def _wants_job(request: Request) -> bool:
    preferences = ",".join(request.headers.getlist("prefer")).split(",")
    return any(preference.partition(";")[0].strip().lower() == "respond-async" for preference in preferences)


def _idempotency(request: Request, body: ParsedBody) -> Idempotency | None:
    """Return the idempotency key with a fingerprint of the request; raise a 400 if it is not valid."""
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    if not _IDEMPOTENCY_KEY.fullmatch(key):
        raise invalid("Idempotency-Key", "Idempotency-Key takes 1..255 printable ASCII characters.")
    fingerprint = hashlib.sha256(f"{request.method} {request.url.path}\n".encode())
    fingerprint.update(orjson.dumps(body.request.model_dump(), option=orjson.OPT_SORT_KEYS))
    for file in (*body.images, body.mask or b"") if body.images else ():
        fingerprint.update(hashlib.sha256(file).digest())
    return Idempotency(key, fingerprint.hexdigest())
