"""POST /v1/images/generations and /edits: check, admit, and answer with pictures, a stream of events, or a job."""

import asyncio
import hashlib
import logging
import re
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Annotated

import orjson
from fastapi import APIRouter, Depends, Header, Request, Response
from starlette.background import BackgroundTask

from engine.errors import QueueUnavailable
from engine.observability.logs import bind, event
from server import openapi
from server.admission.admission import Admitted, Idempotency
from server.admission.auth import require_key
from server.errors import invalid, queue_unavailable
from server.redis_timeout import with_redis_timeout
from server.requests.body import read_json_object
from server.requests.images import EditInput, prepare
from server.requests.schemas import GenerationRequest, parse
from server.requests.uploads import Upload, read_edit
from server.requests.validation import ValidatedRequest, to_job_spec, validate
from server.responses.events import EventStream, image_events
from server.responses.images import ResponseOptions, new_file_tokens, render_job, render_response
from server.responses.job_wait import JobWait, cancel_on_disconnect
from server.services import Services, ServicesDep

_KEY = re.compile(r"[\x20-\x7e]{1,255}")

logger = logging.getLogger("glimmer.images")
router = APIRouter(prefix="/v1/images", tags=["images"], dependencies=[Depends(require_key)])

Prefer = Annotated[str | None, Header(description="`respond-async` to get a job at once, and the pictures from it.")]
IdempotencyKey = Annotated[
    str | None,
    Header(
        description="1..255 printable ASCII characters. A request with a key goes on when its client leaves, and a "
        "repetition with the same key and body gets the answer of the first, for as long as results are detached.",
        json_schema_extra={"minLength": 1, "maxLength": 255},
    ),
]


