"""From a job that has ended to the answer. A request, a stream and the jobs API all tell it from the job's record."""

import asyncio
import base64
import dataclasses
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import orjson

from engine.jobs.job import ImageResult, JobRecord, JobResult, JobState
from engine.jobs.producer import JobProducer
from server.admission.throughput import Throughput
from server.errors import ApiError, internal_error

LARGE_ANSWER_BYTES = 256 * 1024  # from here on, encoding would hold up the event loop noticeably

Operation = Literal["generation", "edit"]


@dataclass(frozen=True)
class ResponseOptions:
    """What the answer needs and no engine has to know: it waits in the job's record.

    Args:
        quality: as the answer names it.
        base_url: where the client reaches this server.
        file_tokens: of the files that the pictures are handed out as, by `response_format` "url".
    """

    operation: Operation = "generation"
    quality: str = "high"
    response_format: str = "b64_json"
    base_url: str = ""
    revised_prompt: str | None = None
    file_tokens: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, record: JobRecord) -> Self:
        names = {f.name for f in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in record.notes.items() if name in names})

    @property
    def event_type(self) -> str:
        """What the types of its events start with."""
        return "image_edit" if self.operation == "edit" else "image_generation"


def new_file_tokens(count: int) -> list[str]:
    """Names that cannot be guessed."""
    return [secrets.token_urlsafe(24) for _ in range(count)]


async def render_response(queue: JobProducer, record: JobRecord, result: JobResult) -> bytes:
    """The JSON answer to a job that has succeeded, its pictures handed out if that is how they were asked for.

    Raises:
        QueueUnavailable: they could not be.
    """
    await share_images(queue, record, result)
    return await _rendered(result, lambda: images_body(record, result))


async def render_job(queue: JobProducer, record: JobRecord, throughput: Throughput) -> bytes:
    """The job as JSON, with the answer once it has succeeded.

    Raises:
        QueueUnavailable: the answer could not be had.
    """
    result = await queue.result(record.id) if record.state is JobState.SUCCEEDED else None
    if result is not None:
        await share_images(queue, record, result)
    return await _rendered(result, lambda: job_body(record, result, throughput))


def images_body(record: JobRecord, result: JobResult) -> dict[str, Any]:
    """A `server.requests.schemas.ImagesBody`. Takes about a millisecond per megabyte of image."""
    return {
        "created": record.submitted_at // 1000,
        **common_fields(record),
        "data": [image_fields(record, result, index) for index in range(len(result.images))],
        "usage": usage(result.prompt_tokens, result.source_tokens, result.plan_tokens),
    }


def common_fields(record: JobRecord) -> dict[str, Any]:
    """What holds for all pictures of a job, as answers and events say it."""
    spec = record.spec
    return {
        "background": "opaque",
        "output_format": spec.output_format,
        "quality": ResponseOptions.of(record).quality,
        "size": f"{spec.width}x{spec.height}",
    }


def image_fields(record: JobRecord, result: JobResult, index: int) -> dict[str, Any]:
    """A `server.requests.schemas.ImageBody`."""
    notes, image = ResponseOptions.of(record), result.images[index]
    fields = {**_data(record, notes, image, index), "seed": image.seed}
    if notes.revised_prompt is not None:
        fields["revised_prompt"] = notes.revised_prompt
    return fields if image.plan is None else {**fields, "plan": image.plan}


def _data(record: JobRecord, notes: ResponseOptions, image: ImageResult, index: int) -> dict[str, str]:
    if notes.response_format == "url":
        return {"url": f"{notes.base_url}/v1/files/{notes.file_tokens[index]}.{record.spec.output_format}"}
    return {"b64_json": base64.b64encode(image.data).decode()}


def usage(prompt_tokens: int, source_tokens: int, plan_tokens: int) -> dict[str, Any]:
    """A `server.requests.schemas.UsageBody`."""
    return {
        "total_tokens": prompt_tokens + plan_tokens,
        "input_tokens": prompt_tokens,
        "output_tokens": plan_tokens,
        "input_tokens_details": {"text_tokens": prompt_tokens - source_tokens, "image_tokens": source_tokens},
        "output_tokens_details": {"text_tokens": 0, "image_tokens": plan_tokens},
    }


def job_body(record: JobRecord, result: JobResult | None, throughput: Throughput) -> dict[str, Any]:
    """A `server.requests.schemas.JobBody`."""
    error = failure(record)
    return {
        "id": record.id,
        "object": "image.job",
        "operation": ResponseOptions.of(record).operation,
        "status": record.state.value,
        "created_at": record.submitted_at // 1000,
        "deadline": record.deadline_ms // 1000,
        "position": record.position,
        "estimated_seconds": None if record.position is None else throughput.seconds_until_end(record.position),
        "progress": record.progress or None,
        "result": None if result is None else images_body(record, result),
        "error": None if error is None else error.detail,
    }


def failure(record: JobRecord) -> ApiError | None:
    """The answer for a job that has ended without a result; None for any other."""
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
    if record.state is not JobState.FAILED:
        return None
    error = record.error
    if error is None:
        return internal_error()
    status = 400 if error.type == "invalid_request_error" else 500
    return ApiError(status, error.message, type=error.type, code=error.code, param=error.param)


async def share_images(queue: JobProducer, record: JobRecord, result: JobResult) -> None:
    notes = ResponseOptions.of(record)
    if notes.response_format == "url":
        for token, image in zip(notes.file_tokens, result.images, strict=True):
            await queue.share(token, image.data, f"image/{record.spec.output_format}")


async def _rendered(result: JobResult | None, make: Callable[[], dict[str, Any]]) -> bytes:
    size = sum(len(image.data) for image in result.images) if result else 0
    if size > LARGE_ANSWER_BYTES:
        return await asyncio.to_thread(lambda: orjson.dumps(make()))
    return orjson.dumps(make())
