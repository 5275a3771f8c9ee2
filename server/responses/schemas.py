"""Bodies of responses, for the OpenAPI document."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from engine.jobs.job import JobState
from server.requests.schemas import TokenGridBody

Warnings = Annotated[
    list[str] | None, Field(description="present if the images cannot show everything: quoted texts that are cut")
]


class ImageBody(BaseModel):
    """One image, as `b64_json` or as `url`, and the seed that reproduces it."""

    b64_json: str | None = None
    url: str | None = Field(None, description="needs no key; expires with the result")
    seed: int
    revised_prompt: str | None = Field(None, description="present if the prompt was rewritten")
    plan: dict[str, Any] | None = Field(None, description="present if return_plan is true")


class UsageBody(BaseModel):
    """Numbers of tokens, counted by the engine."""

    total_tokens: int
    input_tokens: int
    output_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens_details: dict[str, int]


class ImagesBody(BaseModel):
    """The response of a generation or an edit."""

    created: int
    background: str
    output_format: str
    quality: str
    size: str
    data: list[ImageBody]
    usage: UsageBody
    warnings: Warnings = None


class _ImageEvent(BaseModel):
    type: str = Field(description="image_generation or image_edit, a dot, and partial_image or completed")
    created_at: int
    background: str
    output_format: str
    quality: str
    size: str
    image_index: int | None = Field(None, description="index of the image, if the request is for several")
    warnings: Warnings = None


class PartialImageEvent(_ImageEvent):
    """An image before it is finished."""

    partial_image_index: int
    b64_json: str
    plan: TokenGridBody | None = Field(None, description="the plan it was rendered from, if return_plan is true")


class CompletedEvent(_ImageEvent, ImageBody):
    """A finished image. The usages of all events add up to the request's."""

    usage: UsageBody


class EngineBody(BaseModel):
    """One engine, as of its last heartbeat."""

    id: str
    pid: int | None = Field(description="null for callers who may not see it: see `GET /health`")
    stage: str
    state: str = Field(description="starting, ready, draining or stuck")


class QueueBody(BaseModel):
    """Numbers of jobs that wait for an engine and that run."""

    waiting: int
    running: int


class HealthBody(BaseModel):
    """Whether a request sent now would be served."""

    status: Literal["ok", "unavailable"]
    reason: str | None = Field(None, description="present if the status is not ok")
    engines: list[EngineBody]
    queue: QueueBody | None = Field(description="null if Redis does not respond")


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The response to a request that failed."""

    error: ErrorDetail


class ProgressBody(BaseModel):
    """The progress of a job's images, added up: tokens of plans, or denoising steps."""

    phase: str = Field(description="planning or rendering")
    step: int
    steps: int


class JobBody(BaseModel):
    """A job. Times are seconds since the epoch."""

    id: str
    object: Literal["image.job"]
    operation: Literal["generation", "edit"]
    status: JobState
    created_at: int
    deadline: int = Field(description="the job expires if it has not ended by then")
    position: int | None = Field(description="number of jobs ahead of it; null once it does not wait")
    estimated_seconds: float | None = Field(description="until it ends; null if unknown or not waiting")
    progress: ProgressBody | None
    result: ImagesBody | None = Field(description="the response, once the job has succeeded")
    error: ErrorDetail | None = Field(description="the reason, if the job ended without a result")
