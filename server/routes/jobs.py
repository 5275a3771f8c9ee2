"""/v1/jobs: what became of requests with `Prefer: respond-async`, or of any other while it is kept."""

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import StreamingResponse

from engine.jobs.job import JobRecord
from engine.observability.logs import bind
from server import openapi
from server.admission.auth import require_key
from server.errors import ApiError
from server.redis_timeout import with_redis_timeout
from server.requests.schemas import JobBody
from server.responses.events import EventStream, job_events
from server.responses.images import render_job
from server.services import Services, ServicesDep

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], dependencies=[Depends(require_key)])

_ERRORS = openapi.errors(401, 404, 500, 503)


@router.get("/{job_id}", responses={200: {"model": JobBody}, **_ERRORS})
async def retrieve_job(job_id: str, request: Request, services: ServicesDep) -> Response:
    """A job as it is now, with the answer once it has succeeded."""
    return await _answer(services, await _own(job_id, request, services))


@router.delete("/{job_id}", responses={200: {"model": JobBody}, **_ERRORS})
async def cancel_job(job_id: str, request: Request, services: ServicesDep) -> Response:
    """Cancels a job; one that has ended stays as it is."""
    record = await _own(job_id, request, services)
    if not record.state.is_terminal:
        await with_redis_timeout(services.queue.cancel(job_id))
        record = await _own(job_id, request, services)
    return await _answer(services, record)


@router.get("/{job_id}/events", response_class=StreamingResponse, responses={**openapi.EVENTS, **_ERRORS})
async def follow_job(job_id: str, request: Request, services: ServicesDep) -> Response:
    """Server-sent events of a job: `status` and `progress` as they change, each `partial_image` once, and at the end
    `completed` or `failed`. The job goes on when its follower leaves."""
    await _own(job_id, request, services)
    return EventStream(job_events(services.queue, job_id, services.admission.throughput))


async def _own(job_id: str, request: Request, services: Services) -> JobRecord:
    """The job, if it is the caller's.

    Raises:
        ApiError: 404, of another caller's job as of one that never was.
    """
    record = await with_redis_timeout(services.queue.get(job_id))
    if record is None or record.owner != request.state.caller.owner:
        raise ApiError(404, "There is no such job, or not any more.", code="job_not_found", param="job_id")
    bind(job=job_id)
    if not record.state.is_terminal and await with_redis_timeout(services.queue.expire(job_id)):  # if its time is over
        record = await with_redis_timeout(services.queue.get(job_id)) or record
    return record


async def _answer(services: Services, record: JobRecord) -> Response:
    return Response(
        await render_job(services.queue, record, services.admission.throughput), media_type="application/json"
    )
