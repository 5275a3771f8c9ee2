"""What the renderer is trained on: posters, edits and single lines, with latents, plans and strings, in batches."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor

from models.nano.recipe import codes, glyphs, world
from models.nano.recipe.latents import Shard, load_shards
from models.nano.recipe.loop import device
from models.nano.recipe.prompts import Edit
from models.nano.recipe.world import ALPHABET, CELL, MAX_LETTERS, Line, Poster

DROPPED = 0.1  # share of samples without plan and glyphs, for guidance
# Beside the velocity, training asks blocks in the middle what a token is to draw: which places of the line fall into
# its left and right half, then which letters; and which part of its cell it is, for all tokens of a cell have the same
# code. The velocity alone would teach this as well, but takes long to begin.
NO_LETTER, NO_PLACE = len(ALPHABET), MAX_LETTERS
CELL_PARTS = 2 * 2 + 4 * 4  # of a cell of one code, and of one that is twice as large
HINTS = {
    "left place": NO_PLACE + 1, "right place": NO_PLACE + 1,
    "left letter": NO_LETTER + 1, "right letter": NO_LETTER + 1, "cell part": CELL_PARTS,
}  # fmt: skip
IGNORED = -100
LINE_WEIGHT, SHAPE_WEIGHT, PLAIN_WEIGHT = 5.0, 4.0, 0.5


@dataclass
class Batch:
    """Samples of one size."""

    latents: Tensor  # [b, c, h, w] normalised
    plan: Tensor  # [b, h/2 * w/2] codes, one per token
    weight: Tensor  # [b, 1, h, w]
    strings: list[list[str]]
    size: tuple[int, int]  # height, width of the picture in pixels
    kept: Tensor = field(default_factory=lambda: torch.empty(0))  # [b] 0 where plan and glyphs are dropped
    hints: Tensor = field(default_factory=lambda: torch.empty(0))  # [b, h/2, w/2, 5], see hints_of
    source: Tensor | None = None
    source_plan: Tensor | None = None


class Pictures:
    """All latents of one size that are there; looks for more now and then."""

    def __init__(self, folder: Path, width: int, height: int, edits: bool = False):
        self.folder, self.width, self.height, self.edits = folder, width, height, edits
        self.shards: list[Shard] = []

    def refresh(self) -> None:
        self.shards += load_shards(self.folder, self.width, self.height, self.edits, len(self.shards))

    def draw(self, rng: Random) -> tuple[Shard, int]:
        shard = rng.choice(self.shards)
        return shard, rng.randrange(len(shard.posters))


@dataclass
class _Edited:
    """An edit's sample: the picture after with its plan, and the one before."""

    edit: Edit
    latents: Tensor
    before: Tensor
    plan: np.ndarray
    source_plan: np.ndarray
    hints: np.ndarray

    def row(self, row: int) -> "_Edited":
        """One row of its cells."""
        cells, patches, tokens = (slice(row * n, (row + 1) * n) for n in (4, 2, 1))
        return _Edited(
            self.edit, self.latents[:, cells], self.before[:, cells], self.plan[tokens], self.source_plan[tokens],
            self.hints[patches],
        )  # fmt: skip


def _edited(pictures: Pictures, rng: Random, rows: int, columns: int) -> _Edited:
    shard, i = pictures.draw(rng)
    assert shard.edits is not None
    assert shard.before is not None
    edit = shard.edits[i]
    return _Edited(
        edit, shard.latents[i], shard.before[i], world.plan(edit.after, rows, columns, seen=edit.kept),
        world.plan(edit.before, rows, columns, seen=True), hints_of(edit.after, rows, columns),
    )  # fmt: skip


def _new_strings(edit: Edit, rng: Random) -> list[str]:
    """The lines that an edit does not leave as they are."""
    kept = [getattr(edit.after, name) for name in edit.kept]
    return _strings([line for line in _lines(edit.after) if line not in kept], rng)


