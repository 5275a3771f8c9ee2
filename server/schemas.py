"""The JSON bodies of the API, checked strictly: a string is not a number and a boolean is not an integer."""

import difflib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from engine.jobs.job import OutputFormat, Priority
from server.errors import ApiError, invalid

MAX_SEED = 2**53 - 1  # the largest integer that every JSON reader keeps exact

Quality = Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"]


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
        return {key: value for key, value in data.items() if value is not None or key not in cls.model_fields}


class TokenGridBody(_Body):
    """Codebook indices in raster order, `rows * cols` of them."""

    rows: int = Field(ge=1, le=64)
    cols: int = Field(ge=1, le=64)
    tokens: list[Annotated[int, Field(ge=0)]] = Field(max_length=64 * 64)


class PlanBody(TokenGridBody):
    """A plan as `return_plan` gives it: one token per 32 x 32 pixels of the picture."""

    preview: TokenGridBody | None = None


class GenerationRequest(_Body):
    """`POST /v1/images/generations`: OpenAI's fields, and beside them what this server adds.

    A field's description completes the sentence "n takes ..." in error messages.
    """

    prompt: str = Field(min_length=1, max_length=32_000, description="a text of 1..32000 characters")
    model: str | None = Field(None, description="a name that GET /v1/models lists")
    n: int = Field(1, ge=1, le=10, description="a number of images, 1..10")
    size: str = Field("auto", description='"auto" (the model\'s default) or "WIDTHxHEIGHT", each side 64..2048')
    quality: Quality = Field("auto", description='"auto" (the model\'s default) or a name for a number of steps')
    response_format: Literal["b64_json", "url"] = Field("b64_json", description='"b64_json"')
    output_format: OutputFormat = Field("png", description='"png", "jpeg" or "webp"')
    output_compression: int = Field(100, ge=0, le=100, description="0..100, quality of jpeg and webp, effort of png")
    background: Literal["auto", "opaque", "transparent"] = Field("auto", description='"auto" or "opaque"')
    stream: bool = Field(False, description="false; streaming is not supported yet")
    partial_images: int = Field(0, ge=0, le=3, description="0; streaming is not supported yet")

    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="0..2**53-1; image i uses seed + i")
    num_inference_steps: int | None = Field(None, ge=1, le=200, description="1..200 steps; wins over quality")
    guidance_scale: float | None = Field(None, ge=0, le=20, description="0..20; 1 or less turns guidance off")
    negative_prompt: str = Field("", max_length=32_000, description="a text of at most 32000 characters")
    temperature: float | None = Field(None, ge=0, le=2, description="0..2; 0 is greedy")
    top_p: float | None = Field(None, gt=0, le=1, description="a number above 0, at most 1")
    return_plan: bool = Field(False, description="true to get the plan of each image")
    plan: PlanBody | None = Field(None, description='{"rows", "cols", "tokens"}: a plan to render instead of planning')
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


EDIT_FIELDS = frozenset({"image", "images", "mask"})


class ImageBody(BaseModel):
    """One picture, and the seed that makes it again."""

    b64_json: str
    seed: int
    plan: dict[str, Any] | None = Field(None, description="present when return_plan was true")


class UsageBody(BaseModel):
    """Tokens, as counted by the engine."""

    total_tokens: int
    input_tokens: int
    output_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens_details: dict[str, int]


class ImagesBody(BaseModel):
    """The answer to a generation."""

    created: int
    background: str
    output_format: str
    quality: str
    size: str
    data: list[ImageBody]
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


def parse_generation(body: dict[str, Any]) -> GenerationRequest:
    """Checks a body's fields one by one.

    Raises:
        ApiError: 400 naming the first field at fault.
    """
    try:
        return GenerationRequest.model_validate(body)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False, include_context=False)
        raise _explain(details[0]) from None


def _explain(detail: ErrorDetails) -> ApiError:
    """The error in words, without what was sent: it may be a prompt."""
    param = ".".join(str(part) for part in detail["loc"])
    name = str(detail["loc"][0])
    if detail["type"] == "missing":
        return invalid(param, f"The field {param} is required.", "missing_required_parameter")
    if detail["type"] == "extra_forbidden":
        return invalid(param, _unknown(param, name), "unknown_parameter")
    reason = detail["msg"].removeprefix("Input ")
    accepted = GenerationRequest.model_fields[name].description
    return invalid(param, f"Invalid value for {param}: it {reason}. {name} takes {accepted}.")


def _unknown(param: str, name: str) -> str:
    if param in EDIT_FIELDS:
        return f"{param} belongs to edits; POST /v1/images/generations makes pictures from text alone."
    close = difflib.get_close_matches(param, GenerationRequest.model_fields, n=1) if param == name else []
    hint = f" Did you mean {close[0]}?" if close else ""
    return f"Unknown parameter: {param[:100]}.{hint}"
