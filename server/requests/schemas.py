"""The bodies of the API, checked strictly: a string is not a number and a boolean is not an integer."""

import difflib
import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from engine.jobs.job import JobState, OutputFormat, Priority
from server.errors import ApiError, invalid
from server.requests.quality import Quality

MAX_SEED = 2**53 - 1  # the largest integer that every JSON reader keeps exact

_NOT_FOR_CLIENTS = re.compile("^(Input|String|List) | after validation.*")  # of what pydantic says

UNSUPPORTED = {
    "complexity": "how much is planned follows from the size; quality and num_inference_steps set the work on the rest",
    "frame_count": "a picture has one frame",
    "frame_duration_ms": "a picture has one frame",
    "markup": "an edit takes a prompt, pictures and a mask",
    "svg": 'pictures are made of pixels; output_format takes "png", "jpeg" or "webp"',
}
"""OpenAI's fields that nothing here can do justice to, and why."""


def _optional_is_nullable(schema: dict[str, Any]) -> None:
    """Says in the OpenAPI document what `_Body` does: null stands for an absent field."""
    for name, field in schema["properties"].items():
        if name not in schema.get("required", ()):
            notes = {key: field.pop(key) for key in ("title", "description", "default") if key in field}
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}], **notes}


class _Body(BaseModel):
    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, json_schema_extra=_optional_is_nullable
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        """Clients send null for what they leave open (the OpenAI SDK does); an unknown field stays, to be refused."""
        if not isinstance(data, dict):
            return data
        known = cls.model_fields.keys() | UNSUPPORTED.keys()
        return {key: value for key, value in data.items() if value is not None or key not in known}


class TokenGridBody(_Body):
    """Codebook indices in raster order, `rows * cols` of them."""

    rows: int = Field(ge=1, le=64)
    cols: int = Field(ge=1, le=64)
    tokens: list[Annotated[int, Field(ge=0)]] = Field(max_length=64 * 64)


class PlanBody(TokenGridBody):
    """A plan as `return_plan` gives it: one token per 32 x 32 pixels of the picture."""

    preview: TokenGridBody | None = None


class GenerationRequest(_Body):
    """`POST /v1/images/generations`: OpenAI's fields, and beside them what this server adds."""

    # A field's description completes the sentence "n takes ..." in error messages.
    prompt: str = Field(min_length=1, max_length=32_000, description="a text of 1..32000 characters")
    model: str | None = Field(None, description="a name that GET /v1/models lists")
    n: int = Field(1, ge=1, le=10, description="a number of images, 1..10")
    size: str = Field("auto", description='"auto" (the model\'s default) or "WIDTHxHEIGHT", each side 64..2048')
    quality: Quality = Field(
        "auto",
        description='"auto" (the model\'s default) or a name for a number of steps: "low", "medium", "high", "xhigh", '
        '"max", "standard" (medium) or "hd" (high)',
    )
    response_format: Literal["b64_json", "url"] | None = Field(None, description='"b64_json" or "url"')
    output_format: OutputFormat = Field("png", description='"png", "jpeg" or "webp"')
    output_compression: int = Field(100, ge=0, le=100, description="0..100, quality of jpeg and webp, effort of png")
    background: Literal["auto", "opaque", "transparent"] = Field("auto", description='"auto" or "opaque"')
    stream: bool = Field(False, description="true for server-sent events, or false")
    partial_images: int = Field(0, ge=0, le=3, description="0..3 pictures on the way to each image, in a stream or job")

    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="0..2**53-1; image i uses seed + i")
    num_inference_steps: int | None = Field(None, ge=1, le=200, description="1..200 steps; wins over quality")
    guidance_scale: float | None = Field(None, ge=0, le=20, description="0..20; 1 or less turns guidance off")
    negative_prompt: str = Field("", max_length=32_000, description="a text of at most 32000 characters")
    temperature: float | None = Field(None, ge=0, le=2, description="0..2; 0 is greedy")
    top_p: float | None = Field(None, gt=0, le=1, description="a number above 0, at most 1")
    return_plan: bool = Field(False, description="true to get the plan of each image, or false")
    plan: PlanBody | None = Field(None, description='{"rows", "cols", "tokens"}: a plan to render instead of planning')
    embed_prompt: bool = Field(False, description="true to have the prompt in the metadata of a png, or false")
    rewrite_prompt: bool | None = Field(None, description="true or false; unset leaves it to the server")
    priority: Priority = Field("interactive", description='"interactive" or "batch"')
    timeout: float | None = Field(None, gt=0, description="a number of seconds above 0")

    # Accepted because clients send them; they cannot change the picture and are not logged.
    width: int | None = Field(None, ge=1, description="the width in pixels, as in size")
    height: int | None = Field(None, ge=1, description="the height in pixels, as in size")
    input_fidelity: str | None = Field(None, description="a text; no effect")
    moderation: str | None = Field(None, description="a text; no effect")
    style: str | None = Field(None, description="a text; no effect")
    user: str | None = Field(None, description="a text; no effect")
    safety_identifier: str | None = Field(None, description="a text; no effect")
    # LiteLLM has in the body what it sends as headers.
    extra_headers: dict[str, Any] | None = Field(None, description="an object; no effect")


class ImageReference(_Body):
    """A picture in JSON, as OpenAI's schema has it."""

    image_url: str


Reference = Annotated[str, Field(description="data:image/png;base64,... of a PNG, JPEG or WEBP file")] | ImageReference

