"""Random posters, prompts that describe them, and edits.

Words and combinations are split by hash: the `held_out` ones are for scoring only.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Literal

from models.nano.recipe import codes
from models.nano.recipe.world import BLACK, WHITE, WIDE_LETTERS, ZONES, Line, Poster, Shape, Side, Zone

Split = Literal["train", "held-out"]
HELD_OUT_SHARE = 0.15

WORDS = """SALE OPEN HELLO NEWS LOVE MUSIC JAZZ ROCK PARTY DANCE SUMMER WINTER SPRING AUTUMN FREE BEST COFFEE TEA PIZZA
BOOK MOVIE NIGHT LIVE SHOW ART EXPO 2024 2025 2026 50 100 24H TODAY NOW WOW YES STOP GO HOME WORK PLAY GAME RUN FAST
SLOW BIG SMALL RED HOT COLD ICE FIRE WATER EARTH WIND SUN MOON STAR SKY SEA LAKE RIVER FOREST TREE GARDEN FLOWER ROSE
LILY DOG CAT BIRD FISH LION TIGER BEAR WOLF KING QUEEN HERO MAGIC DREAM HOPE PEACE JOY SMILE HAPPY LUCKY SUPER ULTRA
MEGA MAXI MINI TURBO POWER SPEED SPACE ROBOT LASER PIXEL CODE DATA CLOUD TECH LAB ZONE CLUB BAR CAFE SHOP STORE MARKET
FAIR FEST WEEK DAY YEAR JUNE JULY MAY MARCH APRIL CITY TOWN PARIS ROME TOKYO BERLIN LONDON OSLO NYC LA UK USA EURO WORLD
GLOBAL GLIMMER WELCOME GOODBYE FESTIVAL CONCERT BREAKFAST CHOCOLATE""".split()  # noqa: SIM905
OTHER_COLOUR_WORDS = {
    "crimson": "red", "scarlet": "red", "lemon": "yellow", "golden": "yellow", "emerald": "green", "turquoise": "teal",
    "navy": "blue", "violet": "purple", "rose": "pink", "snow": "white", "ivory": "white", "dark": "black",
}  # fmt: skip
OTHER_SHAPE_WORDS = {"disc": "circle", "box": "square", "rhombus": "diamond", "plus": "cross", "donut": "ring"}
LARGE_WORDS = ("large", "big", "huge", "giant")
SMALL_WORDS = ("small", "little", "tiny")
STYLES = ("simple", "flat", "bold", "clean", "minimal", "modern", "retro", "bright", "plain", "nice", "beautiful")
TRAILERS = (
    "minimal design", "flat design", "high contrast", "clean layout", "sharp lettering", "for a shop window",
    "high quality", "modern style", "with lots of space", "vector art", "please",
)  # fmt: skip
DEFAULT_BACKGROUND = WHITE  # of a poster whose prompt names none


def default_colour(background: int) -> int:
    """Return a shape's colour if the prompt names none."""
    blue, yellow = codes.COLOURS.index("blue"), codes.COLOURS.index("yellow")
    return yellow if background in (blue, BLACK, codes.COLOURS.index("purple")) else blue


def held_out(value: str) -> bool:
    """Return whether a word, or the description of a combination, is kept out of training."""
    return hashlib.blake2b(value.encode(), digest_size=4).digest()[0] < 256 * HELD_OUT_SHARE


def combination(poster: Poster) -> str:
    """Return a description of the poster without its words."""
    bars = [line.bar if line else -1 for line in (poster.headline, poster.footer)]
    return f"{poster.background}|{bars}|" + ";".join(f"{s.kind},{s.colour},{s.large},{s.side}" for s in poster.shapes)


def random_word(rng: Random, split: Split) -> str:
    """Return 1 to 10 characters: words, letters, digits, marks."""
    while True:
        if rng.random() < 0.35:
            word = rng.choice(WORDS)
        else:
            letters = codes.LETTERS if rng.random() < 0.5 else codes.LETTERS[:26]
            word = "".join(
                rng.choice(letters) for _ in range(rng.choice((1, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 10)))
            )
        if split == "train" and rng.random() < 0.12:
            word = _with_mark(word, rng)
        if len(word) <= WIDE_LETTERS and held_out(word) == (split == "held-out"):
            return word


