"""Random posters for the free prompts, and which of their facts a prompt leaves open.

Open facts vary with the seed. A plan is sampled cell by cell, and sampling drops options below about 0.3, so the first
cell that decides a fact has to have few or equally likely options: backgrounds are uniform, colours are one of four
that stand out, and the odds of each place and size in turn are near even.
"""

import re
from collections import Counter
from dataclasses import replace
from random import Random

from models.nano.recipe import codes, prompts
from models.nano.recipe.facts import COLOUR_FACTS, Fact, Facts
from models.nano.recipe.phrases import COLOUR_WORDS
from models.nano.recipe.prompts import (
    LARGE_WORDS,
    WORDS,
    Split,
    combination,
    default_colour,
    held_out,
    random_word,
)
from models.nano.recipe.world import MAX_LETTERS, WIDE_LETTERS, Line, Poster, Shape, Side, Zone

QUOTED = re.compile(r"\"[^\"]*\"|(?<![a-zA-Z])'[^']*'|“[^”]*”|「[^」]*」")
COLOUR_INDEX = {word: codes.COLOURS.index(name) for word, name in COLOUR_WORDS.items()}
COLOUR_INDEX |= {name: index for index, name in enumerate(codes.COLOURS)}
_CONTRASTS = {
    "red": "yellow white black teal", "orange": "blue black white purple", "yellow": "red blue black purple",
    "green": "yellow white black pink", "teal": "yellow white black red", "blue": "yellow white orange pink",
    "purple": "yellow white orange pink", "pink": "blue black white red", "white": "red blue green black",
    "black": "yellow white red teal",
}  # fmt: skip
CONTRASTS = {
    codes.COLOURS.index(background): tuple(codes.COLOURS.index(name) for name in names.split())
    for background, names in _CONTRASTS.items()
}
# In the order in which a plan decides: at the first cell of each, begin here with this probability or go on.
_PLACINGS: tuple[tuple[bool, Side, float], ...] = (
    (True, "left", 0.4), (True, "center", 0.5), (True, "right", 0.42), (False, "left", 0.42), (False, "center", 0.55),
    (False, "right", 1.0),
)  # fmt: skip


def random_facts(rng: Random, split: Split = "train") -> Facts:
    """Return facts whose words and combination are of this split."""
    while True:
        facts = _random_facts(rng, split)
        if held_out(combination(facts.poster)) == (split == "held-out"):
            return facts


def random_poster(rng: Random, split: Split = "train") -> Poster:
    """Return a poster for everything but the planner: of the small grammar, or one whose lines may begin alike."""
    if rng.random() < 0.4:
        return prompts.random_poster(rng, split)
    poster = random_facts(rng, split).poster
    lines = poster.lines
    if len(lines) > 1 and rng.random() < 0.3:
        first = next(iter(lines.values())).text[0]
        lines.update((zone, replace(line, text=first + line.text[1:])) for zone, line in poster.lines.items())
        if not any(held_out(line.text) for line in lines.values()):
            return poster.with_lines(lines)
    return poster


def _random_facts(rng: Random, split: Split) -> Facts:
    said = list(range(len(codes.COLOURS)))
    rng.shuffle(said)
    open_facts: set[Fact] = set()
    background = said.pop() if rng.random() < 0.72 else 0
    if len(said) == len(codes.COLOURS):
        open_facts.add("background")
    count = rng.choices((0, 1, 2), (0.2, 0.52, 0.28))[0]
    zones = [] if rng.random() < 0.06 else _random_zones(rng, count)
    lines: dict[Zone, Line] = {
        zone: Line(random_text(rng, split), rng.choice(said) if rng.random() < 0.25 else None) for zone in zones
    }
    kinds = [rng.randrange(len(codes.SHAPES)) for _ in range(count)]
    colours = [rng.choice(said) for _ in range(count)]
    if count == 2 and rng.random() < 0.2:
        kinds, colours = kinds[:1] * 2, colours[:1] * 2
    open_facts |= {fact for fact in COLOUR_FACTS[:count] if rng.random() < 0.22}
    open_facts |= {"size"} if count and rng.random() < 0.5 else set()
    open_facts |= {"side"} if count == 1 and rng.random() < 0.4 else set()
    large = "subtitle" not in lines and rng.random() < 0.55
    sides: tuple[Side, ...] = ("left", "right") if count == 2 else (rng.choice(("center", "center", "left", "right")),)
    shapes = tuple(Shape(kind, colour, large, at) for kind, colour, at in zip(kinds, colours, sides, strict=False))
    return draw_open(Facts(Poster(background, shapes=shapes).with_lines(lines), frozenset(open_facts)), rng)


