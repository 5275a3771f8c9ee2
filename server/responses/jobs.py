"""The JSON of a job, for /v1/jobs and `Prefer: respond-async`."""

from typing import Any

from engine.jobs.job import JobRecord, JobState
from engine.jobs.producer import JobProducer
from server.admission.memory_budget import Hold
from server.admission.throughput import Throughput
from server.responses.held_image import call_redis
from server.responses.images import ResponseOptions, ResultImages, images_body, read_result, share_images
from server.responses.outcomes import job_error
from server.responses.pieces import Mark, Part, split


async def render_job(
    queue: JobProducer, record: JobRecord, throughput: Throughput, held: Hold, *, patient: bool = False
) -> list[Part]:
    """Return the job as JSON, with its images once it has succeeded. Raises as `HeldImage.load`."""
    if record.state is not JobState.SUCCEEDED:
        return split(lambda mark: job_body(record, None, throughput, mark), [])
    images = await call_redis(lambda: read_result(queue, record.id, held), patient=patient)
    if images is not None:
        images = await share_images(queue, record, images, patient=patient)
    return split(lambda mark: job_body(record, images, throughput, mark), images.parts if images else [])


def job_body(record: JobRecord, images: ResultImages | None, throughput: Throughput, mark: Mark) -> dict[str, Any]:
    """Return a `schemas.JobBody`."""
    error = job_error(record)
    return {
        "id": record.id,
        "object": "image.job",
        "operation": ResponseOptions.from_record(record).operation,
        "status": record.state.value,
        "created_at": record.submitted_at // 1000,
        "deadline": record.deadline_ms // 1000,
        "position": record.position,
        "estimated_seconds": None if record.position is None else throughput.seconds_until_end(record.position),
        "progress": record.progress or None,
        "result": None if images is None else images_body(record, images, mark),
        "error": None if error is None else error.detail,
    }