def _with_mark(word: str, rng: Random) -> str:
    if rng.random() < 0.4:
        return word + rng.choice("!?.")
    middle = rng.choice((" ", " ", " ", "-", "&"))
    return word + middle + rng.choice(WORDS) if len(word) > 2 else word + middle + rng.choice(codes.LETTERS)


def random_poster(rng: Random, split: Split = "train") -> Poster:
    """Return a poster whose words and combination are of this split."""
    while True:
        poster = _random_poster(rng, split)
        if held_out(combination(poster)) == (split == "held-out"):
            return poster


def _random_poster(rng: Random, split: Split) -> Poster:
    background = rng.randrange(len(codes.COLOURS))
    others = [c for c in range(len(codes.COLOURS)) if c != background]

    def line() -> Line:
        return Line(random_word(rng, split), rng.choice(others) if rng.random() < 0.4 else None)

    headline = line() if rng.random() < 0.9 else None
    footer = line() if rng.random() < 0.75 or headline is None else None
    kinds = range(len(codes.SHAPES))
    count = rng.choices((0, 1, 2), (0.04, 0.62, 0.34))[0]
    if count == 2:
        large = rng.random() < 0.4
        sides: tuple[Side, ...] = ("left", "right")
        shapes = tuple(Shape(rng.choice(kinds), rng.choice(others), large, side) for side in sides)
    else:
        side = rng.choice(("center", "center", "center", "left", "right"))
        shapes = tuple(Shape(rng.choice(kinds), rng.choice(others), rng.random() < 0.6, side) for _ in range(count))
    return Poster(background, headline, footer, shapes)


# --- English -----------------------------------------------------------------------------------------------------


def colour_word(colour: int, rng: Random) -> str:
    name = codes.COLOURS[colour]
    others = [word for word, means in OTHER_COLOUR_WORDS.items() if means == name]
    return rng.choice(others) if others and rng.random() < 0.06 else name


def shape_word(kind: int, rng: Random) -> str:
    name = codes.SHAPES[kind]
    others = [word for word, means in OTHER_SHAPE_WORDS.items() if means == name]
    return rng.choice(others) if others and rng.random() < 0.15 else name


def with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def quoted(text: str, rng: Random) -> str:
    if rng.random() < 0.15:
        text = text.lower() if rng.random() < 0.5 else text.capitalize()
    before, after = rng.choice(('""', '""', '""', "''", "“”", "「」"))
    return before + text + after


def _bar(line: Line, rng: Random) -> str:
    if line.bar is None:
        return ""
    bar = colour_word(line.bar, rng) + rng.choice((" bar", " bar", " band", " strip", " banner", " stripe"))
    return rng.choice((" on ", " over ", " in front of ", " with ")) + with_article(bar)


def _headline(line: Line, rng: Random) -> str:
    text, bar = quoted(line.text, rng), _bar(line, rng)
    return rng.choice((
        f"top headline {text}{bar}", f"top headline {text}{bar}", f"headline {text}{bar}", f"the headline {text}{bar}",
        f"headline {text}{bar} at the top", f"the title {text}{bar} at the top", f"title {text}{bar}",
        f"the word {text}{bar} on top", f"header {text}{bar}", f"at the top {text}{bar}", f"top text {text}{bar}",
        f"a headline that says {text}{bar}", f"the words {text}{bar} at the top", f"top: {text}{bar}",
    ))  # fmt: skip


def _footer(line: Line, rng: Random) -> str:
    text, bar = quoted(line.text, rng), _bar(line, rng)
    return rng.choice((
        f"bottom footer {text}{bar}", f"bottom footer {text}{bar}", f"footer {text}{bar}", f"the footer {text}{bar}",
        f"footer text {text}{bar} at the bottom", f"the text {text}{bar} at the bottom", f"bottom line {text}{bar}",
        f"at the bottom {text}{bar}", f"a footer that says {text}{bar}", f"bottom text {text}{bar}",
        f"the word {text}{bar} below", f"bottom: {text}{bar}",
    ))  # fmt: skip


