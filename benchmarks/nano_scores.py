"""Cases for `nano_quality` and their scores: what an image shows beside what its prompt says."""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from models.nano.heldout import by_hand, grammar
from models.nano.recipe import layouts, prompts, reading
from models.nano.recipe.facts import Fact, Facts
from models.nano.recipe.world import MAX_LETTERS, ZONES, Line, Poster, draw

SIZES = ((256, 256),) * 12 + ((384, 256),) * 3 + ((256, 384),) * 3 + ((512, 512),) * 2
Reader = Callable[[np.ndarray, Poster], set[str]]


@dataclass(frozen=True)
class Case:
    """A prompt, the poster it describes and the image's size; for an edit also the poster before. `open` are facts that
    the prompt does not say.
    """

    prompt: str
    poster: Poster
    width: int
    height: int
    seed: int
    before: Poster | None = None
    open: frozenset[Fact] = frozenset()

    @property
    def source(self) -> Image.Image | None:
        """Return the source image of an edit."""
        return Image.fromarray(draw(self.before, self.width, self.height)) if self.before else None

    @property
    def facts(self) -> Facts:
        return Facts(self.poster, self.open)


@dataclass
class Score:
    """Counts by property, as [right, total], and descriptions of what was wrong."""

    counts: dict[str, list[float]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def add(self, name: str, right: float, total: float = 1) -> None:
        count = self.counts.setdefault(name, [0, 0])
        count[0] += right
        count[1] += total


# --- Cases


def held_out_cases(count: int, seed: int) -> list[Case]:
    """Return prompts of the small grammar, with words and combinations that training does not see."""
    rng = Random(f"held-out/{seed}")
    cases = []
    for i in range(count):
        poster = prompts.random_poster(rng, "held-out")
        prompt = prompts.describe(poster, rng)
        left_open = layouts.facts_of(poster, prompt).open
        cases.append(Case(prompt, poster, *rng.choice(SIZES), seed=i, open=left_open))
    return cases


def held_out_edits(count: int, seed: int) -> list[Case]:
    rng = Random(f"held-out edits/{seed}")
    edits = [prompts.random_edit(rng, "held-out") for _ in range(count)]
    return [Case(edit.instruction, edit.after, 256, 256, i, edit.before) for i, edit in enumerate(edits)]


def free_cases(count: int, seed: int) -> list[Case]:
    """Return prompts of the second grammar."""
    return _square(grammar.cases(count), seed)


def hand_cases(count: int, seed: int) -> list[Case]:
    """Return sentences written by hand."""
    return _square(by_hand.cases()[:count], seed)


def _square(cases: list[tuple[str, Facts]], seed: int) -> list[Case]:
    return [Case(prompt, facts.poster, 256, 256, seed + i, open=facts.open) for i, (prompt, facts) in enumerate(cases)]


SETS: dict[str, tuple[Callable[[int, int], list[Case]], int]] = {
    "small": (held_out_cases, 200), "free": (free_cases, 300), "hand": (hand_cases, 40),
}  # fmt: skip

# --- Scores


def compare(score: Score, case: Case, image: np.ndarray, reader: Reader | None = None) -> None:
    """Add one image to the score; `reader` reads its words a second time."""
    found = reading.read(image)
    errors = []
    for zone in ZONES:
        expected, drawn = getattr(case.poster, zone), getattr(found, zone)
        _compare_line(score, expected, drawn)
        if _text(expected) != _text(drawn):
            errors.append(f"{zone} {_text(expected)!r} reads {_text(drawn)!r}")
        if expected:
            score.add("bars", (drawn.bar if drawn else None) == expected.bar)
    agrees = case.facts.agrees(found)
    score.add("background", agrees["background"])
    score.add("shape, colour and zone", agrees["shapes"])
    if not agrees["shapes"]:
        errors.append(f"{case.poster.shapes} reads {found.shapes}")
    if not agrees["background"]:
        errors.append("background")
    score.add("whole poster", not errors)
    if reader:
        _compare_second(score, case, reader(image, found), reader(draw(case.poster, case.width, case.height), found))
    if errors:
        score.wrong.append(f"{case.width}x{case.height} {case.prompt}\n    " + "; ".join(errors))


def _compare_second(score: Score, case: Case, words: set[str], ideal: set[str]) -> None:
    """Add what a second reader sees in the image, and in the same poster drawn without a model."""
    for line in case.poster.lines.values():
        word = _text(line).replace(" ", "")
        score.add("words, second reader", word in words)
        score.add("  of drawn posters", word in ideal)


def compare_edit(score: Score, case: Case, image: np.ndarray, reader: Reader | None = None) -> None:
    """Add one edited image: whether the requested change is there, and whether everything else is as before."""
    assert case.before is not None
    found, before, after = (_parts(poster) for poster in (reading.read(image), case.before, case.poster))
    wrong = {name: f"{found[name]}, not {after[name]}" for name in after if found[name] != after[name]}
    changed = {name for name in after if after[name] != before[name]}
    score.add("requested change", not wrong.keys() & changed)
    score.add("rest kept", not wrong.keys() - changed)
    if wrong:
        score.wrong.append(f"{case.prompt}\n    " + "; ".join(f"{name} is {error}" for name, error in wrong.items()))


def compare_seeds(score: Score, case: Case, images: list[np.ndarray]) -> None:
    """Add images of one prompt with several seeds: what it leaves open should vary, what it says should not."""
    found = [reading.read(image) for image in images]
    for fact in sorted(case.open):
        score.add(f"open {fact} varies", len({fact_value(poster, fact) for poster in found}) > 1)
    score.add("what is said is right with every seed", all(all(case.facts.agrees(p).values()) for p in found))


def fact_value(poster: Poster, fact: Fact) -> Any:
    if fact == "background":
        return poster.background
    index = 1 if fact == "second colour" else 0
    shape = poster.shapes[index] if len(poster.shapes) > index else None
    return shape and {"size": shape.large, "side": shape.side}.get(fact, shape.colour)


def _parts(poster: Poster) -> dict[str, Any]:
    """Return everything that an edit can change, by name."""
    parts: dict[str, Any] = {"background": poster.background}
    for name in ZONES:
        line = getattr(poster, name)
        parts[name] = _text(line)
        parts[f"{name} bar"] = line.bar if line else None
    for side in ("left", "center", "right"):
        parts[side] = [shape for shape in poster.shapes if shape.side == side]
    return parts


def _compare_line(score: Score, expected: Line | None, drawn: Line | None) -> None:
    expected_text, text = _text(expected), _text(drawn)
    if not expected_text and not text:
        return
    score.add("words", expected_text == text)
    if expected_text:
        right = max(0, len(expected_text) - distance(expected_text, text))
        score.add("characters", right, len(expected_text))


def _text(line: Line | None) -> str:
    return line.text[:MAX_LETTERS].rstrip().upper() if line else ""


def distance(a: str, b: str) -> int:
    """Return the Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]
