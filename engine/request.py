"""Requests, images and events of the engine."""

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
    """`spec.n` images of one prompt, which share its keys and values.

    Args:
        deadline_at: monotonic seconds.
        plans: known ones, by image index.
        source_images, preprocessed: filled before `Engine.submit`.
        source_codes: codes of the source images that the planner has made; given with its plans to other engines.
        preview: all that is to be rendered, of the first image.
    """

    id: str
    spec: JobSpec
    deadline_at: float = float("inf")
    plans: dict[int, Plan] = field(default_factory=dict)
    source_images: SourceImages | None = None
    preprocessed: list[PreprocessedImage] = field(default_factory=list)  # emptied at admission
    encoded: list[EncodedImage] = field(default_factory=list)  # filled at admission
    source_codes: list[TokenGrid] = field(default_factory=list)
    preview: TokenGrid | None = None
    prompt_ids: list[int] = field(default_factory=list)  # filled on arrival, source codes at admission
    prompt_positions: Tensor | None = None  # [tokens, 3], filled on arrival

    @cached_property
    def images(self) -> list[Image]:
        return [Image(self, index) for index in range(self.spec.n)]

    def set_known_plans(self) -> None:
        """Set plans from `spec` or `plans`."""
        for image in self.images:
            image.plan = Plan.from_dict(self.spec.plan) if self.spec.plan else self.plans.get(image.index)

    @property
    def request(self) -> Request:
        """Return itself, as an item of a batch."""
        return self

    @property
    def source_tokens(self) -> int:
        return sum(source.tokens for source in self.encoded or self.preprocessed)

    @property
    def source_patches(self) -> int:
        return sum(source.patches for source in self.encoded or self.preprocessed)

    @property
    def is_planned(self) -> bool:
        return self.preview is not None or all(image.plan is not None for image in self.images)


@dataclass(eq=False)
class Image:
    """Image `index` of a request."""

    request: Request
    index: int
    preview: TokenGrid | None = None  # filled for partial images
    plan: Plan | None = None  # filled when planning ends
    admitted_at: float = field(default_factory=time.monotonic)
    planned_at: float = 0.0  # ready to render
    rendered_at: float = 0.0  # last denoising step done
    decoded_at: float = 0.0

    @property
    def seed(self) -> int:
        return self.request.spec.seed + self.index


# Events. Unless cancelled, a request ends with one Finished or Failed.


@dataclass(frozen=True)
class Planned:
    request: Request
    index: int
    plan: Plan


@dataclass(frozen=True)
class Previewed:
    """A preview is written and wanted, and this engine has no renderer."""

    request: Request
    index: int
    grid: TokenGrid


@dataclass(frozen=True)
class Progress:
    """`step` of `steps` tokens or denoising steps are done."""

    request: Request
    phase: str  # planning | rendering
    step: int
    steps: int


@dataclass(frozen=True)
class Partial:
    """An unfinished image; pixels as in `Rendered`.

    Args:
        index: 0 is the preview, if any.
        grid: preview or plan.
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
    """Pixels [height, width, 3], uint8, on the CPU."""

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


Event = Planned | Previewed | Progress | Partial | Rendered | Finished | Failed
