"""Sizes, grids and bounds of a request. No torch."""

import math
from dataclasses import dataclass

CELL = 32  # pixels
PATCH = 16  # pixels
LATENT = 8  # pixels
PREVIEW_SIDE = 16  # tokens, of a square image

MIN_SIDE, MAX_SIDE = 64, 2048  # pixels
MAX_ASPECT = 4  # longer to shorter side
MAX_SOURCES = 4  # of one edit
MAX_IMAGES = 10  # of one request
MAX_STEPS = 200

ENLARGED_SIDE = 512  # the published checkpoint enlarges smaller sources


@dataclass(frozen=True)
class Grid:
    """In raster order."""

    rows: int
    cols: int

    @property
    def tokens(self) -> int:
        return self.rows * self.cols


@dataclass(frozen=True)
class Geometry:
    """The grids of a requested size in pixels."""

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
        """Return the preview's grid, as in `GlmImageProcessor._get_target_shape`."""
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
        """Return the tokens of preview and plan."""
        return self.preview.tokens + self.plan.tokens

    @property
    def crop_box(self) -> tuple[int, int, int, int]:
        """Return (left, top, right, bottom) on the canvas."""
        left, top = (self.canvas_width - self.width) // 2, (self.canvas_height - self.height) // 2
        return left, top, left + self.width, top + self.height


def edit_size(width: int, height: int) -> tuple[int, int]:
    """Return an edit's default (width, height): its source image's, within bounds."""
    scale = min(max(1.0, MIN_SIDE / min(width, height)), MAX_SIDE / max(width, height))
    sides = [max(MIN_SIDE, CELL * math.floor(side * scale / CELL + 0.5)) for side in (width, height)]
    width, height = (min(side, MAX_ASPECT * min(sides)) for side in sides)
    return width, height


def limit_pixels(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    """Return the size, reduced to `max_pixels` (4096 or more) at about the same aspect."""
    if width * height <= max_pixels:
        return width, height
    scale = math.sqrt(max_pixels / (width * height))
    sides = [max(MIN_SIDE, CELL * math.floor(side * scale / CELL)) for side in (width, height)]
    width, height = (min(side, MAX_ASPECT * min(sides)) for side in sides)
    while width * height > max_pixels:  # a side was raised to MIN_SIDE
        width, height = (width - CELL, height) if width >= height else (width, height - CELL)
    return width, height


def source_tokens(width: int, height: int) -> int:
    """Bound the prompt tokens of a source image."""
    scale = min(max(1.0, ENLARGED_SIDE / min(width, height)), MAX_SIDE / max(width, height))
    return math.ceil(width * scale / CELL) * math.ceil(height * scale / CELL)
