"""Posters: up to three lines and two shapes, on a grid of 32-pixel cells.

The unit of the layout is one cell, or 2x2 and more on larger grids.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageDraw

from models.nano.recipe import codes

CELL = 32
ADVANCE, NARROW_ADVANCE = 24, 16  # pixels per letter at scale 1
WIDE_LETTERS, MAX_LETTERS = 10, 14  # the letters of longer lines are narrow; of MAX_LETTERS at most
HALF_CELL_LETTERS = 12  # longer lines begin in the middle of a cell
PALETTE = np.array(
    [(220, 40, 40), (245, 140, 30), (250, 215, 40), (40, 160, 70), (30, 170, 170), (40, 80, 210), (125, 55, 180),
     (245, 130, 180), (250, 250, 250), (20, 20, 20)],
    np.float32,
)  # fmt: skip
WHITE, BLACK = codes.COLOURS.index("white"), codes.COLOURS.index("black")
DARK_INK_ON = frozenset(codes.COLOURS.index(c) for c in ("orange", "yellow", "pink", "white"))
ALPHABET = codes.LETTERS + codes.MARKS
ATLAS = Path(__file__).with_name("letters.png")  # one row of 48x64 cells, in the order of ALPHABET

Side = Literal["left", "center", "right"]
Zone = Literal["headline", "subtitle", "middle", "footer"]
ZONES: tuple[Zone, ...] = get_args(Zone)


@dataclass(frozen=True)
class Line:
    """A line of text, on a bar or not."""

    text: str
    bar: int | None = None  # colour


@dataclass(frozen=True)
class Shape:
    kind: int
    colour: int
    large: bool
    side: Side = "center"


@dataclass(frozen=True)
class Poster:
    """A layout. A subtitle leaves room for small shapes only, a line in the middle for none."""

    background: int
    headline: Line | None = None
    footer: Line | None = None
    shapes: tuple[Shape, ...] = ()
    subtitle: Line | None = None
    middle: Line | None = None

    @property
    def lines(self) -> dict[Zone, Line]:
        """Return the lines by zone, from top to bottom."""
        return {zone: line for zone in ZONES if (line := getattr(self, zone))}

    def with_lines(self, lines: Mapping[Zone, Line]) -> "Poster":
        return replace(self, **lines)


@dataclass(frozen=True)
class PlacedLine:
    """A line on the grid."""

    line: Line
    zone: Zone
    row: int  # in cells
    rows: int
    x: int  # top left corner of the text, in pixels
    y: int
    scale: int
    advance: int  # pixels per letter at scale 1

    @property
    def pitch(self) -> int:
        """Return the pixels per letter."""
        return self.advance * self.scale


@dataclass(frozen=True)
class PlacedShape:
    shape: Shape
    row: int
    column: int
    cells: int  # side length


def scale_of(rows: int, columns: int) -> int:
    """Return the cells per unit of the layout."""
    return max(1, min(rows, columns) // 6)


def place(poster: Poster, rows: int, columns: int) -> tuple[list[PlacedLine], list[PlacedShape]]:
    """Lay a poster out on a grid of `rows` x `columns` cells."""
    scale = scale_of(rows, columns)
    unit_rows, unit_columns = rows // scale, columns // scale
    top, left = (rows - unit_rows * scale) // 2, (columns - unit_columns * scale) // 2
    edge = 1 if unit_rows >= 8 else 0
    row_of = {"headline": edge, "subtitle": edge + 1, "middle": (unit_rows - 1) // 2, "footer": unit_rows - 1 - edge}
    lines = [
        _place_line(line, zone, top + row_of[zone] * scale, scale, columns)
        for zone, line in poster.lines.items()
        if line.text
    ]
    shapes = []
    for shape in poster.shapes:
        # Two large shapes need 8 units of width, one 4.
        if unit_columns < (8 if len(poster.shapes) > 1 else 4) or unit_rows < 6:
            shape = replace(shape, large=False)
        units = 4 if shape.large else 2
        half = max(0, (unit_columns // 2 - units) // 2)
        column = {"left": half, "center": (unit_columns - units) // 2, "right": unit_columns - units - half}[shape.side]
        row = (unit_rows - units) // 2
        shapes.append(PlacedShape(shape, top + row * scale, left + column * scale, units * scale))
    return lines, shapes


def _place_line(line: Line, zone: Zone, row: int, rows: int, columns: int) -> PlacedLine:
    scale = rows
    advance = ADVANCE if len(line.text) <= WIDE_LETTERS else NARROW_ADVANCE
    letters = min(len(line.text), MAX_LETTERS)
    while scale > 1 and letters * advance > columns // scale * CELL:
        scale -= 1
    left = columns % scale // 2
    width = columns // scale * CELL
    line = replace(line, text=line.text[: min(MAX_LETTERS, width // advance)])  # the image may be too narrow
    middle = (width - len(line.text) * advance) // 2
    # Lines start with a cell: few codes are enough; see codes.SLOTS.
    nearest = min((middle + CELL // 2) // CELL, middle * 2 // CELL) * CELL
    if advance == NARROW_ADVANCE and len(line.text) > HALF_CELL_LETTERS and middle >= CELL // 2:
        nearest = (middle - CELL // 2) // CELL * CELL + CELL // 2
    x = middle if len(line.text) == 4 else nearest
    y = (row + (rows - scale) // 2) * CELL
    return PlacedLine(line, zone, row, rows, left * CELL + x * scale, y, scale, advance)


def plan(poster: Poster, rows: int, columns: int, from_pixels: Collection[Zone] = ()) -> np.ndarray:
    """Return the plan codes [rows, columns] int64 of a poster.

    Args:
        from_pixels: zones whose text is read from pixels, not taken from the prompt.
    """
    grid = np.full((rows, columns), poster.background, np.int64)
    lines, shapes = place(poster, rows, columns)
    for placed in lines:
        line, scale = placed.line, placed.scale
        colour = poster.background if line.bar is None else line.bar
        if line.bar is not None:
            grid[placed.row : placed.row + placed.rows] = line.bar
        is_from_pixels = placed.zone in from_pixels
        left = columns % scale // 2
        start = placed.x - left * CELL
        has_half_cell = start % (CELL * scale) > 0
        unit = start // (CELL * scale)
        pixels = start % (CELL * scale) // scale + len(line.text) * placed.advance
        y = placed.y // CELL
        for k in range(-(-pixels // CELL)):
            code = codes.pixel_text(colour) if is_from_pixels else _line_code(placed, has_half_cell, k, colour)
            x = left + (unit + k) * scale
            grid[y : y + scale, x : x + scale] = code
    for placed in shapes:
        _write_shape(grid, placed)
    return grid


def _line_code(placed: PlacedLine, has_half_cell: bool, cell: int, colour: int) -> int:
    text = placed.line.text
    if placed.advance == ADVANCE:
        return codes.line(cell + has_half_cell * codes.HALF_CELL_SLOT, codes.initial_of(text), colour)
    return codes.long_line(cell + has_half_cell * codes.LONG_HALF_CELL_SLOT, codes.half_of(text), colour)


def _write_shape(grid: np.ndarray, placed: PlacedShape) -> None:
    shape, units = placed.shape, 4 if placed.shape.large else 2
    scale = placed.cells // units
    cover = shape_mask(shape.kind, units * CELL).reshape(units, CELL, units, CELL)
    for i in range(units):
        for j in range(units):
            cell = cover[i, :, j]
            if cell.max() < 0.02:
                continue
            piece = i * 4 + j if shape.large else codes.SMALL_PIECE + i * 2 + j
            code = shape.colour if cell.min() > 0.98 else codes.shape(shape.kind, shape.colour, piece)
            y, x = placed.row + i * scale, placed.column + j * scale
            grid[y : y + scale, x : x + scale] = code


def draw(poster: Poster, width: int, height: int) -> np.ndarray:
    """Return pixels [height, width, 3] uint8, sides multiples of 32."""
    pixels = np.empty((height, width, 3), np.float32)
    pixels[:] = PALETTE[poster.background]
    lines, shapes = place(poster, height // CELL, width // CELL)
    for placed in lines:
        line = placed.line
        if line.bar is not None:
            pixels[placed.row * CELL : (placed.row + placed.rows) * CELL] = PALETTE[line.bar]
        ink = PALETTE[ink_colour(poster.background if line.bar is None else line.bar)]
        wide, high = placed.pitch, CELL * placed.scale
        for i, letter in enumerate(line.text.upper()):
            x = placed.x + i * wide
            mask = letter_mask(letter, placed.scale, placed.advance)
            _blend(pixels[placed.y : placed.y + high, x : x + wide], mask, ink)
    for placed in shapes:
        side, y, x = placed.cells * CELL, placed.row * CELL, placed.column * CELL
        _blend(pixels[y : y + side, x : x + side], shape_mask(placed.shape.kind, side), PALETTE[placed.shape.colour])
    return pixels.round().astype(np.uint8)


def _blend(region: np.ndarray, cover: np.ndarray, colour: np.ndarray) -> None:
    region += (colour - region) * cover[..., None]


def ink_colour(background: int) -> int:
    return BLACK if background in DARK_INK_ON else WHITE


@cache
def letter_mask(letter: str, scale: int = 1, advance: int = ADVANCE) -> np.ndarray:
    """Return the coverage [32 * scale, advance * scale] in 0..1, blank outside ALPHABET."""
    index = ALPHABET.find(letter)
    if index < 0:
        return np.zeros((CELL * scale, advance * scale), np.float32)
    with Image.open(ATLAS) as atlas:
        cell = atlas.convert("L").crop((index * 48, 0, index * 48 + 48, 64))
    resampling = Image.Resampling.BOX if scale < 2 else Image.Resampling.BICUBIC
    return np.asarray(cell.resize((advance * scale, CELL * scale), resampling), np.float32) / 255


@cache
def shape_mask(kind: int, side: int) -> np.ndarray:
    """Return the coverage [side, side] in 0..1, averaged from a drawing four times as large."""
    fine = side * 4
    image = Image.new("L", (fine, fine), 0)
    pen = ImageDraw.Draw(image)
    near, far, middle = fine * 0.07, fine * 0.93, fine / 2
    radius = middle - near
    name = codes.SHAPES[kind]
    if name in ("circle", "ring"):
        pen.ellipse([near, near, far, far], fill=255)
        if name == "ring":
            inner = radius * 0.52
            pen.ellipse([middle - inner, middle - inner, middle + inner, middle + inner], fill=0)
    elif name == "square":
        inset = fine * 0.04
        pen.rectangle([near + inset, near + inset, far - inset, far - inset], fill=255)
    elif name == "triangle":
        pen.polygon([(middle, near), (far, far - fine * 0.04), (near, far - fine * 0.04)], fill=255)
    elif name == "star":
        angles = np.pi * np.arange(10) / 5 - np.pi / 2
        radii = radius * np.where(np.arange(10) % 2, 0.42, 1.03)
        x, y = middle + radii * np.cos(angles), middle + fine * 0.02 + radii * np.sin(angles)
        pen.polygon(list(zip(x, y, strict=True)), fill=255)
    elif name == "heart":
        t = np.linspace(0, 2 * np.pi, 400)
        x = 16 * np.sin(t) ** 3
        y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
        pen.polygon(list(zip(middle + x * radius / 17, middle + (y - 2) * radius / 17, strict=True)), fill=255)
    elif name == "diamond":
        inset = fine * 0.07
        pen.polygon([(middle, near), (far - inset, middle), (middle, far), (near + inset, middle)], fill=255)
    elif name == "cross":
        arm = fine * 0.14
        pen.rectangle([middle - arm, near, middle + arm, far], fill=255)
        pen.rectangle([near, middle - arm, far, middle + arm], fill=255)
    return np.asarray(image.resize((side, side), Image.Resampling.BOX), np.float32) / 255