EDIT_FIELDS = frozenset({"image", "images", "mask"})


class EditRequest(GenerationRequest):
    """`POST /v1/images/edits` as JSON: the fields of a generation, and the pictures as `data:` URLs."""

    image: Reference | list[Reference] | None = Field(
        None, description='a data: URL of a PNG, JPEG or WEBP file, or {"image_url": "data:..."}, or a list of 1..4'
    )
    images: list[Reference] | None = Field(None, description="the same list under OpenAI's other name")
    mask: Reference | None = Field(
        None, description="a data: URL of a PNG, as large as the first image; where its alpha is 0 the image may change"
    )
    size: str = Field("auto", description='"auto" (the first image\'s size) or "WIDTHxHEIGHT", each side 64..2048')


class ImageBody(BaseModel):
    """One picture, as `b64_json` or as `url`, and the seed that makes it again."""

    b64_json: str | None = None
    url: str | None = Field(None, description="open to whoever knows it, for a while")
    seed: int
    revised_prompt: str | None = Field(None, description="present when the prompt was rewritten")
    plan: dict[str, Any] | None = Field(None, description="present when return_plan was true")


class UsageBody(BaseModel):
    """Tokens, as counted by the engine."""

    total_tokens: int
    input_tokens: int
    output_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens_details: dict[str, int]


class ImagesBody(BaseModel):
    """The answer to a generation or an edit."""

    created: int
    background: str
    output_format: str
    quality: str
    size: str
    data: list[ImageBody]
    usage: UsageBody


class _ImageEvent(BaseModel):
    type: str = Field(description="image_generation. or image_edit. and the kind of event")
    created_at: int
    background: str
    output_format: str
    quality: str
    size: str
    image_index: int | None = Field(None, description="which of the images of the request, where there are several")


class PartialImageEvent(_ImageEvent):
    """A picture on its way to an image."""

    partial_image_index: int
    b64_json: str
    plan: TokenGridBody | None = Field(None, description="what it was made from, when return_plan was true")


class CompletedEvent(_ImageEvent, ImageBody):
    """A finished image. The usage of all of them adds up to that of the request."""

    usage: UsageBody


class EngineBody(BaseModel):
    """One engine, as its last heartbeat has it."""

    id: str
    pid: int
    stage: str
    state: str = Field(description="starting, ready, draining or stuck")


class QueueBody(BaseModel):
    """Jobs that no engine has taken yet, and jobs that one has."""

    waiting: int
    running: int


class HealthBody(BaseModel):
    """Whether a request sent now would be served."""

    status: Literal["ok", "unavailable"]
    reason: str | None = Field(None, description="present when the status is not ok")
    engines: list[EngineBody]
    queue: QueueBody | None = Field(description="null when Redis does not answer")


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The answer to anything that went wrong."""

    error: ErrorDetail


class ProgressBody(BaseModel):
    """How far the slowest image of a job is."""

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
    deadline: int = Field(description="a job that has not ended by then is expired")
    position: int | None = Field(description="how many jobs wait before it; null once it does not wait any more")
    estimated_seconds: float | None = Field(description="until it ends, while it waits; null where it is not known")
    progress: ProgressBody | None
    result: ImagesBody | None = Field(description="the answer, of a job that succeeded")
    error: ErrorDetail | None = Field(description="why, of a job that ended otherwise")


_Request = TypeVar("_Request", bound=GenerationRequest)


def parse(model: type[_Request], body: dict[str, Any]) -> _Request:
    """Checks a body's fields one by one.

    Raises:
        ApiError: 400 naming the first field at fault.
    """
    try:
        return model.model_validate(body)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False, include_context=False)
        raise _explain(model, details[0]) from None


def _explain(model: type[GenerationRequest], detail: ErrorDetails) -> ApiError:
    """The error in words, without what was sent: it may be a prompt."""
    param = ".".join(str(part) for part in detail["loc"])
    name = str(detail["loc"][0])
    field = model.model_fields.get(name)
    if field is not None and name in EDIT_FIELDS:  # its location and message would name alternatives of a union
        return invalid(name, f"Invalid value for {name}: it takes {field.description}.")
    if detail["type"] == "missing":
        return invalid(param, f"The field {param} is required.", "missing_required_parameter")
    if name in UNSUPPORTED:
        return unsupported(name)
    if field is None or detail["type"] == "extra_forbidden":
        return invalid(param, _unknown(model, param, name), "unknown_parameter")
    if detail["type"] == "literal_error":  # the description lists them
        reason = "it"
    elif detail["type"] == "model_type":
        reason = f"it should be an object. {name}"
    else:
        reason = f"it {_NOT_FOR_CLIENTS.sub('', detail['msg'])}. {name}"
    return invalid(param, f"Invalid value for {param}: {reason} takes {field.description}.")


def unsupported(name: str) -> ApiError:
    """400 for one of the fields `UNSUPPORTED`."""
    return invalid(name, f"{name} is not supported: {UNSUPPORTED[name]}.", "unsupported_parameter")


def _unknown(model: type[GenerationRequest], param: str, name: str) -> str:
    if param in EDIT_FIELDS:
        return f"{param} belongs to edits; POST /v1/images/generations makes pictures from text alone."
    close = difflib.get_close_matches(param, model.model_fields, n=1) if param == name else []
    hint = f"Did you mean {close[0]}?" if close else "/docs lists those there are."
    return f"Unknown parameter: {param[:100]}. {hint}"
