"""Bodies of requests. Types are strict: a string is not a number, a boolean not an integer."""

import difflib
import re
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from engine.geometry import CELL, MAX_IMAGES, MAX_SIDE, MAX_SOURCES, MAX_STEPS, MIN_SIDE
from engine.jobs.job import OutputFormat, Priority
from engine.quotes import QuoteRule
from server.errors import ApiError, invalid
from server.requests.quality import Quality

MAX_SEED = 2**53 - 1  # the largest integer that all JSON parsers keep exact
MAX_PROMPT_CHARS = 32_000
MAX_GRID_SIDE = MAX_SIDE // CELL
MAX_NAME_CHARS = 64  # of an unknown field, in comparisons and messages

_PYDANTIC_TERMS = re.compile("^(Input|String|List) | after validation.*")  # cut from messages to clients

UNSUPPORTED = {
    "complexity": "the length of the plan follows from size; use quality or num_inference_steps to set the steps",
    "frame_count": "an image has one frame",
    "frame_duration_ms": "an image has one frame",
    "markup": "an edit takes a prompt, images and a mask",
    "svg": 'only pixel formats are supported; output_format takes "png", "jpeg" or "webp"',
}
"""OpenAI's fields that this server cannot honour, and why."""


def _optional_is_nullable(schema: dict[str, Any]) -> None:
    """Declare optional fields as nullable: `_Body` treats null as absent."""
    for name, field in schema["properties"].items():
        if name not in schema.get("required", ()):
            annotations = {key: field.pop(key) for key in ("title", "description", "default") if key in field}
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}], **annotations}


def _take_integral_float(value: Any) -> Any:
    """Turn 1.0 into 1, an integer in JSON Schema."""
    # Beyond `MAX_SEED` a float stands for many integers.
    return int(value) if type(value) is float and value.is_integer() and abs(value) <= MAX_SEED else value


def _take_integral_floats(values: Any) -> Any:
    if not isinstance(values, list) or len(values) > MAX_GRID_SIDE**2:
        return values
    return [_take_integral_float(value) for value in values]


@cache
def _integer_fields(model: type[BaseModel]) -> frozenset[str]:
    fields = model.model_fields.items()
    return frozenset(name for name, field in fields if int in (field.annotation, *get_args(field.annotation)))


_DROP = AfterValidator(lambda _: None)


class _Body(BaseModel):
    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, json_schema_extra=_optional_is_nullable
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        """Drop null fields, which the OpenAI SDK sends. Keep one unknown field: errors cost time."""
        if not isinstance(data, dict):
            return data
        known = {name: data[name] for name in cls.model_fields if data.get(name) is not None}
        known |= {name: _take_integral_float(known[name]) for name in _integer_fields(cls) & known.keys()}
        for name, value in data.items():
            if name not in cls.model_fields and (value is not None or name not in UNSUPPORTED):
                return {**known, name[:MAX_NAME_CHARS]: None}
        return known


class TokenGridBody(_Body):
    """Codebook indices in raster order, `rows * cols` of them."""

    rows: int = Field(ge=1, le=MAX_GRID_SIDE)
    cols: int = Field(ge=1, le=MAX_GRID_SIDE)
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], BeforeValidator(_take_integral_floats)] = Field(
        max_length=MAX_GRID_SIDE**2, fail_fast=True
    )


class PlanBody(TokenGridBody):
    """A plan as `return_plan` returns it: one token per 32 x 32 pixels of the image."""

    preview: TokenGridBody | None = None


