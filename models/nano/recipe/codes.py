"""The codebook of the plan: one code per cell of 32x32 pixels, of four kinds:

plain       colour
pixel text  colour behind text read from an image
line        cell of a line, first letter of its string, colour behind it
shape       shape, colour, cell of the shape
"""

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

# First code of each kind; plain ones begin at 0.
PIXEL_TEXT = len(COLOURS)
LINE = PIXEL_TEXT + len(COLOURS)
SHAPE = LINE + SLOTS * INITIALS * len(COLOURS)
USED = SHAPE + len(SHAPES) * len(COLOURS) * PIECES
CODEBOOK = 6144


def initial_of(text: str) -> int:
    """Return 0..35 for A-Z or 0-9 in front, 36 for others."""
    index = LETTERS.find(text[:1].upper()) if text else -1
    return index if index >= 0 else INITIALS - 1


def pixel_text(colour: int) -> int:
    return PIXEL_TEXT + colour


def line(slot: int, initial: int, colour: int) -> int:
    return LINE + (slot * INITIALS + initial) * len(COLOURS) + colour


def shape(kind: int, colour: int, piece: int) -> int:
    return SHAPE + (kind * len(COLOURS) + colour) * PIECES + piece


# Sizes of the factors; 0 is "none". Only strings of prompts have a length.
FACTORS = {
    "kind": 5, "colour": 11, "initial": 1 + INITIALS, "slot": 1 + SLOTS, "shape": 9, "piece": 1 + PIECES, "length": 11,
}  # fmt: skip


def factors(code: int) -> tuple[int, int, int, int, int, int, int]:
    """Return the factors of a code, in the order of `FACTORS`."""
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
