"""A request on its way through the engine, and what the engine tells about it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from engine.jobs.job import JobSpec, Plan, SourceImages, TokenGrid

if TYPE_CHECKING:
    from torch import Tensor

    from models.glm_image.source_images import EncodedImage, PreprocessedImage


@dataclass(eq=False)
class Request:
    """`spec.n` images of one prompt, which share the prompt's keys and values.

    Args:
        deadline_at: `time.monotonic()` seconds after which nobody wants the answer.
        plans: plans that need not be made again, by image index.
        sources: what an edit starts from, filled before the engine gets the request.
        pictures: its pictures, laid out for the model (`Engine.preprocess_images`), filled before, too.
    """

    id: str
    spec: JobSpec
    deadline_at: float = float("inf")
    plans: dict[int, Plan] = field(default_factory=dict)
    source_images: SourceImages | None = None
    preprocessed: list[PreprocessedImage] = field(default_factory=list)  # emptied once the model has seen them
    encoded: list[EncodedImage] = field(default_factory=list)  # what it saw; filled at admission
    prompt_ids: list[int] = field(default_factory=list)  # filled on arrival, the codes of sources at admission
    prompt_positions: Tensor | None = None  # [tokens, 3], filled on arrival

    @cached_property
    def images(self) -> list[Image]:
        return [Image(self, index) for index in range(self.spec.n)]

    def set_known_plans(self) -> None:
        """Set the plans of images that need no planning: the client's, or those in `plans`."""
        for image in self.images:
            image.plan = Plan.from_dict(self.spec.plan) if self.spec.plan else self.plans.get(image.index)

    @property
    def request(self) -> Request:
        """Itself: whatever the engine works on names its request."""
        return self

    @property
    def source_tokens(self) -> int:
        """Tokens of the prompt that are codes of the sources."""
        return sum(source.tokens for source in self.encoded or self.preprocessed)

    @property
    def source_patches(self) -> int:
        """Renderer tokens of the sources."""
        return sum(source.patches for source in self.encoded or self.preprocessed)

    @property
    def is_planned(self) -> bool:
        return all(image.plan is not None for image in self.images)


@dataclass(eq=False)
class Image:
    """One image of a request."""

    request: Request
    index: int
    preview: TokenGrid | None = None  # filled when its picture is to be shown
    plan: Plan | None = None  # filled when planning ends
    admitted_at: float = field(default_factory=time.monotonic)
    planned_at: float = 0.0  # when rendering could begin
    rendered_at: float = 0.0  # when its latents were done
    decoded_at: float = 0.0  # when its pixels were

    @property
    def seed(self) -> int:
        return self.request.spec.seed + self.index


# What the engine tells. Every accepted request ends with exactly one Finished or Failed, unless it was cancelled.


@dataclass(frozen=True)
class Planned:
    request: Request
    index: int
    plan: Plan


@dataclass(frozen=True)
class Progress:
    """`step` of `steps` planner tokens or denoising steps of the request's slowest image are done."""

    request: Request
    phase: str  # planning | rendering
    step: int
    steps: int


@dataclass(frozen=True)
class Partial:
    """A picture of an image on its way: pixels [height, width, 3], uint8, on the CPU.

    Args:
        index: 0 up to `JobSpec.partial_images`. Number 0 is the preview, where there is one, on its own canvas.
        grid: what it was made from: the preview or the plan.
    """

    image: Image
    index: int
    pixels: Tensor
    grid: TokenGrid

    @property
    def request(self) -> Request:
        return self.image.request


@dataclass(frozen=True)
class Rendered:
    """An image's pixels [height, width, 3], uint8, on the CPU."""

    image: Image
    pixels: Tensor

    @property
    def request(self) -> Request:
        return self.image.request


@dataclass(frozen=True)
class Finished:
    request: Request


@dataclass(frozen=True)
class Failed:
    request: Request
    error: Exception


Event = Planned | Progress | Partial | Rendered | Finished | Failed
