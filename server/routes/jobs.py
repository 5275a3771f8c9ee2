"""/v1/jobs: jobs of `Prefer: respond-async`, and of any other request while they are kept."""

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import StreamingResponse

from engine.jobs.job import JobRecord
from engine.observability.logs import bind
from server import openapi
from server.admission.auth import require_key
from server.errors import ApiError
from server.redis_timeout import with_redis_timeout
from server.responses.events import EventStream, job_events
from server.responses.jobs import render_job
from server.responses.pieces import respond
from server.responses.schemas import JobBody
from server.services import Services, ServicesDep

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], dependencies=[Depends(require_key)])

_ERRORS = openapi.errors(401, 404, 429, 500, 503)


@router.get("/{job_id}", responses={200: {"model": JobBody}, **_ERRORS})
async def retrieve_job(job_id: str, request: Request, services: ServicesDep) -> Response:
    """Return a job as it is now, with its images once it has succeeded."""
    record = await _find_to_read(job_id, request, services)
    return await _respond(request, services, record)


@router.delete("/{job_id}", responses={200: {"model": JobBody}, **_ERRORS})
async def cancel_job(job_id: str, request: Request, services: ServicesDep) -> Response:
    """Cancel a job. A job that has ended stays as it is."""
    record = await _find(job_id, request, services)
    if not record.state.is_terminal:
        await with_redis_timeout(services.queue.cancel(job_id))
        record = await _find(job_id, request, services)
    return await _respond(request, services, record)


@router.get("/{job_id}/events", response_class=StreamingResponse, responses={**openapi.EVENTS, **_ERRORS})
async def follow_job(job_id: str, request: Request, services: ServicesDep) -> Response:
    """Stream the events of a job: `status` and `progress` when they change, each `partial_image` once, and finally
    `completed` or `failed`. The job goes on when the client disconnects."""
    await _find_to_read(job_id, request, services)
    return EventStream(job_events(services.queue, job_id, services.admission.throughput, services.held_for(request)))


async def _find_to_read(job_id: str, request: Request, services: Services) -> JobRecord:
    """Return the caller's job until the response is sent. Raises as `_find`; a 429 for too many such requests."""
    record = await _find(job_id, request, services)
    request.state.places.enter_context(services.gate.reader_of(job_id))
    return record


async def _find(job_id: str, request: Request, services: Services) -> JobRecord:
    """Return the caller's job, expired if its deadline has passed.

    Raises:
        ApiError: 404, the same for another caller's job as for an unknown one.
    """
    record = await with_redis_timeout(services.queue.get(job_id))
    if record is None or record.owner != request.state.caller.owner:
        raise ApiError(404, "This job does not exist, or is no longer kept.", code="job_not_found", param="job_id")
    bind(job=job_id)
    if not record.state.is_terminal and await with_redis_timeout(services.queue.expire(job_id)):
        record = await with_redis_timeout(services.queue.get(job_id)) or record
    return record


async def _respond(request: Request, services: Services, record: JobRecord) -> Response:
    held = services.held_for(request)
    return await respond(
        await render_job(services.queue, record, services.admission.throughput, held), held, patient=False
    )
