"""Prompts as newcomers write them: sentences, telegrams and lists with every order, place and filler.

`describe` says all facts of a poster but the open ones.
"""

from dataclasses import dataclass
from random import Random

from models.nano.recipe import codes, phrases, slips
from models.nano.recipe.facts import COLOUR_FACTS, Facts
from models.nano.recipe.layouts import random_facts
from models.nano.recipe.prompts import Split, with_article
from models.nano.recipe.world import Line, Shape, Zone

# Zones of lines without a place, in their order: alone, two, three without and with shapes.
UNPLACED_ZONES: tuple[tuple[tuple[Zone, ...], bool | None], ...] = (
    (("headline",), None), (("headline", "footer"), None), (("headline", "middle", "footer"), False),
    (("headline", "subtitle", "footer"), True),
)  # fmt: skip


@dataclass(frozen=True)
class Style:
    """Templates of one way to write."""

    line: tuple[str, ...]
    unplaced_line: tuple[str, ...]
    shape: tuple[str, ...]
    unplaced_shape: tuple[str, ...]
    background: tuple[str, ...]
    joins: tuple[str, ...]


PHRASES = Style(
    phrases.LINE_PHRASES, phrases.UNPLACED, phrases.SHAPE_PHRASES, phrases.UNPLACED_SHAPES, phrases.BACKGROUND_PHRASES,
    (", ", ", ", ", ", "; ", " and ", ", and ", " with ", " - ", ", then ", " plus ", "\n", " "),
)  # fmt: skip
SENTENCES = Style(
    phrases.LINE_SENTENCES, phrases.UNPLACED_SENTENCES, phrases.SHAPE_SENTENCES, phrases.UNPLACED_SHAPE_SENTENCES,
    phrases.BACKGROUND_SENTENCES, (". ", ". ", ". ", ".\n", "! ", ", and ", "; ", ". then ", ". also ", ", "),
)  # fmt: skip
FIELDS = Style(
    phrases.LINE_FIELDS, ("text: {q}", "{q}", "{q}", "{w}: {q}"), phrases.SHAPE_FIELDS, phrases.UNPLACED_SHAPE_FIELDS,
    phrases.BACKGROUND_FIELDS, (". ", "; ", ", ", "\n", "\n- ", "\n* ", "\n• ", " | ", " / ", ";\n", " - ", " "),
)  # fmt: skip


def random_prompt(rng: Random, split: Split = "train") -> tuple[str, Facts]:
    """Return a prompt and the facts that it says."""
    facts = random_facts(rng, split)
    return describe(facts, rng), facts


def describe(facts: Facts, rng: Random) -> str:
    return _Writer(facts, rng).write()


