"""The JSON of a job, for /v1/jobs and `Prefer: respond-async`."""

from typing import Any

from engine.jobs.job import JobRecord, JobResult, JobState
from engine.jobs.producer import JobProducer
from server.admission.throughput import Throughput
from server.responses.images import ResponseOptions, encode, images_body, share_images
from server.responses.outcomes import job_error


async def render_job(queue: JobProducer, record: JobRecord, throughput: Throughput) -> bytes:
    """Return the job, with its images once succeeded."""
    result = await queue.result(record.id) if record.state is JobState.SUCCEEDED else None
    if result is not None:
        await share_images(queue, record, result)
    return await encode(result, lambda: job_body(record, result, throughput))


def job_body(record: JobRecord, result: JobResult | None, throughput: Throughput) -> dict[str, Any]:
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
        "result": None if result is None else images_body(record, result),
        "error": None if error is None else error.detail,
    }
