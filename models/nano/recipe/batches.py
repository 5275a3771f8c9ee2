"""Batches for the renderer: posters, edits and single lines."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor

from models.nano.recipe import codes, glyphs, world
from models.nano.recipe.latents import Shard, load_shards
from models.nano.recipe.loop import IGNORED, device
from models.nano.recipe.prompts import Edit
from models.nano.recipe.world import ALPHABET, CELL, MAX_LETTERS, Line, Poster

UNCONDITIONAL_SHARE = 0.1  # of samples that get neither plan nor glyphs, for guidance
# Auxiliary targets of middle blocks: place and character of the letters in a token's left and right half, and its part
# of the cell, whose tokens have the same code.
NO_LETTER, NO_PLACE = len(ALPHABET), MAX_LETTERS
CELL_PARTS = 2 * 2 + 4 * 4  # tokens of a code for one cell, or for 2x2
HINTS = {
    "left place": NO_PLACE + 1, "right place": NO_PLACE + 1,
    "left letter": NO_LETTER + 1, "right letter": NO_LETTER + 1, "cell part": CELL_PARTS,
}  # fmt: skip
LINE_WEIGHT, SHAPE_WEIGHT, PLAIN_WEIGHT = 5.0, 4.0, 0.5


@dataclass
class Batch:
    """Samples of one size."""

    latents: Tensor  # [b, c, h, w] normalised
    plan: Tensor  # [b, h/2 * w/2] codes, one per token
    weight: Tensor  # [b, 1, h, w]
    strings: list[list[str]]
    size: tuple[int, int]  # height, width in pixels
    conditioned: Tensor = field(default_factory=lambda: torch.empty(0))  # [b] 0 without plan and glyphs
    hints: Tensor = field(default_factory=lambda: torch.empty(0))  # [b, h/2, w/2, 5], see hints_of
    source: Tensor | None = None  # of edits, like latents and plan
    source_plan: Tensor | None = None


class LatentPool:
    """All shards of one size computed so far."""

    def __init__(self, folder: Path, width: int, height: int, edits: bool = False):
        self.folder, self.width, self.height, self.edits = folder, width, height, edits
        self.shards: list[Shard] = []

    def refresh(self) -> None:
        self.shards += load_shards(self.folder, self.width, self.height, self.edits, len(self.shards))

    def sample(self, rng: Random) -> tuple[Shard, int]:
        shard = rng.choice(self.shards)
        return shard, rng.randrange(len(shard.posters))


@dataclass
class _EditSample:
    edit: Edit
    latents: Tensor
    before: Tensor
    plan: np.ndarray
    source_plan: np.ndarray
    hints: np.ndarray

    def crop_row(self, row: int) -> "_EditSample":
        cells, patches, tokens = (slice(row * n, (row + 1) * n) for n in (4, 2, 1))
        return _EditSample(
            self.edit, self.latents[:, cells], self.before[:, cells], self.plan[tokens], self.source_plan[tokens],
            self.hints[patches],
        )  # fmt: skip


def _sample_edit(pool: LatentPool, rng: Random, rows: int, columns: int) -> _EditSample:
    shard, i = pool.sample(rng)
    assert shard.edits is not None
    assert shard.before is not None
    edit = shard.edits[i]
    return _EditSample(
        edit, shard.latents[i], shard.before[i], world.plan(edit.after, rows, columns, from_pixels=edit.kept_zones),
        world.plan(edit.before, rows, columns, from_pixels=world.ZONES), hints_of(edit.after, rows, columns),
    )  # fmt: skip


def _new_strings(edit: Edit, rng: Random) -> list[str]:
    lines = edit.after.lines
    return _strings([line for zone, line in lines.items() if zone not in edit.kept_zones], rng)


class BatchBuilder:
    """Draws batches from latents, normalised by `mean` and `std` [c]."""

    def __init__(self, mean: Tensor, std: Tensor):
        self.mean, self.std = mean.view(-1, 1, 1), std.view(-1, 1, 1)  # on the CPU, as the latents are

    def posters(self, rng: Random, pool: LatentPool, count: int) -> Batch:
        rows, columns = pool.height // CELL, pool.width // CELL
        latents, plans, strings, hints = [], [], [], []
        for _ in range(count):
            shard, i = pool.sample(rng)
            poster = shard.posters[i]
            latents.append(shard.latents[i])
            plans.append(world.plan(poster, rows, columns))
            strings.append(glyph_strings(poster, rng))
            hints.append(hints_of(poster, rows, columns))
        return self._batch(latents, plans, strings, hints, (pool.height, pool.width), rng, UNCONDITIONAL_SHARE)

    def edits(self, rng: Random, pool: LatentPool, count: int) -> Batch:
        rows, columns = pool.height // CELL, pool.width // CELL
        samples = [_sample_edit(pool, rng, rows, columns) for _ in range(count)]
        return self._edit_batch(samples, (pool.height, pool.width), rng)

    def edit_lines(self, rng: Random, pool: LatentPool, count: int) -> Batch:
        """Return single lines of edits, one row of cells each; most are kept."""
        rows, columns = pool.height // CELL, pool.width // CELL
        samples: list[_EditSample] = []
        while len(samples) < count:
            whole = _sample_edit(pool, rng, rows, columns)
            for placed in world.place(whole.edit.after, rows, columns)[0][: count - len(samples)]:
                samples.append(whole.crop_row(placed.row))
        return self._edit_batch(samples, (pool.height, pool.width), rng)

    def _edit_batch(self, samples: "list[_EditSample]", size: tuple[int, int], rng: Random) -> Batch:
        batch = self._batch(
            [s.latents for s in samples], [s.plan for s in samples], [_new_strings(s.edit, rng) for s in samples],
            [s.hints for s in samples], size, rng, 0.0,
        )  # fmt: skip
        before = torch.stack([s.before for s in samples]).float()
        batch.source = ((before - self.mean) / self.std).to(device())
        batch.source_plan = torch.from_numpy(np.stack([per_token(s.source_plan) for s in samples])).to(device())
        return batch

    def lines(self, rng: Random, pool: LatentPool, count: int) -> Batch:
        """Return single lines, one row of cells each, or two of larger letters."""
        rows, columns = pool.height // CELL, pool.width // CELL
        scale = world.scale_of(rows, columns)
        latents, plans, strings, hints = [], [], [], []
        while len(latents) < count:
            shard, i = pool.sample(rng)
            poster = shard.posters[i]
            for placed in world.place(poster, rows, columns)[0][: count - len(latents)]:
                row = placed.row
                latents.append(shard.latents[i][:, row * 4 : (row + scale) * 4])
                plans.append(world.plan(poster, rows, columns)[row : row + scale])
                strings.append(glyph_strings(poster, rng))
                hints.append(hints_of(poster, rows, columns)[row * 2 : (row + scale) * 2])
        return self._batch(latents, plans, strings, hints, (pool.height, pool.width), rng, UNCONDITIONAL_SHARE)

    def _batch(
        self,
        latents: Sequence[Tensor],
        plans: Sequence[np.ndarray],
        strings: list[list[str]],
        hints: Sequence[np.ndarray],
        size: tuple[int, int],
        rng: Random,
        unconditional_share: float,
    ) -> Batch:
        grid = torch.from_numpy(np.stack(plans))
        busy = torch.where(torch.from_numpy(codes.is_text(grid.numpy())), LINE_WEIGHT, SHAPE_WEIGHT)
        weight = torch.where(grid < codes.PIXEL_TEXT, PLAIN_WEIGHT, busy)
        conditioned = torch.tensor([float(rng.random() >= unconditional_share) for _ in plans])
        return Batch(
            latents=((torch.stack(list(latents)).float() - self.mean) / self.std).to(device()),
            plan=torch.from_numpy(np.stack([per_token(p) for p in plans])).to(device()),
            weight=weight.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].to(device()),
            strings=[s if c else [] for s, c in zip(strings, conditioned.tolist(), strict=True)], size=size,
            conditioned=conditioned.to(device()),
            hints=torch.from_numpy(np.stack(hints)).to(device()),
        )  # fmt: skip


def hints_of(poster: Poster, rows: int, columns: int) -> np.ndarray:
    """Return the targets of `HINTS` [2 * rows, 2 * columns, 5] int64 per 16-pixel token."""
    places = np.full((rows * 2, columns * 4), NO_PLACE)  # columns of 8 pixels
    letters = np.full((rows * 2, columns * 4), NO_LETTER)
    parts = np.full((rows * 2, columns * 2, 1), IGNORED)
    lines, shapes = world.place(poster, rows, columns)
    for placed in lines:
        wide, high = placed.pitch // 8, placed.scale * 2
        for i, letter in enumerate(placed.line.text.upper()):
            x, y = placed.x // 8 + i * wide, placed.y // 16
            places[y : y + high, x : x + wide] = i
            letters[y : y + high, x : x + wide] = ALPHABET.find(letter)
    for placed in shapes:
        side = placed.cells * 2
        across = side // (4 if placed.shape.large else 2)  # tokens per code, 2 or 4
        part = np.arange(side) % across
        box = (slice(placed.row * 2, placed.row * 2 + side), slice(placed.column * 2, placed.column * 2 + side))
        parts[box] = (part[:, None] * across + part + (4 if across > 2 else 0))[..., None]
    halves = [each.reshape(rows * 2, columns * 2, 2) for each in (places, letters)]
    return np.concatenate([*halves, parts], -1)


def per_token(plan: np.ndarray) -> np.ndarray:
    """Return the codes [2 rows * 2 columns] of tokens, of a plan [rows, columns]."""
    return plan.repeat(2, 0).repeat(2, 1).ravel()


def glyph_strings(poster: Poster, rng: Random) -> list[str]:
    """Return strings for the glyph encoder, in random order and case."""
    return _strings(list(poster.lines.values()), rng)


def _strings(lines: list[Line], rng: Random) -> list[str]:
    strings = [glyphs.random_case(line.text, rng) for line in lines]
    rng.shuffle(strings)
    return strings
