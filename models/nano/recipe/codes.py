"""The codebook of the nano checkpoint: what each plan code means.

A plan has one code per 32x32 pixels. Four kinds of cells are enough for a poster:

    plain   one colour all over
    seen    text on a colour, as it can be told from pixels: the letters are in the picture, not in the code
    line    a piece of a lettered line: which cell of the line, which letter the string begins with, on which colour.
            The letters themselves are not in the plan: the renderer takes them from the glyph encoder's string that
            begins so
    shape   a piece of a shape: which shape, its colour, which cell of it
"""

COLOURS = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink", "white", "black")
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
MARKS = " !?&-."  # lettered as well; a string that begins with one counts as "other"
INITIALS = len(LETTERS) + 1
# Cells of a line: 0..7 where it starts with a cell, 8..11 where it starts in the middle of one (words of four letters,
# which would otherwise stand half a cell off the centre).
SLOTS = 12
HALF_CELL_SLOT = 8
SMALL_PIECE = 16  # pieces of a shape: 0..15 the 4x4 cells of a large one, 16..19 the 2x2 cells of a small one
PIECES = 20

SEEN = len(COLOURS)
LINE = SEEN + len(COLOURS)
SHAPE = LINE + SLOTS * INITIALS * len(COLOURS)
USED = SHAPE + len(SHAPES) * len(COLOURS) * PIECES
CODEBOOK = 6144


def initial_of(text: str) -> int:
    """0..35 for a string that begins with A-Z or 0-9, 36 for any other."""
    at = LETTERS.find(text[:1].upper()) if text else -1
    return at if at >= 0 else INITIALS - 1


def seen(colour: int) -> int:
    return SEEN + colour


def line(slot: int, initial: int, colour: int) -> int:
    return LINE + (slot * INITIALS + initial) * len(COLOURS) + colour


def shape(kind: int, colour: int, piece: int) -> int:
    return SHAPE + (kind * len(COLOURS) + colour) * PIECES + piece


# Columns of `factors`; 0 stands for "does not apply" in each. No code has a length: the prompt's strings do.
FACTORS = {
    "kind": 5, "colour": 11, "initial": 1 + INITIALS, "slot": 1 + SLOTS, "shape": 9, "piece": 1 + PIECES, "length": 11,
}  # fmt: skip


def factors(code: int) -> tuple[int, int, int, int, int, int, int]:
    """What a code is made of, in the order of `FACTORS`: training shares one vector between all codes that agree."""
    if code < SEEN:
        return 1, 1 + code, 0, 0, 0, 0, 0
    if code < LINE:
        return 2, 1 + code - SEEN, 0, 0, 0, 0, 0
    if code < SHAPE:
        rest, colour = divmod(code - LINE, len(COLOURS))
        slot, initial = divmod(rest, INITIALS)
        return 3, 1 + colour, 1 + initial, 1 + slot, 0, 0, 0
    if code < USED:
        rest, piece = divmod(code - SHAPE, PIECES)
        kind, colour = divmod(rest, len(COLOURS))
        return 4, 1 + colour, 0, 0, 1 + kind, 1 + piece, 0
    return 0, 0, 0, 0, 0, 0, 0