class GenerationRequest(_Body):
    """`POST /v1/images/generations`: OpenAI's fields and this server's extensions."""

    # A field's description completes the sentence "n takes ..." in error messages.
    prompt: str = Field(
        min_length=1, max_length=MAX_PROMPT_CHARS, description=f"a string of 1..{MAX_PROMPT_CHARS} characters"
    )
    model: str | None = Field(None, description="one of the names that GET /v1/models lists")
    n: int = Field(1, ge=1, le=MAX_IMAGES, description=f"a number of images, 1..{MAX_IMAGES}")
    size: str = Field(
        "auto", description=f'"auto" (the model\'s default) or "WIDTHxHEIGHT", each side {MIN_SIDE}..{MAX_SIDE}'
    )
    quality: Quality = Field(
        "auto",
        description='"auto" (the model\'s default) or a name for a number of steps: "low", "medium", "high", "xhigh", '
        '"max", "standard" (medium) or "hd" (high)',
    )
    response_format: Literal["b64_json", "url"] | None = Field(None, description='"b64_json" or "url"')
    output_format: OutputFormat = Field("png", description='"png", "jpeg" or "webp"')
    output_compression: int = Field(
        100, ge=0, le=100, description="0..100: quality of jpeg and webp, compression of png"
    )
    background: Literal["auto", "opaque", "transparent"] = Field("auto", description='"auto" or "opaque"')
    stream: bool = Field(False, description="true for server-sent events, or false")
    partial_images: int = Field(0, ge=0, le=3, description="0..3 partial images of each image, in a stream or a job")

    seed: int | None = Field(None, ge=-1, le=MAX_SEED, description="0..2**53-1; image i uses seed + i; -1 for any")
    num_inference_steps: int | None = Field(
        None, ge=1, le=MAX_STEPS, description=f"1..{MAX_STEPS} denoising steps; overrides quality"
    )
    guidance_scale: float | None = Field(None, ge=0, le=20, description="0..20; 1 or less turns guidance off")
    negative_prompt: str = Field(
        "", max_length=MAX_PROMPT_CHARS, description=f"a string of at most {MAX_PROMPT_CHARS} characters"
    )
    temperature: float | None = Field(None, ge=0, le=2, description="0..2; 0 decodes greedily")
    top_p: float | None = Field(None, gt=0, le=1, description="a number above 0, at most 1")
    return_plan: bool = Field(False, description="true to get the plan of each image, or false")
    plan: PlanBody | None = Field(None, description='{"rows", "cols", "tokens"}: a plan to render instead of planning')
    quotes: QuoteRule = Field("reference", description='"reference" or "strict": which marks enclose text to draw')
    embed_prompt: bool = Field(False, description="true to store the prompt in the metadata of a png, or false")
    rewrite_prompt: bool | None = Field(None, description="true or false; the server decides if it is unset")
    priority: Priority = Field("interactive", description='"interactive" or "batch"')
    timeout: float | None = Field(None, gt=0, description="a number of seconds above 0")

    width: int | None = Field(None, ge=1, description="the width in pixels, as in size")
    height: int | None = Field(None, ge=1, description="the height in pixels, as in size")

    # Accepted because clients send them, without effect, never kept or logged.
    input_fidelity: Annotated[str | None, _DROP] = Field(None, description="a string; has no effect")
    moderation: Annotated[str | None, _DROP] = Field(None, description="a string; has no effect")
    style: Annotated[str | None, _DROP] = Field(None, description="a string; has no effect")
    user: Annotated[str | None, _DROP] = Field(None, description="a string; has no effect")
    safety_identifier: Annotated[str | None, _DROP] = Field(None, description="a string; has no effect")
    # LiteLLM repeats its headers in the body.
    extra_headers: Annotated[dict[str, Any] | None, _DROP] = Field(None, description="an object; has no effect")


class ImageReference(_Body):
    """An image in JSON, in the form of OpenAI's schema."""

    image_url: str


Reference = Annotated[str, Field(description="data:image/png;base64,... of a PNG, JPEG or WEBP file")] | ImageReference

References = Annotated[list[Reference], Field(max_length=MAX_SOURCES)]

EDIT_FIELDS = frozenset({"image", "images", "mask"})


class EditRequest(GenerationRequest):
    """`POST /v1/images/edits` as JSON: the fields of a generation, and images as `data:` URLs."""

    image: Reference | References | None = Field(
        None,
        description='a data: URL of a PNG, JPEG or WEBP file, or {"image_url": "data:..."}, or a list of '
        f"1..{MAX_SOURCES}",
    )
    images: References | None = Field(None, description="a list as in image: OpenAI's other name for it")
    mask: Reference | None = Field(
        None,
        description="a data: URL of a PNG of the first image's size; the edit changes only where its alpha is 0",
    )
    size: str = Field(
        "auto", description=f'"auto" (the first image\'s size) or "WIDTHxHEIGHT", each side {MIN_SIDE}..{MAX_SIDE}'
    )


_Request = TypeVar("_Request", bound=GenerationRequest)


def parse(model: type[_Request], body: dict[str, Any]) -> _Request:
    """Check the fields of a body; raise a 400 naming the first invalid one."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False, include_context=False)
        raise _explain(model, details[0]) from None


def _explain(model: type[GenerationRequest], detail: ErrorDetails) -> ApiError:
    """Return the 400 of a validation error, without the value."""
    param = ".".join(str(part) for part in detail["loc"])
    name = str(detail["loc"][0])
    field = model.model_fields.get(name)
    if field is not None and name in EDIT_FIELDS:  # pydantic names members of the union
        return invalid(name, f"Invalid value for {name}: it takes {field.description}.")
    if detail["type"] == "missing":
        return invalid(param, f"The field {param} is required.", "missing_required_parameter")
    if name in UNSUPPORTED:
        return unsupported(name)
    if field is None or detail["type"] == "extra_forbidden":
        return invalid(param, _unknown_parameter(model, param, name), "unknown_parameter")
    if detail["type"] == "literal_error":  # the description lists the values
        reason = "it"
    elif detail["type"] == "model_type":
        reason = f"it should be an object. {name}"
    else:
        reason = f"it {_PYDANTIC_TERMS.sub('', detail['msg'])}. {name}"
    return invalid(param, f"Invalid value for {param}: {reason} takes {field.description}.")


def unsupported(name: str) -> ApiError:
    """Return the 400 for a field in `UNSUPPORTED`."""
    return invalid(name, f"{name} is not supported: {UNSUPPORTED[name]}.", "unsupported_parameter")


def _unknown_parameter(model: type[GenerationRequest], param: str, name: str) -> str:
    if param in EDIT_FIELDS:
        return f"{param} is a field of edits; POST /v1/images/generations creates images from text alone."
    close = difflib.get_close_matches(param, model.model_fields, n=1) if param == name else []
    hint = f"Did you mean {close[0]}?" if close else "/docs lists the parameters."
    return f"Unknown parameter: {param}. {hint}"
