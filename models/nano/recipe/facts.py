"""What a prompt says of a poster, and what it leaves open."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from models.nano.recipe.world import ZONES, Poster, Shape

Fact = Literal["background", "size", "side", "first colour", "second colour"]
COLOUR_FACTS: tuple[Fact, Fact] = ("first colour", "second colour")


@dataclass(frozen=True)
class Facts:
    """A poster, and which of its facts are examples only: its prompt leaves them open."""

    poster: Poster
    open: frozenset[Fact] = frozenset()

    def agrees(self, found: Poster) -> dict[str, bool]:
        """Return which properties of a poster are as the prompt says; lines without their letters."""
        expected = self.poster
        lines = all(
            (a is None) == (b is None) and (a is None or b is None or a.bar == b.bar)
            for a, b in ((getattr(expected, zone), getattr(found, zone)) for zone in ZONES)
        )
        background = "background" in self.open or found.background == expected.background
        return {"background": background, "lines": lines, "shapes": self._shapes_agree(found)}

    def _shapes_agree(self, found: Poster) -> bool:
        shapes = found.shapes
        if len(shapes) != len(self.poster.shapes) or found.background in {shape.colour for shape in shapes}:
            return False
        if "size" in self.open and len({shape.large for shape in shapes}) > 1:
            return False
        return self._close(self.poster.shapes) == self._close(shapes)

    def _close(self, shapes: Sequence[Shape]) -> list[Shape]:
        """Return the shapes with a constant in place of each open fact."""
        closed = []
        for shape, colour in zip(shapes, COLOUR_FACTS, strict=False):
            shape = replace(shape, colour=0) if colour in self.open else shape
            shape = replace(shape, large=False) if "size" in self.open else shape
            closed.append(replace(shape, side="center") if "side" in self.open else shape)
        return closed
