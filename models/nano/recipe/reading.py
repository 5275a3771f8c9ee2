"""Posters read back from pixels, to score what the model drew.

By template matching: of all lengths of a line, shapes and arrangements, those with the least error.
"""

from itertools import product

import numpy as np

from models.nano.recipe import codes, world
from models.nano.recipe.world import ADVANCE, ALPHABET, CELL, PALETTE, Line, Poster, Shape, Side, Zone

INK_SHARE = 0.01  # of a line's pixels; below, no text
SHAPE_SHARE = 0.004  # of the middle's pixels; below, no shape
SPACE_INK = 0.04  # of a letter's pixels; below, a space


def read(image: np.ndarray) -> Poster:
    """Return the poster in an image [height, width, 3] uint8, sides multiples of 32."""
    pixels = image.astype(np.float32)
    height, width = image.shape[:2]
    rows, columns = height // CELL, width // CELL
    background = nearest(np.median(pixels[: CELL - 4].reshape(-1, 3), 0))
    headline, footer = (_read_line(pixels, rows, columns, background, zone) for zone in world.ZONES)
    return Poster(background, headline, footer, _read_shapes(pixels, rows, columns, background))


def nearest(colour: np.ndarray) -> int:
    """Return the palette's nearest colour."""
    return int(((PALETTE - colour) ** 2).sum(1).argmin())


def _place_text(rows: int, columns: int, zone: Zone, text: str) -> world.PlacedLine:
    line = Line(text)
    poster = Poster(0, headline=line) if zone == "headline" else Poster(0, footer=line)
    return world.place(poster, rows, columns)[0][0]


def _read_line(pixels: np.ndarray, rows: int, columns: int, background: int, zone: Zone) -> Line | None:
    first = _place_text(rows, columns, zone, "X")
    band = pixels[first.row * CELL : (first.row + first.rows) * CELL]
    # Text never touches the band's first and last pixels.
    edge = np.concatenate([band[: 3 * first.rows], band[-3 * first.rows :]]).reshape(-1, 3)
    colour = nearest(np.median(edge, 0))
    bar = colour if colour != background else None
    ink = _share_of(band, PALETTE[colour], PALETTE[world.ink_colour(colour)])
    if ink.mean() < INK_SHARE:
        return Line("", bar) if bar is not None else None
    best, text = -np.inf, ""
    for letters in range(1, world.MAX_LETTERS + 1):
        placed = _place_text(rows, columns, zone, "X" * letters)
        if placed.x < 0 or placed.x + letters * ADVANCE * placed.scale > band.shape[1]:
            continue
        error, found = _match(ink, placed, letters)
        if -error > best and found.strip():
            best, text = -error, found
    return Line(text.rstrip(), bar)


def _share_of(band: np.ndarray, colour: np.ndarray, ink: np.ndarray) -> np.ndarray:
    """Return the ink's share [h, w] in 0..1 of each pixel."""
    difference = ink - colour
    return np.clip(((band - colour) @ difference) / (difference @ difference), 0, 1)


def _match(ink: np.ndarray, placed: world.PlacedLine, letters: int) -> tuple[float, str]:
    """Return the squared error of the best letters, and these."""
    wide, high = ADVANCE * placed.scale, CELL * placed.scale
    y = placed.y - placed.row * CELL
    templates = np.stack([world.letter_mask(letter, placed.scale) for letter in ALPHABET])
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


def _read_shapes(pixels: np.ndarray, rows: int, columns: int, background: int) -> tuple[Shape, ...]:
    scale = world.scale_of(rows, columns)
    unit_rows = rows // scale
    top = (rows - unit_rows * scale) // 2 + (2 if unit_rows >= 8 else 1) * scale
    bottom = rows - top
    middle = np.zeros(pixels.shape[:2], np.float32)
    inside = pixels[top * CELL : bottom * CELL]
    middle[top * CELL : bottom * CELL] = np.linalg.norm(inside - PALETTE[background], axis=-1) > 60
    if middle.mean() < SHAPE_SHARE:
        return ()
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
            solid = pixels[box][masks[kind] > 0.9]
            shapes.append(Shape(kind, nearest(np.median(solid, 0)), shape.large, shape.side))
        error = float((rest**2).sum())
        if error < best:
            best, found = error, tuple(shapes)
    return found


def _arrangements() -> list[tuple[Shape, ...]]:
    """Return all arrangements; kinds and colours are placeholders."""
    sides: tuple[Side, ...] = ("left", "center", "right")
    single = [(Shape(0, 0, large, side),) for large, side in product((False, True), sides)]
    return single + [(Shape(0, 0, large, "left"), Shape(0, 0, large, "right")) for large in (False, True)]
