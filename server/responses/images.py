"""The JSON of images, in responses and events."""

import dataclasses
import secrets
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

from engine.jobs.job import JobRecord
from engine.jobs.producer import JobProducer
from engine.jobs.results import StoredImage, StoredResult
from server.admission.memory_budget import Hold
from server.responses.held_image import HeldImage, call_redis
from server.responses.pieces import Mark, Part, base64

LARGE_RESPONSE_BYTES = 256 * 1024  # smaller results are read in one call

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
    warnings: list[str] = field(default_factory=list)

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


@dataclass(frozen=True)
class ResultImages:
    """A result and its images: base64, or a `HeldImage` of a large result; URLs once they are shared."""

    result: StoredResult
    parts: list[Part]
    urls: list[str] = field(default_factory=list)


async def read_result(queue: JobProducer, job_id: str, held: Hold) -> ResultImages | None:
    """Return the result of a job, None once it is discarded or expired."""
    result = await queue.stored_result(job_id, LARGE_RESPONSE_BYTES)
    if result is None:
        return None

    def part(index: int, image: StoredImage) -> Part:
        if image.data is not None:
            return base64(image.data)
        return HeldImage(lambda: queue.result_image(job_id, index, image.key), image.size, held)

    return ResultImages(result, [part(index, image) for index, image in enumerate(result.images)])


async def share_images(queue: JobProducer, record: JobRecord, images: ResultImages, *, patient: bool) -> ResultImages:
    """Make the images available by URL, if requested, one at a time. Raises as `HeldImage.load`."""
    options = ResponseOptions.from_record(record)
    if options.response_format != "url":
        return images
    urls: list[str] = []
    for token, stored, part in zip(options.file_tokens, images.result.images, images.parts, strict=True):
        if (key := stored.key) is not None:
            urls.append(await call_redis(lambda key=key: queue.image_link(key), patient=patient))
            continue
        await _share_file(queue, record, token, stored, part, patient=patient)
        urls.append(f"{options.base_url}/v1/files/{token}.{record.spec.output_format}")
    return replace(images, urls=urls)


async def _share_file(
    queue: JobProducer, record: JobRecord, token: str, stored: StoredImage, part: Part, *, patient: bool
) -> None:
    """Copy an image in Redis to where /v1/files finds it, once."""
    _, size = await call_redis(lambda: queue.shared_file_info(token), patient=patient)
    if size == stored.size:
        return
    data = await part.load(patient=patient) if isinstance(part, HeldImage) else stored.data
    media_type = f"image/{record.spec.output_format}"
    await call_redis(lambda: queue.share_file(record.id, token, data or b"", media_type), stored.size, patient=patient)
    if isinstance(part, HeldImage):
        part.drop()


def images_body(record: JobRecord, images: ResultImages, mark: Mark) -> dict[str, Any]:
    """Return a `schemas.ImagesBody`."""
    result = images.result
    return {
        "created": record.submitted_at // 1000,
        **common_fields(record),
        "data": [image_fields(record, images, index, mark) for index in range(len(result.images))],
        "usage": usage(result.prompt_tokens, result.source_tokens, result.plan_tokens),
    }


def common_fields(record: JobRecord) -> dict[str, Any]:
    """Return the fields shared by a job's images."""
    spec, options = record.spec, ResponseOptions.from_record(record)
    fields = {
        "background": "opaque",
        "output_format": spec.output_format,
        "quality": options.quality,
        "size": f"{spec.width}x{spec.height}",
    }
    return fields | {"warnings": options.warnings} if options.warnings else fields


def image_fields(record: JobRecord, images: ResultImages, index: int, mark: Mark) -> dict[str, Any]:
    """Return a `schemas.ImageBody`."""
    options, image = ResponseOptions.from_record(record), images.result.images[index]
    fields = {"url": images.urls[index]} if images.urls else {"b64_json": mark(index)}
    fields |= {"seed": image.seed}
    if options.revised_prompt is not None:
        fields["revised_prompt"] = options.revised_prompt
    return fields if image.plan is None else {**fields, "plan": image.plan}


def usage(prompt_tokens: int, source_tokens: int, plan_tokens: int) -> dict[str, Any]:
    """Return a `schemas.UsageBody`."""
    return {
        "total_tokens": prompt_tokens + plan_tokens,
        "input_tokens": prompt_tokens,
        "output_tokens": plan_tokens,
        "input_tokens_details": {"text_tokens": prompt_tokens - source_tokens, "image_tokens": source_tokens},
        "output_tokens_details": {"text_tokens": 0, "image_tokens": plan_tokens},
    }