def _shape(shape: Shape, background: int, rng: Random, sized: bool) -> str:
    words = [colour_word(shape.colour, rng), shape_word(shape.kind, rng)]
    if shape.colour == default_colour(background) and rng.random() < 0.3:
        del words[0]
    if not shape.large:
        words.insert(0, rng.choice(SMALL_WORDS))
    elif sized:
        words.insert(0, rng.choice(LARGE_WORDS))
    return with_article(" ".join(words))


def _hero(shapes: tuple[Shape, ...], background: int, rng: Random) -> str:
    """Return a phrase for the shapes. Large ones need no size, the left one no place."""
    sized = rng.random() < 0.5
    if len(shapes) == 1:
        text = _shape(shapes[0], background, rng, sized)
        if shapes[0].side != "center":
            return text + rng.choice((" on the ", " at the ", " to the ")) + shapes[0].side
        return rng.choice((
            text, text + " in the center", text + " in the middle", text + " as the hero", f"center hero {text}",
            f"center {text}", f"in the center {text}", f"centered {text[2:].strip()}",
        ))  # fmt: skip
    order = list(shapes)
    if rng.random() < 0.5:
        both = [_shape(s, background, rng, sized) for s in order]
        prefix = rng.choice(("", "", "", "center ", "in the middle "))
        return prefix + rng.choice((" and ", " next to ", " beside ", " and ")).join(both)
    if rng.random() < 0.3:
        order.reverse()
    return " and ".join(_shape(s, background, rng, sized) + f" on the {s.side}" for s in order)


def describe(poster: Poster, rng: Random) -> str:
    """Return a prompt: zones in any order, synonyms, filler."""
    background = colour_word(poster.background, rng)
    style = rng.choice(STYLES)
    a_background = with_article(background)
    opening = rng.choice((
        f"{a_background} poster", f"a poster with {a_background} background", f"{a_background} background poster",
        f"poster, {background} background", f"a {style} {background} poster", f"poster on {a_background} background",
        f"a {style} poster with {a_background} background", f"{background} poster", f"make {a_background} poster",
        f"{background} background",
    ))  # fmt: skip
    if poster.background == DEFAULT_BACKGROUND and rng.random() < 0.3:
        opening = rng.choice(
            ("a poster", "poster", f"a {style} poster", "make a poster", "create a poster", "an image")
        )
    parts = []
    if poster.headline:
        parts.append(_headline(poster.headline, rng))
    if poster.shapes:
        parts.append(_hero(poster.shapes, poster.background, rng))
    if poster.footer:
        parts.append(_footer(poster.footer, rng))
    if rng.random() < 0.35:
        rng.shuffle(parts)
    if not parts:
        return _finish(opening, rng)
    joined = rng.choice((", ", ", ", ", ", "; ", ". ")).join(parts[:-1])
    text = rng.choice((", ", ", and ", " and ")).join((joined, parts[-1])) if joined else parts[-1]
    if rng.random() < 0.1:
        return _finish(text + rng.choice((", ", " on ")) + (
            a_background + " background" if "background" in opening or background in opening else opening
        ), rng)  # fmt: skip
    return _finish(opening + rng.choice((" with ", ", ", ": ", ", with ", ". ")) + text, rng)


def _finish(text: str, rng: Random) -> str:
    if rng.random() < 0.25:
        text += ", " + rng.choice(TRAILERS)
    if rng.random() < 0.3:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.3 else text


# --- Edits -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edit:
    """An instruction, the poster before and after it, and zones whose lines stay."""

    instruction: str
    before: Poster
    after: Poster
    kept_zones: frozenset[Zone]


def random_edit(rng: Random, split: Split = "train") -> Edit:
    while True:
        before = random_poster(rng, split)
        kinds: list[Callable[[Poster, Random, Split], tuple[str, Poster] | None]] = [
            _change_background, _recolour_shape, _replace_shape, _change_headline, _change_footer,
        ]  # fmt: skip
        change = rng.choice(kinds)(before, rng, split)
        if change is None:
            continue
        instruction, after = change
        kept_zones: frozenset[Zone] = frozenset(
            zone for zone in ZONES if getattr(after, zone) and getattr(after, zone) == getattr(before, zone)
        )
        return Edit(_finish(instruction, rng), before, after, kept_zones)


