from dataclasses import dataclass

from torch import Tensor

from engine.geometry import Geometry
from engine.jobs.job import TokenGrid
from engine.request import Image, Request


@dataclass(eq=False)
class Rendering:
    """What the steps of an image or preview share (`RendererRunner.prepare`), and its progress."""

    image: Image
    geometry: Geometry  # of the canvas
    grid: TokenGrid
    is_preview: bool
    partial_after: list[int]  # numbers of steps
    latents: Tensor  # [patches, P] float32, replaced by every step
    plan: Tensor  # [patches, dim], embedded
    glyphs: Tensor  # [g, dim] of the conditional branch
    negative_glyphs: Tensor | None  # of the unconditional branch; None without guidance
    time_embeddings: Tensor  # [steps, E]
    sigmas: Tensor  # [steps + 1] float32, on the CPU
    distances: Tensor  # [steps] float32: to the next sigma
    angles: Tensor  # rotary angles [patches, D]
    source_kv: Tensor | None  # [layers, 2, heads, S, D], for the conditional branch
    step: int = 0  # steps done
    partials_sent: int = 0  # set by the engine
    velocity: Tensor | None = None  # [patches, P] float32, of the last step

    @property
    def request(self) -> Request:
        return self.image.request

    @property
    def steps(self) -> int:
        return self.time_embeddings.shape[0]

    @property
    def steps_left(self) -> int:
        return self.steps - self.step

    @property
    def partials_due(self) -> int:
        """Return how many partial images are due, none at the end."""
        return sum(step <= self.step for step in self.partial_after) if self.is_preview or self.steps_left else 0

    @property
    def has_partial_due(self) -> bool:
        return self.partials_due > self.partials_sent

    @property
    def partial_index(self) -> int:
        """Return the index of the due partial image; a preview's is 0."""
        return 0 if self.is_preview else self.partials_due - 1 + (self.image.preview is not None)

    @property
    def patches(self) -> int:
        return self.latents.shape[0]

    @property
    def branches(self) -> list[Tensor]:
        """Return the glyph tokens of every branch, the conditional one first."""
        return [self.glyphs] if self.negative_glyphs is None else [self.glyphs, self.negative_glyphs]

    @property
    def tokens(self) -> int:
        """Return the packed tokens of all branches."""
        return sum(len(glyphs) + self.patches for glyphs in self.branches)

    @property
    def deadline_at(self) -> float:
        return self.image.request.deadline_at
