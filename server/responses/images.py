"""The JSON of images, in responses and events."""

import asyncio
import base64
import dataclasses
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import orjson

from engine.jobs.job import ImageResult, JobRecord, JobResult
from engine.jobs.producer import JobProducer

LARGE_RESPONSE_BYTES = 256 * 1024  # encoding more blocks the event loop noticeably

Operation = Literal["generation", "edit"]


@dataclass(frozen=True)
class ResponseOptions:
    """What the response needs and engines do not: the `notes` of the job's record. `file_tokens` are for "url"."""

    operation: Operation = "generation"
    quality: str = "high"
    response_format: str = "b64_json"
    base_url: str = ""
    revised_prompt: str | None = None
    file_tokens: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_record(cls, record: JobRecord) -> Self:
        names = {f.name for f in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in record.notes.items() if name in names})

    @property
    def event_prefix(self) -> str:
        """Return the prefix of event types."""
        return "image_edit" if self.operation == "edit" else "image_generation"


def new_file_tokens(count: int) -> list[str]:
    """Return names that cannot be guessed."""
    return [secrets.token_urlsafe(24) for _ in range(count)]


async def render_response(queue: JobProducer, record: JobRecord, result: JobResult) -> bytes:
    """Return the JSON of a succeeded job, and share its images if URLs were requested."""
    await share_images(queue, record, result)
    return await encode(result, lambda: images_body(record, result))


async def share_images(queue: JobProducer, record: JobRecord, result: JobResult) -> None:
    """Make images available by URL, if requested."""
    options = ResponseOptions.from_record(record)
    if options.response_format == "url":
        for token, image in zip(options.file_tokens, result.images, strict=True):
            await queue.share_file(record.id, token, image.data, f"image/{record.spec.output_format}")


async def encode(result: JobResult | None, make_body: Callable[[], dict[str, Any]]) -> bytes:
    """Encode a body that contains `result`, in a thread if it is large."""
    size = sum(len(image.data) for image in result.images) if result else 0
    if size > LARGE_RESPONSE_BYTES:
        return await asyncio.to_thread(lambda: orjson.dumps(make_body()))
    return orjson.dumps(make_body())


def images_body(record: JobRecord, result: JobResult) -> dict[str, Any]:
    """Return a `schemas.ImagesBody`; takes about a millisecond per megabyte of image."""
    return {
        "created": record.submitted_at // 1000,
        **common_fields(record),
        "data": [image_fields(record, result, index) for index in range(len(result.images))],
        "usage": usage(result.prompt_tokens, result.source_tokens, result.plan_tokens),
    }


def common_fields(record: JobRecord) -> dict[str, Any]:
    """Return the fields shared by a job's images."""
    spec = record.spec
    return {
        "background": "opaque",
        "output_format": spec.output_format,
        "quality": ResponseOptions.from_record(record).quality,
        "size": f"{spec.width}x{spec.height}",
    }


def image_fields(record: JobRecord, result: JobResult, index: int) -> dict[str, Any]:
    """Return a `schemas.ImageBody`."""
    options, image = ResponseOptions.from_record(record), result.images[index]
    fields = {**_data(record, options, image, index), "seed": image.seed}
    if options.revised_prompt is not None:
        fields["revised_prompt"] = options.revised_prompt
    return fields if image.plan is None else {**fields, "plan": image.plan}


def _data(record: JobRecord, options: ResponseOptions, image: ImageResult, index: int) -> dict[str, str]:
    if options.response_format == "url":
        return {"url": f"{options.base_url}/v1/files/{options.file_tokens[index]}.{record.spec.output_format}"}
    return {"b64_json": base64.b64encode(image.data).decode()}


def usage(prompt_tokens: int, source_tokens: int, plan_tokens: int) -> dict[str, Any]:
    """Return a `schemas.UsageBody`."""
    return {
        "total_tokens": prompt_tokens + plan_tokens,
        "input_tokens": prompt_tokens,
        "output_tokens": plan_tokens,
        "input_tokens_details": {"text_tokens": prompt_tokens - source_tokens, "image_tokens": source_tokens},
        "output_tokens_details": {"text_tokens": 0, "image_tokens": plan_tokens},
    }