def _change_background(poster: Poster, rng: Random, split: Split) -> tuple[str, Poster] | None:
    taken = {poster.background} | {s.colour for s in poster.shapes}
    taken |= {line.bar for line in (poster.headline, poster.footer) if line and line.bar is not None}
    colour = rng.choice([c for c in range(len(codes.COLOURS)) if c not in taken])
    word = colour_word(colour, rng)
    return rng.choice((
        f"make the background {word}", f"change the background to {word}", f"{word} background",
        f"set the background to {word}", f"turn the background {word}", f"change the background color to {word}",
        f"use a {word} background", f"replace the background with {word}",
    )), replace(poster, background=colour)  # fmt: skip


def _named(poster: Poster, index: int, rng: Random) -> str:
    """Return a name for one of the shapes in an instruction."""
    shape = poster.shapes[index]
    names = [shape_word(shape.kind, rng)] if sum(s.kind == shape.kind for s in poster.shapes) == 1 else []
    if len(poster.shapes) == 1:
        names.append("shape")
    else:
        names.append(f"{shape.side} shape")
        names.append(f"shape on the {shape.side}")
    return rng.choice(names[:1] * 2 + names)


def _swap(poster: Poster, index: int, shape: Shape) -> Poster:
    return replace(poster, shapes=(*poster.shapes[:index], shape, *poster.shapes[index + 1 :]))


def _recolour_shape(poster: Poster, rng: Random, split: Split) -> tuple[str, Poster] | None:
    if not poster.shapes:
        return None
    index = rng.randrange(len(poster.shapes))
    old = poster.shapes[index]
    colour = rng.choice([c for c in range(len(codes.COLOURS)) if c not in (old.colour, poster.background)])
    name, word = _named(poster, index, rng), colour_word(colour, rng)
    return rng.choice((
        f"make the {name} {word}", f"change the {name} to {word}", f"recolor the {name} to {word}",
        f"turn the {name} {word}", f"paint the {name} {word}", f"change the color of the {name} to {word}",
        f"the {name} should be {word}",
    )), _swap(poster, index, replace(old, colour=colour))  # fmt: skip


def _replace_shape(poster: Poster, rng: Random, split: Split) -> tuple[str, Poster] | None:
    if not poster.shapes:
        return None
    index = rng.randrange(len(poster.shapes))
    old = poster.shapes[index]
    kind = rng.choice([k for k in range(len(codes.SHAPES)) if k not in {s.kind for s in poster.shapes}])
    name, word = _named(poster, index, rng), shape_word(kind, rng)
    new = replace(old, kind=kind)
    if rng.random() < 0.3:
        colour = rng.choice([c for c in range(len(codes.COLOURS)) if c != poster.background])
        new, word = replace(new, colour=colour), f"{colour_word(colour, rng)} {word}"
    return rng.choice((
        f"replace the {name} with {with_article(word)}", f"replace the {name} by {with_article(word)}",
        f"change the {name} into {with_article(word)}", f"turn the {name} into {with_article(word)}",
        f"swap the {name} for {with_article(word)}", f"make the {name} {with_article(word)}",
        f"change the {name} to {with_article(word)}",
    )), _swap(poster, index, new)  # fmt: skip


def _change_headline(poster: Poster, rng: Random, split: Split) -> tuple[str, Poster] | None:
    bar = poster.headline.bar if poster.headline else None
    word = random_word(rng, split)
    name = rng.choice(("headline", "headline", "top headline", "title", "header", "text at the top", "top text"))
    return _change_line(name, word, rng), replace(poster, headline=Line(word, bar))


def _change_footer(poster: Poster, rng: Random, split: Split) -> tuple[str, Poster] | None:
    bar = poster.footer.bar if poster.footer else None
    word = random_word(rng, split)
    name = rng.choice(("footer", "footer", "bottom footer", "bottom line", "text at the bottom", "bottom text"))
    return _change_line(name, word, rng), replace(poster, footer=Line(word, bar))


def _change_line(name: str, word: str, rng: Random) -> str:
    text = quoted(word, rng)
    return rng.choice((
        f"change the {name} to {text}", f"replace the {name} with {text}", f"make the {name} say {text}",
        f"set the {name} to {text}", f"the {name} should say {text}", f"write {text} as the {name}",
        f"replace the {name} by {text}", f"{name} {text}", f"new {name} {text}",
    ))  # fmt: skip
