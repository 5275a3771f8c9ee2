"""Sizes and grids: what an image of a given size costs and how it is laid out. Integers only, no torch.

pixels      the size asked for, any 64..2048
canvas      the size rendered: rounded up to the 32-pixel grid; the image is its centre
plan        one planner token per 32 x 32 pixels of the canvas, after a preview of about 256 tokens
patches     one renderer token per 16 x 16 pixels
sources     pictures to edit; one prompt token per 32 x 32 pixels
"""

import math
from dataclasses import dataclass

CELL = 32  # pixels a side of one plan token
PATCH = 16  # pixels a side of one renderer token
LATENT = 8  # pixels a side of one latent
PREVIEW_SIDE = 16  # tokens a side of the preview of a square image

# What a request may ask for.
MIN_SIDE = 64  # pixels
MAX_SIDE = 2048  # pixels
MAX_ASPECT = 4  # longer side : shorter side
MAX_SOURCES = 4  # source images of an edit
MAX_IMAGES = 10  # images of one request
MAX_STEPS = 200  # denoising steps

ENLARGED_SIDE = 512  # the published checkpoint enlarges smaller sources to this


@dataclass(frozen=True)
class Grid:
    """Rows and columns of a token grid, in raster order."""

    rows: int
    cols: int

    @property
    def tokens(self) -> int:
        return self.rows * self.cols


@dataclass(frozen=True)
class Geometry:
    """Everything that follows from the size asked for.

    Args:
        width, height: the picture the client gets, in pixels.
    """

    width: int
    height: int

    @property
    def canvas_width(self) -> int:
        return math.ceil(self.width / CELL) * CELL

    @property
    def canvas_height(self) -> int:
        return math.ceil(self.height / CELL) * CELL

    @property
    def plan(self) -> Grid:
        return Grid(self.canvas_height // CELL, self.canvas_width // CELL)

    @property
    def preview(self) -> Grid:
        """The preview's grid; the formula is the published processor's (`GlmImageProcessor._get_target_shape`)."""
        ratio = self.plan.rows / self.plan.cols
        return Grid(int(math.sqrt(ratio) * PREVIEW_SIDE), int(math.sqrt(1 / ratio) * PREVIEW_SIDE))

    @property
    def patches(self) -> Grid:
        return Grid(self.canvas_height // PATCH, self.canvas_width // PATCH)

    @property
    def latents(self) -> Grid:
        return Grid(self.canvas_height // LATENT, self.canvas_width // LATENT)

    @property
    def plan_tokens(self) -> int:
        """Tokens the planner writes for one image: the preview, then the plan."""
        return self.preview.tokens + self.plan.tokens

    @property
    def crop_box(self) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of the picture on the canvas."""
        left, top = (self.canvas_width - self.width) // 2, (self.canvas_height - self.height) // 2
        return left, top, left + self.width, top + self.height


def edit_size(width: int, height: int) -> tuple[int, int]:
    """The (width, height) of an edit that names none: that of the picture to edit, of an aspect that can be edited, on
    the 32-pixel grid and within the sides that can be asked for."""
    scale = min(max(1.0, MIN_SIDE / min(width, height)), MAX_SIDE / max(width, height))
    sides = [max(MIN_SIDE, CELL * math.floor(side * scale / CELL + 0.5)) for side in (width, height)]
    width, height = (min(side, MAX_ASPECT * min(sides)) for side in sides)
    return width, height


def source_tokens(width: int, height: int) -> int:
    """An upper bound of the prompt tokens of a picture to edit, for any checkpoint that enlarges none further than the
    published one does."""
    scale = min(max(1.0, ENLARGED_SIDE / min(width, height)), MAX_SIDE / max(width, height))
    return math.ceil(width * scale / CELL) * math.ceil(height * scale / CELL)
