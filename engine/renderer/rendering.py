"""The state of one image, or of its preview, while it is rendered."""

from dataclasses import dataclass

from torch import Tensor

from engine.geometry import Geometry
from engine.jobs.job import TokenGrid
from engine.request import Image, Request


@dataclass(eq=False)
class Rendering:
    """An image being rendered, or its preview: what all its steps share, and how far it is.

    Args:
        geometry: of the canvas; a preview has one of its own.
        grid: the tokens that are rendered: the plan's or the preview's.
        is_preview: it shows where the image is going, and is not the image.
        shown_after: steps after which the picture is shown on its way.
        latents: [patches, P] float32, changed by every step.
        plan: [patches, dim] the plan, embedded.
        glyphs: [g, dim] glyph tokens of the conditional row.
        no_glyphs: the unconditional row's; None without guidance.
        time_embeddings: [steps, E].
        sigmas: [steps + 1] float32, on the CPU.
        angles: rotary angles [patches, D].
        sources: keys and values of an edit's sources, for the conditional row.
    """

    image: Image
    geometry: Geometry
    grid: TokenGrid
    is_preview: bool
    shown_after: list[int]
    latents: Tensor
    plan: Tensor
    glyphs: Tensor
    no_glyphs: Tensor | None
    time_embeddings: Tensor
    sigmas: Tensor
    angles: Tensor
    sources: Tensor | None
    step: int = 0
    shown: int = 0  # pictures on its way, as `due` counts them
    velocity: Tensor | None = None  # [patches, P] float32 of the last step, filled by it

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
    def due(self) -> int:
        """How many pictures on its way should have been shown by now; at the end the image itself takes their place."""
        return sum(step <= self.step for step in self.shown_after) if self.is_preview or self.steps_left else 0

    @property
    def has_partial_due(self) -> bool:
        """Whether the picture as it is now goes out as a partial image."""
        return self.due > self.shown

    @property
    def partial_index(self) -> int:
        """The number of the partial image that is shown now; the preview is number 0, where there is one."""
        return 0 if self.is_preview else self.due - 1 + (self.image.preview is not None)

    @property
    def patches(self) -> int:
        return self.latents.shape[0]

    @property
    def rows(self) -> list[Tensor]:
        """The glyph tokens of the image's rows, the conditional one first."""
        return [self.glyphs] if self.no_glyphs is None else [self.glyphs, self.no_glyphs]

    @property
    def tokens(self) -> int:
        return sum(len(glyphs) + self.patches for glyphs in self.rows)

    @property
    def deadline_at(self) -> float:
        return self.image.request.deadline_at
