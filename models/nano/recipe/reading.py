"""Posters read back from pixels, to score what the model drew.

By template matching: of all lengths of a line, shapes and arrangements, those with the least error.
"""

from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from models.nano.recipe import codes, world
from models.nano.recipe.world import ALPHABET, CELL, PALETTE, Line, Poster, Shape, Side, Zone

INK_SHARE = 0.01  # of a line's pixels; below, no text
SHAPE_SHARE = 0.004  # of the middle's pixels; below, no shape
SPACE_INK = 0.04  # of a letter's pixels; below, a space


def read(image: np.ndarray) -> Poster:
    """Return the poster in an image [height, width, 3] uint8, sides multiples of 32.

    Between headline and footer there are shapes, a subtitle and shapes, or a line: what leaves the least error.
    """
    pixels = image.astype(np.float32)
    height, width = image.shape[:2]
    rows, columns = height // CELL, width // CELL
    background = nearest(np.median(pixels[: CELL - 4].reshape(-1, 3), 0))
    lines = {zone: _read_line(pixels, rows, columns, background, zone) for zone in world.ZONES}
    poster = Poster(background, lines["headline"].line, lines["footer"].line)
    between = _between(pixels, rows, columns, background)
    error, shapes = _read_shapes(pixels, between, rows, columns, background)
    found = [(error, replace(poster, shapes=shapes))]
    for zone in ("subtitle", "middle"):
        read_line = lines[zone]
        if read_line.line:
            rest = between.copy()
            rest[read_line.row * CELL : (read_line.row + read_line.rows) * CELL] = 0
            error, shapes = float(rest.sum()), ()
            if zone == "subtitle":
                error, shapes = _read_shapes(pixels, rest, rows, columns, background)
            found.append((error + read_line.error, replace(poster, shapes=shapes, **{zone: read_line.line})))
    return min(found, key=lambda each: each[0])[1]


@dataclass(frozen=True)
class _ReadLine:
    line: Line | None
    row: int  # of the zone, in cells
    rows: int
    error: float = 0.0  # squared, of the ink's shares


def nearest(colour: np.ndarray) -> int:
    """Return the palette's nearest colour."""
    return int(((PALETTE - colour) ** 2).sum(1).argmin())


def _place_text(rows: int, columns: int, zone: Zone, text: str) -> world.PlacedLine:
    return world.place(Poster(0).with_lines({zone: Line(text)}), rows, columns)[0][0]


def _read_line(pixels: np.ndarray, rows: int, columns: int, background: int, zone: Zone) -> _ReadLine:
    first = _place_text(rows, columns, zone, "X")
    band = pixels[first.row * CELL : (first.row + first.rows) * CELL]
    # Text never touches the band's first and last pixels.
    edge = np.concatenate([band[: 3 * first.rows], band[-3 * first.rows :]]).reshape(-1, 3)
    colour = nearest(np.median(edge, 0))
    bar = colour if colour != background else None
    ink = _share_of(band, PALETTE[colour], PALETTE[world.ink_colour(colour)])
    if ink.mean() < INK_SHARE:
        return _ReadLine(Line("", bar) if bar is not None else None, first.row, first.rows)
    best, text = np.inf, ""
    for letters in range(1, world.MAX_LETTERS + 1):
        placed = _place_text(rows, columns, zone, "X" * letters)
        if placed.x < 0 or placed.x + letters * placed.pitch > band.shape[1]:
            continue
        error, found = _match(ink, placed, letters)
        if error < best and found.strip():
            best, text = error, found
    return _ReadLine(Line(text.rstrip(), bar), first.row, first.rows, best)


def _share_of(band: np.ndarray, colour: np.ndarray, ink: np.ndarray) -> np.ndarray:
    """Return the ink's share [h, w] in 0..1 of each pixel."""
    difference = ink - colour
    return np.clip(((band - colour) @ difference) / (difference @ difference), 0, 1)


def _match(ink: np.ndarray, placed: world.PlacedLine, letters: int) -> tuple[float, str]:
    """Return the squared error of the best letters, and these."""
    wide, high = placed.pitch, CELL * placed.scale
    y = placed.y - placed.row * CELL
    templates = np.stack([world.letter_mask(letter, placed.scale, placed.advance) for letter in ALPHABET])
    rest = ink.copy()
    text = ""
    for i in range(letters):
        x = placed.x + i * wide
        cell = ink[y : y + high, x : x + wide]
        best = int(((templates - cell) ** 2).sum((1, 2)).argmin())
        if cell.mean() < SPACE_INK and ALPHABET[best] not in ".-":
            best = ALPHABET.index(" ")
        rest[y : y + high, x : x + wide] -= templates[best]
        text += ALPHABET[best]
    return float((rest**2).sum()), text


def _between(pixels: np.ndarray, rows: int, columns: int, background: int) -> np.ndarray:
    """Return 1 for pixels [h, w] between headline and footer that have another colour than the background, else 0."""
    scale = world.scale_of(rows, columns)
    unit_rows = rows // scale
    top = (rows - unit_rows * scale) // 2 + (2 if unit_rows >= 8 else 1) * scale
    bottom = rows - top
    between = np.zeros(pixels.shape[:2], np.float32)
    inside = pixels[top * CELL : bottom * CELL]
    between[top * CELL : bottom * CELL] = np.linalg.norm(inside - PALETTE[background], axis=-1) > 60
    return between


def _read_shapes(
    pixels: np.ndarray, middle: np.ndarray, rows: int, columns: int, background: int
) -> tuple[float, tuple[Shape, ...]]:
    """Return the squared error of the shapes that fit `middle` best, and these."""
    if middle.mean() < SHAPE_SHARE:
        return float(middle.sum()), ()
    best, found = np.inf, ()
    for arrangement in _arrangements():
        placed = world.place(Poster(background, shapes=arrangement), rows, columns)[1]
        rest, shapes = middle.copy(), []
        for shape, place in zip(arrangement, placed, strict=True):
            box = (slice(place.row * CELL, (place.row + place.cells) * CELL),
                   slice(place.column * CELL, (place.column + place.cells) * CELL))  # fmt: skip
            masks = np.stack([world.shape_mask(kind, place.cells * CELL) for kind in range(len(codes.SHAPES))])
            kind = int(((masks - middle[box]) ** 2).sum((1, 2)).argmin())
            rest[box] -= masks[kind]
            solid = pixels[box][(masks[kind] > 0.9) & (middle[box] > 0)]
            if not len(solid):
                break
            shapes.append(Shape(kind, nearest(np.median(solid, 0)), shape.large, shape.side))
        error = float((rest**2).sum())
        if error < best and len(shapes) == len(arrangement):
            best, found = error, tuple(shapes)
    return best, found


def _arrangements() -> list[tuple[Shape, ...]]:
    """Return all arrangements; kinds and colours are placeholders."""
    sides: tuple[Side, ...] = ("left", "center", "right")
    single = [(Shape(0, 0, large, side),) for large, side in product((False, True), sides)]
    return single + [(Shape(0, 0, large, "left"), Shape(0, 0, large, "right")) for large in (False, True)]
