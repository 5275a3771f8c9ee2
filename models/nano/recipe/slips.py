"""Surface of the free prompts: quotation marks, fillers, spellings, typing errors."""

import re
from random import Random

from models.nano.recipe import codes, phrases
from models.nano.recipe.layouts import QUOTED

QUOTES = ('""', '""', '""', "''", "“”", "“”", "「」")
BRITISH = {"color": "colour", "center": "centre", "colored": "coloured", "centered": "centred"}
TYPO_SHARE = 0.14  # of prompts
_KNOWN = frozenset([*codes.COLOURS, *codes.SHAPES, *phrases.COLOUR_WORDS, *phrases.SHAPE_WORDS])
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def quoted(text: str, rng: Random) -> str:
    """Return a text in quotation marks, in any case."""
    text = rng.choices((text, text.lower(), text.title()), (0.7, 0.2, 0.1))[0]
    before, after = rng.choice(QUOTES)
    return before + text + after


def plain_kind(kind: int) -> str:
    return codes.SHAPES[kind]


def kind_word(kind: int, rng: Random) -> str:
    """Return a name of a shape, singular."""
    name = codes.SHAPES[kind]
    others = [word for word, means in phrases.SHAPE_WORDS.items() if means == name and not word.endswith("s")]
    return rng.choice(others) if others and rng.random() < 0.15 else name


def topical(template: str, rng: Random) -> str:
    """Return a phrase about something that is not to be drawn, now and then an unknown word."""
    while "{t}" in template:
        known = rng.random() < 0.8
        template = template.replace("{t}", rng.choice(phrases.TOPICS) if known else _pseudo_word(rng), 1)
    return template


def _pseudo_word(rng: Random) -> str:
    consonants, vowels = "bcdfghjklmnprstvwz", "aeiou"
    return "".join(rng.choice(consonants) + rng.choice(vowels) for _ in range(rng.choice((1, 2, 2, 3)))) + rng.choice(
        ("", "", *consonants)
    )


def finish(text: str, rng: Random) -> str:
    """Add an ending, British spelling, a typing error and an upper-case start."""
    if rng.random() < 0.25:
        text += rng.choice((", ", ". ", " ", "; ", "\n")) + topical(rng.choice(phrases.ENDINGS), rng)
    if rng.random() < 0.4:
        text = re.sub(r"\b(color|center)(ed)?\b", lambda word: BRITISH[word[0]], text)
    if rng.random() < TYPO_SHARE:
        text = with_typing_error(text, rng)
    if "'" in QUOTED.sub("", text):  # an apostrophe: no single quotation marks beside it
        text = re.sub(r"(?<![a-zA-Z])'([^']*)'(?![a-zA-Z])", r'"\1"', text)
    if rng.random() < 0.5:
        text = text[0].upper() + text[1:]
    return text + rng.choice(("", "", ".", ".", "!", " "))


def with_typing_error(text: str, rng: Random) -> str:
    """Change one letter of a word outside of quotations; half of the time of a colour or a shape."""
    blanked = QUOTED.sub(lambda match: " " * len(match[0]), text)
    words = list(re.finditer(r"\b[a-z]{4,}\b", blanked))
    important = [match for match in words if match[0] in _KNOWN]
    if not words:
        return text
    match = rng.choice(important if important and rng.random() < 0.5 else words)
    wrong = _misspelt(match[0], rng)
    return text if wrong in _KNOWN else text[: match.start()] + wrong + text[match.end() :]


def _misspelt(word: str, rng: Random) -> str:
    at = rng.randrange(1, len(word))
    kind = rng.randrange(4)
    if kind == 0:
        return word[:at] + word[at + 1 :]
    if kind == 1:
        return word[:at] + rng.choice((word[at], rng.choice(_LETTERS))) + word[at:]
    if kind == 2:
        return word[: at - 1] + word[at] + word[at - 1] + word[at + 1 :]
    return word[:at] + rng.choice(_LETTERS) + word[at + 1 :]