def draw_open(facts: Facts, rng: Random) -> Facts:
    """Return the facts with other values of the open ones."""
    poster, background = facts.poster, facts.poster.background
    shapes = list(poster.shapes)
    if "background" in facts.open:
        named = {line.bar for line in poster.lines.values()}
        named |= {shape.colour for shape, fact in zip(shapes, COLOUR_FACTS, strict=False) if fact not in facts.open}
        background = rng.choice([c for c in range(len(codes.COLOURS)) if c not in named])
    if shapes:
        large, side = _draw_placing(shapes[0], facts.open, poster.subtitle is not None, rng)
        shapes = [replace(shape, large=large, side=side if len(shapes) == 1 else shape.side) for shape in shapes]
    for index, fact in enumerate(COLOUR_FACTS[: len(shapes)]):
        if fact in facts.open:
            shapes[index] = replace(shapes[index], colour=rng.choice(CONTRASTS[background]))
    return replace(facts, poster=replace(poster, background=background, shapes=tuple(shapes)))


def _draw_placing(shape: Shape, open_facts: frozenset[Fact], is_small: bool, rng: Random) -> tuple[bool, Side]:
    """Return size and side in the order in which a plan decides them."""
    options: list[tuple[bool, Side, float]] = [
        (large, side, odds) for large, side, odds in _PLACINGS
        if (large == shape.large or ("size" in open_facts and not is_small))
        and (side == shape.side or "side" in open_facts)
    ]  # fmt: skip
    for large, side, odds in options[:-1]:
        if rng.random() < (odds if len(options) > 2 else 0.5):
            return large, side
    return options[-1][:2]


def _random_zones(rng: Random, shapes: int) -> list[Zone]:
    zones: list[Zone] = ["headline"] if rng.random() < 0.88 else []
    if rng.random() < (0.12 if shapes else 0.05) and zones:
        zones.append("subtitle")
    elif not shapes and rng.random() < 0.5:
        zones.append("middle")
    if rng.random() < 0.72:
        zones.append("footer")
    return zones


def random_text(rng: Random, split: Split) -> str:
    """Return a line of up to 10 characters, or of up to 16, which is longer than the longest that is drawn whole."""
    if rng.random() >= 0.2:
        return random_word(rng, split)
    while True:
        if rng.random() < 0.5:
            text = " ".join(rng.choice(WORDS) for _ in range(rng.choice((2, 2, 3))))
        else:
            letters = rng.choice((11, 11, 12, 12, 13, 13, 14, 14, 15, 16))
            text = "".join(rng.choice(codes.LETTERS[:26] + "   ") for _ in range(letters))
        text = " ".join(text.split())
        if WIDE_LETTERS < len(text) <= MAX_LETTERS + 2 and held_out(text) == (split == "held-out"):
            return text


def facts_of(poster: Poster, prompt: str) -> Facts:
    """Return what a prompt of `prompts.describe` says: it leaves out white, a default colour, "large" and "center"."""
    words = re.findall(r"[a-z]+", QUOTED.sub(" ", prompt.lower()))
    said = Counter(COLOUR_INDEX[word] for word in words if word in COLOUR_INDEX)
    unsaid = Counter([poster.background, *(s.colour for s in poster.shapes)])
    unsaid += Counter(line.bar for line in poster.lines.values() if line.bar is not None)
    unsaid -= said
    open_facts: set[Fact] = set()
    for shape, fact in zip(poster.shapes, COLOUR_FACTS, strict=False):
        if shape.colour == default_colour(poster.background) and unsaid[shape.colour] > 0:
            open_facts.add(fact)
            if len({s.colour for s in poster.shapes}) == len(poster.shapes):
                unsaid[shape.colour] -= 1
    if unsaid[poster.background] > 0:
        open_facts.add("background")
    if poster.shapes and poster.shapes[0].large and not {*words} & {*LARGE_WORDS}:
        open_facts.add("size")
    places = {"center", "centered", "middle", "hero"}
    if len(poster.shapes) == 1 and poster.shapes[0].side == "center" and not {*words} & places:
        open_facts.add("side")
    return Facts(poster, frozenset(open_facts))
