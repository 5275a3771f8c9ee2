"""Jobs, their records and results. Times by Redis' clock."""

import dataclasses
import enum
import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self

from engine.geometry import Geometry, Grid
from engine.quotes import QuoteRule

if TYPE_CHECKING:
    from pydantic import ConfigDict  # decode processes need this module, but not pydantic

Priority = Literal["interactive", "batch"]
Stage = Literal["all", "plan", "render"]
OutputFormat = Literal["png", "jpeg", "webp"]


class JobState(enum.StrEnum):
    """queued <-> running -> one terminal state; a queued job can end at once."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def is_terminal(self) -> bool:
        return self in TERMINAL_STATES


TERMINAL_STATES = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED})


@functools.cache
def _wire_names(record: type) -> dict[str, str]:
    return {field.name: field.metadata.get("wire", field.name) for field in dataclasses.fields(record)}


_STRICT: "ConfigDict" = {
    "strict": True,
    "revalidate_instances": "always",
}  # for the type checks of `codec`


class _Record:
    """JSON-ready; a newer process's unknown keys are dropped."""

    __pydantic_config__ = _STRICT

    def to_dict(self) -> dict[str, Any]:
        # `asdict`'s deep copy takes longer than the rest of a submit.
        return {wire: getattr(self, name) for name, wire in _wire_names(type(self)).items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        return cls(**{name: data[wire] for name, wire in _wire_names(cls).items() if wire in data})


@dataclass(frozen=True)
class TokenGrid(_Record):
    """Codebook indices in raster order: `len(tokens) == rows * cols`."""

    rows: int
    cols: int
    tokens: list[int]


@dataclass(frozen=True)
class Plan:
    __pydantic_config__ = _STRICT

    rows: int
    cols: int
    tokens: list[int]
    preview: TokenGrid | None = None

    def to_dict(self) -> dict[str, Any]:
        plan: dict[str, Any] = {"rows": self.rows, "cols": self.cols, "tokens": self.tokens}
        if self.preview is not None:
            plan["preview"] = self.preview.to_dict()
        return plan

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Plan":
        preview = data.get("preview")
        return cls(data["rows"], data["cols"], data["tokens"], TokenGrid.from_dict(preview) if preview else None)


@dataclass(frozen=True)
class JobSpec(_Record):
    """An accepted request: `n` images of one prompt. Image i uses `seed + i`.

    Args:
        guidance_scale: 0..20; up to 1 without unconditional branch.
        temperature, top_p: None takes the checkpoint's; temperature 0 is greedy.
        plan: `Plan.to_dict`.
        output_compression: of jpeg and webp.
        partial_images: 0..3 for each image.
        num_sources: 0..4.
        source_tokens: upper bound of their prompt tokens.
        quotes: see `quoted_strings`.

    A later field that changes the image has `field(metadata={"format": N})`, N one above `JOB_FORMAT`: older engines
    leave its jobs to others.
    """

    prompt: str
    width: int
    height: int
    seed: int
    n: int = 1
    num_inference_steps: int = 50
    guidance_scale: float = 1.5
    negative_prompt: str = ""
    temperature: float | None = None
    top_p: float | None = None
    plan: dict[str, Any] | None = None
    return_plan: bool = False
    output_format: OutputFormat = "png"
    output_compression: int = 100
    partial_images: int = 0
    num_sources: int = field(default=0, metadata={"wire": "sources"})
    source_tokens: int = 0
    model: str = ""
    embed_prompt: bool = False
    quotes: QuoteRule = field(default="reference", metadata={"format": 2})

    @property
    def format(self) -> int:
        """Return the format an engine needs: the newest of the fields not at their default."""
        used = (field for field in dataclasses.fields(self) if getattr(self, field.name) != field.default)
        return max(field.metadata.get("format", 1) for field in used)

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.width, self.height)

    def ended(self) -> dict[str, Any]:
        """Return what an ended record keeps: neither texts nor plan."""
        return self.to_dict() | {"prompt": "", "negative_prompt": "", "plan": None}

    @property
    def pixel_steps(self) -> int:
        """Return the work, for limits and turns of batch jobs."""
        return self.width * self.height * self.num_inference_steps * self.n

    @property
    def plan_tokens(self) -> int:
        """Return the tokens of all images."""
        return 0 if self.plan else self.n * self.image_plan_tokens

    @property
    def grids(self) -> list[Grid]:
        """Return an image's grids in order."""
        geometry = self.geometry
        return [geometry.plan] if self.num_sources else [geometry.preview, geometry.plan]

    @property
    def image_plan_tokens(self) -> int:
        return sum(grid.tokens for grid in self.grids)

    @property
    def prompt_tokens_bound(self) -> int:
        """Return an upper bound, capped: too long a prompt must not wait for an idle engine."""
        return 0 if self.plan else min(len(self.prompt.encode()), 2048) + 64 + self.source_tokens


