"""A request on its way through the engine, and what the engine tells about it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from engine.jobs.job import JobSpec, Plan

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(eq=False)
class Request:
    """`spec.n` images of one prompt, which share the prompt's keys and values.

    Args:
        deadline: `time.monotonic()` seconds after which nobody wants the answer.
        plans: plans that need not be made again, by image index.
    """

    id: str
    spec: JobSpec
    deadline: float = float("inf")
    plans: dict[int, Plan] = field(default_factory=dict)
    prompt_ids: list[int] = field(default_factory=list)  # filled at admission

    @cached_property
    def images(self) -> list[Image]:
        return [Image(self, index) for index in range(self.spec.n)]

    @property
    def request(self) -> Request:
        """Itself: whatever the engine works on names its request."""
        return self

    @property
    def is_planned(self) -> bool:
        return all(image.plan is not None for image in self.images)


@dataclass(eq=False)
class Image:
    """One image of a request."""

    request: Request
    index: int
    plan: Plan | None = None  # filled when planning ends
    admitted_at: float = field(default_factory=time.monotonic)
    planned_at: float = 0.0  # when rendering could begin
    rendered_at: float = 0.0

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
class Rendered:
    """An image's pixels [height, width, 3], uint8, on the CPU."""

    image: Image
    pixels: Tensor
    decoding_seconds: float


@dataclass(frozen=True)
class Finished:
    request: Request


@dataclass(frozen=True)
class Failed:
    request: Request
    error: Exception


Event = Planned | Progress | Rendered | Finished | Failed
