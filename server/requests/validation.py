"""From a request's fields to a job. No I/O."""

import re
import secrets
from dataclasses import dataclass, replace

from engine.errors import RequestError
from engine.geometry import MAX_ASPECT, MAX_SIDE, MIN_SIDE, Geometry, Grid, limit_pixels
from engine.jobs.job import EngineInfo, JobSpec
from engine.quotes import check_quoted_strings
from server.errors import ApiError, invalid
from server.image_files.edit_input import EditInput
from server.requests.schemas import MAX_SEED, GenerationRequest, PlanBody, TokenGridBody
from server.settings import ServerSettings

STEPS_BY_QUALITY = {"low": 12, "medium": 25, "high": 50, "xhigh": 75, "max": 100}
"""Denoising steps of each quality. The published model is made for 50; more change little."""

_QUALITY_ALIASES = {"auto": "high", "standard": "medium", "hd": "high"}
"""Other names, and the quality that the response names for them. `auto` runs the checkpoint's default steps."""

_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")


@dataclass(frozen=True)
class ValidatedRequest:
    """A request with all fields in range.

    Args:
        size: None for the engine's default, or that of an edit's first image.
        max_pixels: bounds the default size.
    """

    request: GenerationRequest
    model: str
    size: tuple[int, int] | None
    max_pixels: int
    timeout_s: float
    response_format: str

    @property
    def quality(self) -> str:
        """Return the quality as the response names it."""
        return _QUALITY_ALIASES.get(self.request.quality, self.request.quality)


def validate(request: GenerationRequest, settings: ServerSettings) -> ValidatedRequest:
    """Check all that does not depend on the engine.

    Raises:
        ApiError: 400 or 404, naming the field and what it accepts.
    """
    _check_model(request.model, settings.model_names)
    _refuse_unsupported(request, settings)
    _check_quoted_strings(request)
    if request.timeout is not None and request.timeout > settings.max_timeout:
        raise invalid("timeout", f"Invalid value for timeout: it takes at most {settings.max_timeout:g} seconds.")
    if request.seed is not None and request.seed + request.n - 1 > MAX_SEED:
        raise invalid("seed", f"Invalid value for seed: image i uses seed + i, which may be at most {MAX_SEED}.")
    return ValidatedRequest(
        request,
        model=request.model or settings.model_names[0],
        size=_size(request, settings.max_pixels),
        max_pixels=settings.max_pixels,
        timeout_s=request.timeout or settings.default_timeout,
        response_format=request.response_format or ("b64_json" if request.stream else settings.default_response_format),
    )


def to_job_spec(
    validated: ValidatedRequest, engine: EngineInfo, edit: EditInput | None, *, with_partials: bool
) -> JobSpec:
    """Return the job of a request, with a random seed if it has none.

    Args:
        with_partials: the client can receive partial images.

    Raises:
        ApiError: 400 for a plan of another size or codebook.
    """
    request = validated.request
    width, height = validated.size or (edit.size if edit else _default_size(engine, validated.max_pixels))
    if request.plan is not None:
        _check_plan(request.plan, Geometry(width, height), engine.codebook_size)
    return JobSpec(
        prompt=request.prompt,
        width=width,
        height=height,
        seed=secrets.randbelow(2**32) if request.seed in (None, -1) else request.seed,
        n=request.n,
        num_inference_steps=request.num_inference_steps or _steps(validated, engine),
        guidance_scale=engine.default_guidance if request.guidance_scale is None else request.guidance_scale,
        negative_prompt=request.negative_prompt,
        temperature=request.temperature,
        top_p=request.top_p,
        plan=request.plan.model_dump(exclude_none=True) if request.plan else None,
        return_plan=request.return_plan,
        output_format=request.output_format,
        output_compression=request.output_compression,
        partial_images=request.partial_images if with_partials else 0,
        num_sources=len(edit.source_images.files) if edit else 0,
        source_tokens=edit.tokens if edit else 0,
        model=validated.model,
        embed_prompt=request.embed_prompt,
        quotes=request.quotes,
    )


def smallest_job_spec(validated: ValidatedRequest, engine: EngineInfo) -> JobSpec:
    """Return a job that costs at most what an edit will."""
    if validated.size is None:
        without_plan = validated.request.model_copy(update={"plan": None})
        validated = replace(validated, request=without_plan, size=(MIN_SIDE, MIN_SIDE))
    return to_job_spec(validated, engine, None, with_partials=False)


