"""The codebook of the plan: one code per cell of 32x32 pixels, of five kinds:

plain       colour
pixel text  colour behind text read from an image
line        cell of a line, first letter of its string, colour behind it
shape       shape, colour, cell of the shape
long line   cell of a line of narrow letters, half of the alphabet in which its string begins, colour behind it
"""

import numpy as np

COLOURS = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink", "white", "black")
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
MARKS = " !?&-."  # can be drawn, but are no initials
INITIALS = len(LETTERS) + 1
# Cells of a line: 0..7; 8..11 if it starts in the middle of a cell (four letters, else off the centre by half a cell).
SLOTS = 12
HALF_CELL_SLOT = 8
SMALL_PIECE = 16  # 0..15: 4x4 cells of a large shape, 16..19: 2x2 of a small one
PIECES = 20
# Cells of large shapes that are empty or one colour, so that codes for them are free.
NO_PIECES = {
    "circle": (5, 6, 9, 10), "square": (5, 6, 9, 10), "triangle": (0, 3, 4, 7), "star": (0, 3), "heart": (12, 15),
    "diamond": (0, 3, 12, 15), "cross": (0, 3, 12, 15),
}  # fmt: skip
LONG_SLOTS = 14  # cells of a long line: 0..5 of 11 or 12 letters; 6..13 of 13 or 14, from the middle of a cell on
LONG_HALF_CELL_SLOT = 6
HALVES = 2  # of the alphabet
FIRST_HALF = "ABCDEFGHIJKLM01234"

# First code of each kind; plain ones begin at 0.
PIXEL_TEXT = len(COLOURS)
LINE = PIXEL_TEXT + len(COLOURS)
SHAPE = LINE + SLOTS * INITIALS * len(COLOURS)
USED = SHAPE + len(SHAPES) * len(COLOURS) * PIECES
CODEBOOK = 6144
_FREE = [
    SHAPE + (SHAPES.index(kind) * len(COLOURS) + colour) * PIECES + piece
    for kind, pieces in NO_PIECES.items() for piece in pieces for colour in range(len(COLOURS))
] + list(range(USED, CODEBOOK))  # fmt: skip
LONG_LINE = tuple(_FREE[: LONG_SLOTS * HALVES * len(COLOURS)])
_LONG_LINE_INDEX = {code: index for index, code in enumerate(LONG_LINE)}
UNUSED = tuple(sorted(_FREE[len(LONG_LINE) :]))


def initial_of(text: str) -> int:
    """Return 0..35 for A-Z or 0-9 in front, 36 for others."""
    index = LETTERS.find(text[:1].upper()) if text else -1
    return index if index >= 0 else INITIALS - 1


def pixel_text(colour: int) -> int:
    return PIXEL_TEXT + colour


def line(slot: int, initial: int, colour: int) -> int:
    return LINE + (slot * INITIALS + initial) * len(COLOURS) + colour


def half_of(text: str) -> int:
    """Return the half of the alphabet in which a text begins."""
    return 0 if text[:1].upper() in tuple(FIRST_HALF) else 1


def long_line(slot: int, half: int, colour: int) -> int:
    return LONG_LINE[(slot * HALVES + half) * len(COLOURS) + colour]


def is_text(code: np.ndarray) -> np.ndarray:
    """Return which codes [...] stand for letters of the prompt."""
    return ((code >= LINE) & (code < SHAPE)) | np.isin(code, LONG_LINE)


def shape(kind: int, colour: int, piece: int) -> int:
    return SHAPE + (kind * len(COLOURS) + colour) * PIECES + piece


# Sizes of the factors; 0 is "none". Only strings of prompts have a length. Halves of the alphabet follow the initials,
# slots of long lines those of others.
FACTORS = {
    "kind": 6, "colour": 11, "initial": 1 + INITIALS + HALVES, "slot": 1 + SLOTS + LONG_SLOTS, "shape": 9,
    "piece": 1 + PIECES, "length": 15,
}  # fmt: skip


def factors(code: int) -> tuple[int, int, int, int, int, int, int]:
    """Return the factors of a code, in the order of `FACTORS`."""
    if code in _LONG_LINE_INDEX:
        rest, colour = divmod(_LONG_LINE_INDEX[code], len(COLOURS))
        slot, half = divmod(rest, HALVES)
        return 5, 1 + colour, 1 + INITIALS + half, 1 + SLOTS + slot, 0, 0, 0
    if code < PIXEL_TEXT:
        return 1, 1 + code, 0, 0, 0, 0, 0
    if code < LINE:
        return 2, 1 + code - PIXEL_TEXT, 0, 0, 0, 0, 0
    if code < SHAPE:
        rest, colour = divmod(code - LINE, len(COLOURS))
        slot, initial = divmod(rest, INITIALS)
        return 3, 1 + colour, 1 + initial, 1 + slot, 0, 0, 0
    if code < USED:
        rest, piece = divmod(code - SHAPE, PIECES)
        kind, colour = divmod(rest, len(COLOURS))
        return 4, 1 + colour, 0, 0, 1 + kind, 1 + piece, 0
    return 0, 0, 0, 0, 0, 0, 0