@router.post("/generations", responses=openapi.IMAGES, openapi_extra=openapi.GENERATION)
async def generate(
    request: Request,
    services: ServicesDep,
    prefer: Prefer = None,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Makes `n` images from a prompt."""
    with ExitStack() as held:
        held.enter_context(services.gate.enter())
        body = parse(GenerationRequest, await read_json_object(request, services.settings.max_body_bytes))
        return await _serve(request, services, held, validate(body, services.settings), None)


@router.post("/edits", responses=openapi.IMAGES, openapi_extra=openapi.EDIT)
async def edit(
    request: Request,
    services: ServicesDep,
    prefer: Prefer = None,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Makes `n` images from a prompt and 1 to 4 pictures."""
    with ExitStack() as held:
        held.enter_context(services.gate.enter())
        upload = await read_edit(request, services.settings.max_upload_bytes)
        return await _serve(request, services, held, validate(upload.request, services.settings), upload)


async def _serve(
    request: Request, services: Services, held: ExitStack, validated: ValidatedRequest, upload: Upload | None
) -> Response:
    """Has the job made, or finds the one that was made already, and answers in the way that was asked for.

    Args:
        held: what a stream takes along, and anything else leaves behind.
    """
    idempotency = _idempotency(request, validated, upload)
    wants_job = _wants_job(request)
    job = None
    if idempotency is not None:
        earlier = await services.admission.find_by_idempotency_key(request.state.caller, idempotency)
        job = Admitted(earlier, attached=True) if earlier else None
    if job is None:
        job = await _admit(
            request, services, validated, upload, idempotency, with_partials=validated.request.stream or wants_job
        )
    bind(job=job.job_id)
    job_wait = held.enter_context(
        JobWait(
            services.queue,
            job,
            detached=idempotency is not None,
            abandoned_jobs=services.abandoned_jobs,
            outcomes=services.outcomes,
        )
    )
    if wants_job:
        answer = await _job(request, services, job.job_id)
        job_wait.detach()
        return answer
    letting_go = None if job_wait.detached else BackgroundTask(_let_go, services, job.job_id)
    if validated.request.stream:
        stream = EventStream(image_events(services.queue, job_wait), held.pop_all())
        stream.background = letting_go
        return stream
    record, result = await cancel_on_disconnect(request.receive, job_wait.end())
    content = await render_response(services.queue, record, result)
    return Response(content, media_type="application/json", background=letting_go)


async def _admit(
    request: Request,
    services: Services,
    validated: ValidatedRequest,
    upload: Upload | None,
    idempotency: Idempotency | None,
    *,
    with_partials: bool,
) -> Admitted:
    engine = await services.engines.require_ready()
    edit = None if upload is None else await _prepare(services, validated, upload)
    spec = to_job_spec(validated, engine, edit, with_partials=with_partials)
    charge = await services.admission.charge(request.state.caller, spec)
    request.state.response_headers = charge.headers
    revised = await _revised(services, validated.request, is_edit=edit is not None)
    notes = ResponseOptions(
        operation="edit" if edit else "generation",
        quality=validated.quality,
        response_format=validated.response_format,
        base_url=base_url(request, services),
        revised_prompt=revised,
        file_tokens=new_file_tokens(spec.n) if validated.response_format == "url" else [],
    )
    job = await services.admission.submit(
        spec if revised is None else replace(spec, prompt=revised),
        validated.timeout_s,
        validated.request.priority,
        charge,
        source_images=edit.source_images if edit else None,
        notes=notes.to_dict(),
        idempotency=idempotency,
        origin=request.state.origin,
    )
    if not job.attached:
        event(
            logger,
            "job_accepted",
            job=job.job_id,
            n=spec.n,
            size=f"{spec.width}x{spec.height}",
            steps=spec.num_inference_steps,
            sources=spec.num_sources or None,
        )
    return job


async def _prepare(services: Services, validated: ValidatedRequest, upload: Upload) -> EditInput:
    """Decodes the pictures, a few requests at a time, and not for a queue that is full."""
    await services.admission.check_room()
    async with services.decoders:
        return await asyncio.to_thread(
            prepare, upload.images, upload.mask, validated.size, services.settings.max_pixels
        )


async def _revised(services: Services, request: GenerationRequest, *, is_edit: bool) -> str | None:
    """A richer prompt, where one is wanted. With a plan there is nothing left to describe, and what is said of a change
    is no description of a picture: an edit is rewritten only if it asks to be."""
    wanted = request.rewrite_prompt if request.rewrite_prompt is not None else not is_edit
    if services.rewriter is None or not wanted or request.plan is not None:
        return None
    return await services.rewriter.rewrite(request.prompt)


async def _job(request: Request, services: Services, job_id: str) -> Response:
    record = await with_redis_timeout(services.queue.get(job_id))
    if record is None:
        raise queue_unavailable()
    headers = {"location": f"{base_url(request, services)}/v1/jobs/{job_id}", "preference-applied": "respond-async"}
    content = await render_job(services.queue, record, services.admission.throughput)
    return Response(content, 202, headers, "application/json")


async def _let_go(services: Services, job_id: str) -> None:
    """Frees the memory that a result takes up in Redis, once it has been sent."""
    with suppress(QueueUnavailable):  # then it goes with `result_ttl_s`
        await with_redis_timeout(services.queue.shorten_ttl(job_id))


def base_url(request: Request, services: Services) -> str:
    """Where the client reaches this server, without a slash at the end."""
    return services.settings.public_url or str(request.base_url).rstrip("/")


def _wants_job(request: Request) -> bool:
    preferences = ",".join(request.headers.getlist("prefer")).split(",")
    return any(preference.partition(";")[0].strip().lower() == "respond-async" for preference in preferences)


def _idempotency(request: Request, validated: ValidatedRequest, upload: Upload | None) -> Idempotency | None:
    """
    Raises:
        ApiError: 400 where the key is none.
    """
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    if not _KEY.fullmatch(key):
        raise invalid("Idempotency-Key", "Idempotency-Key takes 1..255 printable ASCII characters.")
    asked = hashlib.sha256(f"{request.method} {request.url.path}\n".encode())
    asked.update(orjson.dumps(validated.request.model_dump(), option=orjson.OPT_SORT_KEYS))
    for file in (*upload.images, upload.mask or b"") if upload else ():
        asked.update(hashlib.sha256(file).digest())
    return Idempotency(key, asked.hexdigest())