class Batches:
    """Makes batches from latents; `mean` and `std` [c] normalise them."""

    def __init__(self, mean: Tensor, std: Tensor):
        self.mean, self.std = mean.view(-1, 1, 1), std.view(-1, 1, 1)  # on the CPU, as the latents are

    def posters(self, rng: Random, pictures: Pictures, count: int) -> Batch:
        rows, columns = pictures.height // CELL, pictures.width // CELL
        latents, plans, strings, hints = [], [], [], []
        for _ in range(count):
            shard, i = pictures.draw(rng)
            poster = shard.posters[i]
            latents.append(shard.latents[i])
            plans.append(world.plan(poster, rows, columns))
            strings.append(glyph_strings(poster, rng))
            hints.append(hints_of(poster, rows, columns))
        return self._batch(latents, plans, strings, hints, (pictures.height, pictures.width), rng, DROPPED)

    def edits(self, rng: Random, pictures: Pictures, count: int) -> Batch:
        rows, columns = pictures.height // CELL, pictures.width // CELL
        samples = [_edited(pictures, rng, rows, columns) for _ in range(count)]
        return self._edit_batch(samples, (pictures.height, pictures.width), rng)

    def edit_lines(self, rng: Random, pictures: Pictures, count: int) -> Batch:
        """Single lines of edits, most of them with letters that are to stay as they are: one row of cells."""
        rows, columns = pictures.height // CELL, pictures.width // CELL
        samples: list[_Edited] = []
        while len(samples) < count:
            whole = _edited(pictures, rng, rows, columns)
            for placed in world.place(whole.edit.after, rows, columns)[0][: count - len(samples)]:
                samples.append(whole.row(placed.row))
        return self._edit_batch(samples, (pictures.height, pictures.width), rng)

    def _edit_batch(self, samples: "list[_Edited]", size: tuple[int, int], rng: Random) -> Batch:
        batch = self._batch(
            [s.latents for s in samples], [s.plan for s in samples], [_new_strings(s.edit, rng) for s in samples],
            [s.hints for s in samples], size, rng, 0.0,
        )  # fmt: skip
        before = torch.stack([s.before for s in samples]).float()
        batch.source = ((before - self.mean) / self.std).to(device())
        batch.source_plan = torch.from_numpy(np.stack([per_token(s.source_plan) for s in samples])).to(device())
        return batch

    def lines(self, rng: Random, pictures: Pictures, count: int) -> Batch:
        """Single lines: [h, w] is one row of cells, or two where the letters are twice as large."""
        rows, columns = pictures.height // CELL, pictures.width // CELL
        scale = world.scale_of(rows, columns)
        latents, plans, strings, hints = [], [], [], []
        while len(latents) < count:
            shard, i = pictures.draw(rng)
            poster = shard.posters[i]
            for placed in world.place(poster, rows, columns)[0][: count - len(latents)]:
                row = placed.row
                latents.append(shard.latents[i][:, row * 4 : (row + scale) * 4])
                plans.append(world.plan(poster, rows, columns)[row : row + scale])
                strings.append(glyph_strings(poster, rng))
                hints.append(hints_of(poster, rows, columns)[row * 2 : (row + scale) * 2])
        return self._batch(latents, plans, strings, hints, (pictures.height, pictures.width), rng, DROPPED)

    def _batch(
        self,
        latents: Sequence[Tensor],
        plans: Sequence[np.ndarray],
        strings: list[list[str]],
        hints: Sequence[np.ndarray],
        size: tuple[int, int],
        rng: Random,
        dropped: float,
    ) -> Batch:
        grid = torch.from_numpy(np.stack(plans))
        busy = torch.where(grid < codes.SHAPE, LINE_WEIGHT, SHAPE_WEIGHT)
        weight = torch.where(grid < codes.SEEN, PLAIN_WEIGHT, busy)
        kept = torch.tensor([float(rng.random() >= dropped) for _ in plans])
        return Batch(
            latents=((torch.stack(list(latents)).float() - self.mean) / self.std).to(device()),
            plan=torch.from_numpy(np.stack([per_token(p) for p in plans])).to(device()),
            weight=weight.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].to(device()),
            strings=[s if k else [] for s, k in zip(strings, kept.tolist(), strict=True)], size=size,
            kept=kept.to(device()),
            hints=torch.from_numpy(np.stack(hints)).to(device()),
        )  # fmt: skip


def hints_of(poster: Poster, rows: int, columns: int) -> np.ndarray:
    """[2 * rows, 2 * columns, 5] int64: what `HINTS` should be for every 16-pixel token."""
    places = np.full((rows * 2, columns * 4), NO_PLACE)  # columns of 8 pixels
    letters = np.full((rows * 2, columns * 4), NO_LETTER)
    parts = np.full((rows * 2, columns * 2, 1), IGNORED)
    lines, shapes = world.place(poster, rows, columns)
    for placed in lines:
        wide, high = placed.scale * world.ADVANCE // 8, placed.scale * 2
        for i, letter in enumerate(placed.line.text.upper()):
            x, y = placed.x // 8 + i * wide, placed.y // 16
            places[y : y + high, x : x + wide] = i
            letters[y : y + high, x : x + wide] = ALPHABET.find(letter)
    for placed in shapes:
        side = placed.cells * 2
        across = side // (4 if placed.shape.large else 2)  # tokens of a cell, 2 or 4 on the sizes of the training
        part = np.arange(side) % across
        own = (slice(placed.row * 2, placed.row * 2 + side), slice(placed.column * 2, placed.column * 2 + side))
        parts[own] = (part[:, None] * across + part + (4 if across > 2 else 0))[..., None]
    halves = [each.reshape(rows * 2, columns * 2, 2) for each in (places, letters)]
    return np.concatenate([*halves, parts], -1)


def per_token(plan: np.ndarray) -> np.ndarray:
    """[2 rows * 2 columns] codes, one for each of the renderer's tokens, of a plan [rows, columns]."""
    return plan.repeat(2, 0).repeat(2, 1).ravel()


def glyph_strings(poster: Poster, rng: Random) -> list[str]:
    """What the glyph encoder gets of a poster; the renderer does not see the order."""
    return _strings(_lines(poster), rng)


def _lines(poster: Poster) -> list[Line]:
    return [line for line in (poster.headline, poster.footer) if line]


def _strings(lines: list[Line], rng: Random) -> list[str]:
    strings = [glyphs.random_case(line.text, rng) for line in lines]
    rng.shuffle(strings)
    return strings