def _check_model(model: str | None, served: list[str]) -> None:
    if model is not None and model not in served:
        raise model_not_found(served)


def model_not_found(served: list[str]) -> ApiError:
    """Return the 404 that lists the served models."""
    return ApiError(
        404,
        f"This model is not served here. Served: {', '.join(served)}.",
        code="model_not_found",
        param="model",
    )


def _refuse_unsupported(request: GenerationRequest, settings: ServerSettings) -> None:
    """Raise for unsupported values; ignoring them would return a wrong image."""
    if request.background == "transparent":
        raise invalid("background", 'background "transparent" is not supported: the model has no alpha channel.')
    if request.stream and request.response_format == "url":
        raise invalid(
            "response_format", 'response_format "url" cannot be combined with stream=true: events contain the images.'
        )
    if request.rewrite_prompt and settings.prompt_rewriter is None:
        raise invalid("rewrite_prompt", "This server has no prompt rewriter; leave rewrite_prompt out or send false.")


def _check_quoted_strings(request: GenerationRequest) -> None:
    for field, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt)):
        try:
            check_quoted_strings(field, text, request.quotes)
        except RequestError as error:
            raise invalid(field, f"Invalid value for {field}: {error.message}.") from None


def _size(request: GenerationRequest, max_pixels: int) -> tuple[int, int] | None:
    size = None if request.size == "auto" else _parse_size(request.size)
    sides = (request.width, request.height)
    if size is None and None in sides:
        if sides != (None, None):
            raise invalid("width" if sides[0] else "height", "width and height must be sent together; or use size.")
        return None
    chosen = size or (request.width or 0, request.height or 0)
    for name, side, wanted in zip(("width", "height"), chosen, sides, strict=True):
        if wanted not in (None, side):
            raise invalid(name, f"{name} is {wanted} but size says {side}; leave {name} out or make them equal.")
    _check_size(*chosen, max_pixels)
    return chosen


def _parse_size(size: str) -> tuple[int, int]:
    match = _SIZE.fullmatch(size)
    if match is None:
        raise invalid("size", 'Invalid value for size: it takes "auto" or "WIDTHxHEIGHT", for example "1024x768".')
    return int(match[1]), int(match[2])


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if not (min(width, height) >= MIN_SIDE and max(width, height) <= MAX_SIDE):
        raise invalid("size", f"Invalid value for size: each side must be {MIN_SIDE}..{MAX_SIDE} pixels.")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise invalid("size", f"Invalid value for size: one side may be at most {MAX_ASPECT} times the other.")
    if width * height > max_pixels:
        raise invalid("size", f"Invalid value for size: this server creates images of at most {max_pixels} pixels.")


def _steps(validated: ValidatedRequest, engine: EngineInfo) -> int:
    return engine.default_steps if validated.request.quality == "auto" else STEPS_BY_QUALITY[validated.quality]


def _default_size(engine: EngineInfo, max_pixels: int) -> tuple[int, int]:
    width, height = engine.default_size.split("x")
    return limit_pixels(int(width), int(height), max_pixels)


def _check_plan(plan: PlanBody, geometry: Geometry, codebook_size: int) -> None:
    _check_grid("plan", plan, geometry.plan, geometry, codebook_size)
    if plan.preview is not None:
        _check_grid("plan.preview", plan.preview, geometry.preview, geometry, codebook_size)


def _check_grid(name: str, given: TokenGridBody, grid: Grid, geometry: Geometry, codebook_size: int) -> None:
    if (given.rows, given.cols) != (grid.rows, grid.cols):
        size = f"{geometry.width}x{geometry.height}"
        expected = f"{grid.rows} rows and {grid.cols} cols, not {given.rows} and {given.cols}"
        raise invalid(name, f"Invalid value for {name}: for size {size} it must have {expected}.")
    if len(given.tokens) != grid.tokens:
        raise invalid(
            f"{name}.tokens", f"{name}.tokens must have rows * cols = {grid.tokens} entries, not {len(given.tokens)}."
        )
    if max(given.tokens) >= codebook_size:
        raise invalid(f"{name}.tokens", f"{name}.tokens must be in 0..{codebook_size - 1}.")