class _Writer:
    """Composes one prompt clause by clause."""

    def __init__(self, facts: Facts, rng: Random):
        self.facts, self.rng, self.poster = facts, rng, facts.poster
        self.style = rng.choices((PHRASES, SENTENCES, FIELDS), (0.5, 0.25, 0.25))[0]
        self.says_background = "background" not in facts.open
        self.sheet = rng.choice(phrases.SHEETS)
        self.previous: Zone | str = ""

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def write(self) -> str:
        rng, parts = self.rng, []
        order: list[Zone | str] = [zone for zone in ("headline", "subtitle", "middle") if zone in self.poster.lines]
        if self.poster.shapes:
            order.append("shapes")
        order += ["footer"] if self.poster.footer else []
        if self.chance(0.3):
            rng.shuffle(order)
        unplaced = self._unplaced(order)
        opening = self._opening()
        if self.says_background:
            order.insert(rng.choice((0, len(order), rng.randrange(len(order) + 1))), "background")
        for name in order:
            if name == "background":
                parts.append(self._fill(rng.choice(self.style.background), c=self.colour(self.poster.background)))
            elif name == "shapes":
                parts.append(self._shapes())
            else:
                parts.append(self._line(name, name in unplaced))  # pyright: ignore[reportArgumentType]
            self.previous = self.previous if name == "background" else name
        if not self.poster.lines and self.chance(0.7):
            parts.insert(rng.randrange(len(parts) + 1), self._unquoted())
        return slips.finish(self._join(opening, parts), rng)

    def _unplaced(self, order: list[Zone | str]) -> frozenset[Zone | str]:
        """Return the zones that the prompt does not name: none, all if that is clear, or the second of two."""
        zones = tuple(name for name in order if name != "shapes")
        for expected, with_shapes in UNPLACED_ZONES:
            if zones == expected and with_shapes in (None, bool(self.poster.shapes)):
                if self.chance(0.3):
                    return frozenset(zones)
                if zones == ("headline", "footer") and self.chance(0.1):
                    return frozenset(zones[1:])
        return frozenset()

    def _join(self, opening: str, parts: list[str]) -> str:
        rng, text = self.rng, opening
        bullet = rng.choice(self.style.joins)
        for index, part in enumerate(parts):
            # One separator throughout is the rule.
            separator = bullet if self.style is FIELDS or self.chance(0.6) else rng.choice(self.style.joins)
            if index == 0:
                first = rng.choice(phrases.JOINS) if self.style is PHRASES else rng.choice((". ", ": ", ", ", ".\n"))
                separator = "" if not text else bullet if self.style is FIELDS and self.chance(0.7) else first
            text += separator + part
        return text

    # --- Clauses

    def _opening(self) -> str:
        rng = self.rng
        said = self.says_background and self.chance(0.55)
        if not said and (self.poster.lines or self.poster.shapes) and self.chance(0.25):
            return ""
        template = rng.choice(phrases.OPENINGS) if said else rng.choice(("{b}", "{b}", "{y} {b}"))
        if said:
            self.says_background = False
        text = self._fill(template, c=self.colour(self.poster.background))
        lead = rng.choice(phrases.LEADS) if self.chance(0.55) else ""
        if not template.startswith(("{a}", "{c}")) and (lead or self.chance(0.5)):
            text = with_article(text)
        if self.chance(0.2):
            text += " " + slips.topical(rng.choice(phrases.PURPOSES), rng)
        greeting = rng.choice(phrases.GREETINGS) if self.chance(0.08) else ""
        return " ".join(part for part in (greeting, lead, text) if part)

    def _line(self, zone: Zone, unplaced: bool) -> str:
        line: Line = getattr(self.poster, zone)
        templates = self.style.unplaced_line if unplaced else self.style.line
        place = self.rng.choice(phrases.ZONE_PLACES[zone])
        relative = self._relative(zone)
        if relative and not unplaced and self.chance(0.35):
            place, templates = relative, tuple(t for t in templates if "{p}" in t and "{n}" not in t)
        return self._fill(
            self.rng.choice(templates), q=self._quoted(line), p=place, n=self.rng.choice(phrases.ZONE_NAMES[zone])
        )

    def _relative(self, zone: Zone) -> str | None:
        """Return a place relative to the clause before, if it is clear."""
        between = self.poster.subtitle or self.poster.middle
        shape = slips.plain_kind(self.poster.shapes[0].kind) if len(self.poster.shapes) == 1 else None
        after_shape = self.previous == "shapes"
        if zone == "footer" and (
            after_shape or self.previous == "middle" or (self.previous == "headline" and not between)
        ):
            named = shape and after_shape and self.chance(0.3)
            return self.rng.choice(phrases.BELOW_SHAPE).format(k=shape) if named else self.rng.choice(phrases.BELOW)
        if zone == "headline" and (
            after_shape or self.previous == "middle" or (self.previous == "footer" and not between)
        ):
            named = shape and after_shape and self.chance(0.3)
            return self.rng.choice(phrases.ABOVE_SHAPE).format(k=shape) if named else self.rng.choice(phrases.ABOVE)
        return None

    def _quoted(self, line: Line) -> str:
        text = slips.quoted(line.text, self.rng)
        if line.bar is None:
            return text
        return f"{text} {self.rng.choice(phrases.BARS).format(c=with_article(self.colour(line.bar)))}"

    def _shapes(self) -> str:
        rng, shapes = self.rng, self.poster.shapes
        if len(shapes) == 1:
            [shape] = shapes
            if "side" in self.facts.open:
                return self._fill(rng.choice(self.style.unplaced_shape), x=self._noun(shape, 0))
            if shape.side == "center" and self.previous == "headline" and self.chance(0.1):
                return self._fill(rng.choice(phrases.BELOW_HEADLINE), x=self._noun(shape, 0))
            place, name = (rng.choice(table[shape.side]) for table in (phrases.SHAPE_PLACES, phrases.SHAPE_NAMES))
            return self._fill(rng.choice(self.style.shape), x=self._noun(shape, 0), p=place, n=name)
        left, right = shapes
        has_open = [fact in self.facts.open for fact in COLOUR_FACTS]
        if left.kind == right.kind and (all(has_open) or (not any(has_open) and left.colour == right.colour)):
            plural = self._adjectives(left, 0) + rng.choice(
                [w for w, k in phrases.SHAPE_WORDS.items() if k == codes.SHAPES[left.kind] and w.endswith("s")]
            )
            return rng.choice(phrases.TWINS).format(xs=plural)
        return rng.choice(phrases.PAIRS).format(x=self._noun(left, 0), y=self._noun(right, 1))

    def _unquoted(self) -> str:
        words = [self.rng.choice(phrases.UNQUOTED_WORDS) for _ in range(self.rng.choice((1, 1, 2, 3)))]
        return self.rng.choice(phrases.UNQUOTED).format(u=" ".join(words))

    # --- Words

    def colour(self, colour: int) -> str:
        name = codes.COLOURS[colour]
        if self.chance(0.12):
            return self.rng.choice([word for word, means in phrases.COLOUR_WORDS.items() if means == name] or [name])
        if self.chance(0.08) and name not in ("white", "black"):
            return f"{self.rng.choice(phrases.SHADES)} {name}"
        return name

    def _adjectives(self, shape: Shape, index: int) -> str:
        size = "" if "size" in self.facts.open else self.rng.choice(phrases.LARGE if shape.large else phrases.SMALL)
        colour = "" if COLOUR_FACTS[index] in self.facts.open else self.colour(shape.colour)
        words = [size, colour] if self.chance(0.85) else [colour, size]
        return "".join(word + " " for word in words if word)

    def _noun(self, shape: Shape, index: int) -> str:
        """Return a phrase for a shape, its colour and size before or after it."""
        rng = self.rng
        kind = slips.kind_word(shape.kind, rng)
        if self.chance(0.06):
            kind += rng.choice((" shape", " symbol", " icon"))
        article = rng.choice(("a", "a", "a", "a", "one", "the", "a single", ""))
        adjectives = self._adjectives(shape, index)
        size, colour = adjectives.strip(), ""
        if COLOUR_FACTS[index] not in self.facts.open and self.chance(0.25):
            colour, size = self.colour(shape.colour), ""
            if "size" not in self.facts.open:
                size = rng.choice(phrases.LARGE if shape.large else phrases.SMALL)
        before, after = (f"{size} " if size else ""), ""
        if colour:
            after = rng.choice(
                (" in {}", " in {}", " ({})", " that is {}", " colored {}", ", {}", " of {} color")
            ).format(colour)
        elif size and self.chance(0.05):
            before, after = "", rng.choice((" ({})", " that is {}", ", {}")).format(size)
        noun = f"{before}{kind}"
        if article == "a":
            noun = with_article(noun)
        elif article:
            noun = f"{article} {noun}"
        return noun + after

    def _fill(self, template: str, **values: str) -> str:
        rng = self.rng
        colour = values.get("c", "")
        return template.format(
            a=with_article(colour) if colour else "", b=self.sheet, y=rng.choice(phrases.STYLE_WORDS),
            w=rng.choice(phrases.WORD_NOUNS), says=rng.choice(phrases.SAYS), **values,
        )  # fmt: skip