MAX_PLAN_BYTES, PLAN_PART = 64 * 2**20, 1 / 16  # of cached plans; the part is of `maxmemory`
JOB_FORMAT = max(field.metadata.get("format", 1) for field in dataclasses.fields(JobSpec))


@dataclass(frozen=True)
class SourceImages:
    """An edit's source images, upright RGB PNGs; `overlay`, an RGBA PNG of the requested size, covers the result."""

    files: list[bytes]
    overlay: bytes | None = None

    @property
    def size(self) -> int:
        """Return the size in bytes."""
        return sum(map(len, self.files)) + len(self.overlay or b"")


@dataclass(frozen=True)
class Origin(_Record):
    """The request of a job, for logs and traces; `traceparent` may be empty."""

    request_id: str = ""
    traceparent: str = ""


@dataclass(frozen=True)
class JobError(_Record):
    """Why a job failed. `type`: `invalid_request_error` (HTTP 400) or `server_error` (500)."""

    message: str
    type: str = "server_error"
    code: str | None = None
    param: str | None = None


STORE_UNAVAILABLE = "result_store_unavailable"  # code of an error

UNREADABLE_JOB = JobError("The stored job cannot be read.", code="job_unreadable")  # as in prelude_records.lua


@dataclass(frozen=True)
class JobRecord:
    """A job as Redis has it. `position` counts the queued jobs before it."""

    id: str
    state: JobState
    spec: JobSpec
    priority: Priority
    submitted_at: int
    deadline_ms: int
    runs: int = 0
    progress: dict[str, Any] = field(default_factory=dict)  # {"phase": "rendering", "step": 3, "steps": 20}
    error: JobError | None = None
    owner: str = ""
    notes: dict[str, Any] = field(default_factory=dict)
    position: int | None = None


@dataclass(frozen=True)
class Submitted:
    """The job of a submit; its record, unless an earlier submit queued it."""

    job_id: str
    record: JobRecord | None = None


@dataclass(frozen=True)
class HandedOver(_Record):
    """What a renderer needs beside the plans of another engine. `sources`: codes of the source images."""

    prompt_tokens: int
    sources: list[TokenGrid]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "HandedOver":
        return cls(data["prompt_tokens"], [TokenGrid.from_dict(grid) for grid in data["sources"]])


@dataclass(frozen=True)
class PreviewOffer:
    """The preview of image `image` of a job that another engine plans, under the claim of `epoch`."""

    job_id: str
    epoch: int
    image: int
    grid: TokenGrid
    spec: JobSpec
    seconds_left: float  # until the job's deadline


@dataclass(frozen=True)
class Claim:
    """The right to run a job for the `runs`-th time. `plans`: checkpoints by image. A `quarantined` job runs alone."""

    job_id: str
    epoch: int
    spec: JobSpec
    submitted_at: int
    deadline_ms: int
    claimed_at: int
    runs: int
    plans: dict[int, Plan]
    quarantined: bool = False
    origin: Origin = Origin()
    handed_over: HandedOver | None = None


@dataclass(frozen=True)
class FreeCapacity:
    """What an engine can admit now. An idle one takes any job, if only to refuse it."""

    images: int
    kv_tokens: int
    source_tokens: int
    idle: bool


ENGINE_STATES = ("starting", "ready", "draining", "stuck")


@dataclass(frozen=True)
class EngineInfo(_Record):
    """An engine's heartbeat; defaults are for older engines."""

    id: str
    pid: int
    stage: str  # of `Stage`
    state: str  # of `ENGINE_STATES`
    model: str
    default_size: str  # "WxH" in pixels, for size=auto
    codebook_size: int
    max_prompt_tokens: int
    images_running: int = 0
    default_steps: int = JobSpec.num_inference_steps  # without steps and quality in the request
    default_guidance: float = JobSpec.guidance_scale
    fingerprint: str = ""  # of the model; the same throughout a queue; "" of an engine with one stage
    planner: str = ""  # of the planner's weights, if loaded
    renderer: str = ""
    max_text_characters: int | None = None  # of a quoted text, if the checkpoint says so

    def has_stage(self, stage: str) -> bool:
        """Return whether the engine plans, or renders."""
        return self.stage in ("all", stage)


@dataclass(frozen=True)
class MemoryUse:
    """Bytes in Redis; `maximum` is None without `maxmemory`."""

    used: int
    maximum: int | None

    @property
    def max_plan_bytes(self) -> float:
        """Return what cached plans may take."""
        return MAX_PLAN_BYTES if self.maximum is None else min(MAX_PLAN_BYTES, self.maximum * PLAN_PART)


@dataclass(frozen=True)
class QueueStats:
    """`dead_lettered` counts since the queue's creation."""

    waiting: int
    running: int
    source_bytes: int = 0
    dead_lettered: int = 0
    result_bytes: int = field(default=0, compare=False)  # with records and bounds of live jobs
    to_plan: int = field(default=0, compare=False)  # live jobs that no planner has handed over
    to_render: int = field(default=0, compare=False)  # live jobs that were handed over
