"""What travels through Redis: the job, its record, its result. Plain frozen dataclasses, no torch, JSON in and out."""

import dataclasses
import enum
import functools
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from engine.geometry import Geometry, Grid

Priority = Literal["interactive", "batch"]
OutputFormat = Literal["png", "jpeg", "webp"]


class JobState(enum.StrEnum):
    """The life of a job: queued -> running -> one of the terminal states, exactly once."""

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
    """Return the JSON name of every field: its own, or the one its metadata gives as `wire`."""
    return {field.name: field.metadata.get("wire", field.name) for field in dataclasses.fields(record)}


class _Record:
    """JSON-ready dict in and out, for flat dataclasses. Unknown keys are dropped, so that a newer API or engine can
    add fields while an older one is still running."""

    def to_dict(self) -> dict[str, Any]:
        names = _wire_names(type(self))
        return {names[name]: value for name, value in dataclasses.asdict(self).items()}  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        return cls(**{name: data[wire] for name, wire in _wire_names(cls).items() if wire in data})


@dataclass(frozen=True)
class TokenGrid(_Record):
    """Codebook indices of a grid, in raster order: `len(tokens) == rows * cols`."""

    rows: int
    cols: int
    tokens: list[int]


@dataclass(frozen=True)
class Plan:
    """What the planner wrote for one image: the plan, and the preview it wrote first (None if it was given)."""

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
    """One accepted request: `n` images of one prompt. Image i uses `seed + i`.

    Args:
        width, height: the picture's size in pixels, as asked for.
        num_inference_steps: denoising steps, 1..200.
        guidance_scale: 0..20; at 1 or below no unconditional row is computed.
        temperature, top_p: planner sampling; None takes the checkpoint's. Temperature 0 is greedy.
        plan: a plan of the same size to render instead of planning (`Plan.to_dict`).
        partial_images: pictures to show of each image on its way, 0..3.
        sources: pictures to edit, 0..4; they travel beside the spec (`SourceImages`).
        source_tokens: an upper bound of the prompt's tokens that stand for them.
        model: the name the client knows the model by, for the metadata of a PNG.
        embed_prompt: whether the prompt goes into that metadata, too.
        output_compression: 0..100, the quality of jpeg and webp; png is lossless and has none.
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

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.width, self.height)

    @property
    def plan_tokens(self) -> int:
        """Planner tokens of all images of the job; 0 when the plan is given."""
        return 0 if self.plan else self.n * self.image_plan_tokens

    @property
    def grids(self) -> list[Grid]:
        """What the planner writes for an image, in order: the preview, then the plan; of an edit the plan alone."""
        geometry = self.geometry
        return [geometry.plan] if self.num_sources else [geometry.preview, geometry.plan]

    @property
    def image_plan_tokens(self) -> int:
        return sum(grid.tokens for grid in self.grids)

    @property
    def prompt_tokens_bound(self) -> int:
        """An upper bound of the prompt's tokens that needs no tokenizer: a token is at least one byte. Capped, so that
        a prompt which is refused for its length does not have to wait for an empty engine first."""
        return 0 if self.plan else min(len(self.prompt.encode()), 2048) + 64 + self.source_tokens


@dataclass(frozen=True)
class SourceImages:
    """The pictures an edit starts from.

    Args:
        pictures: PNG files, upright, RGB.
        overlay: an RGBA PNG of the size asked for: what covers the finished picture wherever the mask says "keep".
    """

    files: list[bytes]
    overlay: bytes | None = None

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(map(len, self.files)) + len(self.overlay or b"")


@dataclass(frozen=True)
class Origin(_Record):
    """The request that a job came with, for whoever follows it through logs and traces. Nothing else depends on it.

    Args:
        request_id: as the API's answer and log lines name it.
        traceparent: its span as W3C Trace Context writes it; empty where it has none.
    """

    request_id: str = ""
    traceparent: str = ""


@dataclass(frozen=True)
class JobError(_Record):
    """Why a job failed, in the terms of the HTTP contract.

    `type` is `invalid_request_error` (the sender can mend it, HTTP 400) or `server_error` (HTTP 500).
    """

    message: str
    type: str = "server_error"
    code: str | None = None
    param: str | None = None


@dataclass(frozen=True)
class ImageResult:
    """One encoded picture (`data`), the seed it was made from, and its plan when it was asked for."""

    data: bytes
    seed: int
    plan: dict[str, Any] | None = None


@dataclass(frozen=True)
class PartialImage:
    """A picture of image number `image` on its way, number `index` of at most `JobSpec.partial_images`.

    Args:
        data: encoded like the finished picture.
        grid: the part of the plan it was made from (`TokenGrid.to_dict`): the preview or the plan.
    """

    image: int
    index: int
    data: bytes
    grid: dict[str, Any] | None = None


@dataclass(frozen=True)
class JobResult:
    """What a succeeded job leaves behind, images in order.

    Args:
        prompt_tokens: of the whole prompt, `source_tokens` that stand for pictures among them.
    """

    images: list[ImageResult]
    prompt_tokens: int
    plan_tokens: int
    source_tokens: int = 0


@dataclass(frozen=True)
class JobRecord:
    """A job as Redis knows it now. Times are milliseconds of Redis' clock since the epoch.

    Args:
        progress: a small dict an engine writes, for example {"phase": "rendering", "step": 3, "steps": 20}.
        owner: the caller it belongs to; empty where all are one.
        notes: what whoever submitted it wants to find again.
        position: how many jobs wait before it; None once it does not wait any more.
    """

    id: str
    state: JobState
    spec: JobSpec
    priority: Priority
    submitted_at: int
    deadline_ms: int
    runs: int = 0
    progress: dict[str, Any] = field(default_factory=dict)
    error: JobError | None = None
    owner: str = ""
    notes: dict[str, Any] = field(default_factory=dict)
    position: int | None = None


@dataclass(frozen=True)
class Claim:
    """The right to run a job, valid while the lease is renewed and the record's epoch is still `epoch`.

    `plans` holds the checkpointed plans of an earlier run, by image index. `quarantined` jobs brought an engine down
    before: they run alone, so that nobody is harmed if they do it again. Times are milliseconds of Redis' clock, which
    need not agree with the engine's.
    """

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


@dataclass(frozen=True)
class FreeCapacity:
    """What an engine can admit right now. An idle engine takes any job: only it can say what is wrong with it.

    Args:
        kv_tokens: of the planner's cache.
        source_tokens: of pictures to edit, as `JobSpec.source_tokens` counts them.
    """

    images: int
    kv_tokens: int
    source_tokens: int
    idle: bool


ENGINE_STATES = ("starting", "ready", "draining", "stuck")


@dataclass(frozen=True)
class EngineInfo(_Record):
    """What an engine says of itself with every heartbeat.

    A default stands for what an engine of an older version does not say.

    Args:
        state: one of `ENGINE_STATES`.
        default_size: "WxH" in pixels, for size=auto.
        default_steps, default_guidance: for a request that names neither steps nor a quality, or no guidance.
    """

    id: str
    pid: int
    stage: str  # all: it plans and renders
    state: str
    model: str
    default_size: str
    codebook_size: int
    max_prompt_tokens: int
    images_running: int = 0
    default_steps: int = JobSpec.num_inference_steps
    default_guidance: float = JobSpec.guidance_scale


@dataclass(frozen=True)
class QueueStats:
    """Jobs nobody runs yet, jobs under a lease, the memory in Redis of the pictures that all of them edit, and how many
    jobs were given up so far because they brought their engines down."""

    waiting: int
    running: int
    source_bytes: int = 0
    dead_lettered: int = 0
